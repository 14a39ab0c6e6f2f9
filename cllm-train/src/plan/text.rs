//! A plan as text.

use cllm_core::progress::count;
use cllm_core::settings::written;
use serde_json::{Map, Value};

use crate::byte_size::format_bytes;
use crate::models::slow_path_warning;
use crate::plan::disk::DiskEstimate;
use crate::plan::needs::{Comparison, Comparisons, Verdict};
use crate::plan::proposal::{Proposal, Proposals};
use crate::plan::{DurationEstimate, Plan};

/// More proposals than these are left to `--json`.
const MAX_PROPOSALS: usize = 4;

pub(super) fn describe(plan: &Plan) -> String {
    let Plan { memory_bytes: memory, host_bytes: host, disk_bytes: disk, comparisons, .. } = plan;
    let (parameters, trained) = (format_count(plan.parameters), format_count(plan.trained_parameters));
    let examples = count(plan.num_examples, "example");
    let epochs = match plan.last_epoch {
        Some(last) => format!("(max_steps), which end in epoch {last} of {}", plan.epochs),
        None => format!("in {}", count(plan.epochs, "epoch")),
    };
    let (batches, bytes) = (count(plan.batches_per_step, "batch"), format_bytes);
    let mut lines = vec![
        format!("model        {parameters} parameters, {trained} of them trained"),
        format!("data         {examples} ({} too long and excluded)", plan.num_excluded),
        format!(
            "steps        {} {epochs}, each of {batches} with up to {} tokens; {} tokens in all",
            plan.steps, plan.max_batch_tokens, plan.tokens
        ),
        format!("device       {}{}", plan.device, of_processes(plan.num_processes)),
    ];
    lines.extend(plan.slow_path.as_deref().map(|reason| format!("  {}", slow_path_warning(reason))));
    lines.extend([
        format!("time         {}", duration(&plan.duration)),
        String::new(),
        format!("{:14}{:>11}{:>13}", "", "needed", "available"),
    ]);
    let tensors = format!(
        "  weights {}, gradients {}, optimizer {}, and at the peak the largest of\n  \
         activations {}, update {}, validation {}, saving {}",
        bytes(memory.weights),
        bytes(memory.gradients),
        bytes(memory.optimizer),
        bytes(memory.activations),
        bytes(memory.update),
        bytes(memory.validation),
        bytes(memory.saving)
    );
    let host_row = |name: &str, comparison: &Comparison| {
        format!("{}{}", row(name, comparison), if comparisons.are_here { "" } else { " (this machine)" })
    };
    lines.extend(comparisons.device_memory.map(|comparison| row("device memory", &comparison)));
    lines.extend(comparisons.device_memory.map(|_| tensors.clone()));
    lines.push(host_row("host memory", &comparisons.host_memory));
    let (program, examples, streaming) = (bytes(host.program), bytes(host.examples), bytes(host.streaming));
    lines.push(format!("  program {program}, examples {examples}, files in pieces {streaming}"));
    if comparisons.device_memory.is_none() {
        lines.extend([tensors, format!("  overhead of these {}", bytes(host.overhead))]);
    }
    lines.push(host_row("disk", &comparisons.disk));
    // Not every validation finds a better model.
    lines.push(format!(
        "  at most; each checkpoint {}, final model {}",
        bytes(disk.checkpoint),
        bytes(disk.final_model)
    ));
    let free = comparisons.disk.available.filter(|_| comparisons.are_here);
    let warning = interruption_warning(disk, free);
    lines.extend(warning.map(|warning| format!("  {warning}")));
    for advice in advices(comparisons, &plan.proposals) {
        lines.extend([String::new(), advice]);
    }
    lines.join("\n")
}

fn format_count(parameters: i64) -> String {
    match parameters as f64 / 1e6 {
        millions if millions >= 1e3 => format!("{:.2} B", millions / 1e3),
        millions => format!("{millions:.2} M"),
    }
}

fn of_processes(num_processes: usize) -> String {
    if num_processes == 1 { String::new() } else { format!(", one for each of {num_processes} processes") }
}

fn row(name: &str, comparison: &Comparison) -> String {
    let available = comparison.available.map_or_else(|| "unknown".to_owned(), format_bytes);
    let verdict = match comparison.verdict {
        Verdict::Fits => "fits",
        Verdict::Tight => "tight: within the estimate's error",
        Verdict::DoesNotFit => "does not fit",
        Verdict::Unknown => "",
    };
    format!("{name:14}{:>11}{available:>13}   {verdict}", format_bytes(comparison.needed)).trim_end().to_owned()
}

/// What an interruption would cost, if there is no room for the checkpoint that it writes.
pub(super) fn interruption_warning(disk: &DiskEstimate, available: Option<u64>) -> Option<String> {
    available.filter(|available| disk.needed_if_interrupted > *available).map(|available| {
        format!(
            "no room for an interruption (Ctrl-C, SIGTERM): with its checkpoint, the run needs {} and {} are free; it would lose \
             all steps since the last checkpoint",
            format_bytes(disk.needed_if_interrupted),
            format_bytes(available)
        )
    })
}

/// For everything that does not fit, how much is missing and what to change.
pub(super) fn advices(comparisons: &Comparisons, proposals: &Proposals) -> Vec<String> {
    let proposals_for = |name: &str| match name {
        "device memory" => &proposals.device_memory,
        "host memory" => &proposals.host_memory,
        _ => &proposals.disk,
    };
    comparisons.misfits().map(|(name, comparison)| advice(name, &comparison, proposals_for(name))).collect()
}

/// What to change, as the settings' own assignments.
fn advice(name: &str, comparison: &Comparison, proposals: &[Proposal]) -> String {
    let missing = format_bytes(comparison.needed.saturating_sub(comparison.available.unwrap_or(0)));
    let title = format!("{name} does not fit: {missing} short");
    if proposals.is_empty() {
        let other = match name {
            "disk" => "make room or choose another output",
            "host memory" => "free memory, use a machine with more, or fewer processes on each",
            _ => "use more or larger devices",
        };
        return format!("{title}; {other}");
    }
    let line = |proposal: &Proposal| {
        let time = 100.0 * (proposal.relative_time - 1.0);
        let time = if time.abs() < 0.5 { "the same time".to_owned() } else { format!("time {time:+.0} %") };
        let note = if proposal.changes_training { "; changes the trained model" } else { "" };
        format!("  {}   ({}, {time}{note})", assignments(&proposal.settings), format_bytes(proposal.comparison.needed))
    };
    let lines = proposals.iter().take(MAX_PROPOSALS).map(line);
    std::iter::once(format!("{title}. It fits with one of")).chain(lines).collect::<Vec<_>>().join("\n")
}

fn assignments(settings: &Map<String, Value>) -> String {
    settings.iter().map(|(key, value)| format!("{key}={}", written(value))).collect::<Vec<_>>().join(" ")
}

fn duration(duration: &DurationEstimate) -> String {
    match duration {
        DurationEstimate::Estimated { seconds, seconds_per_step, timed_steps, relative_error } => {
            let source = match relative_error {
                None => format!("the mean of {timed_steps} timed here"),
                Some(error) => format!("estimated from operations and bytes, within about {:.0} %", 100.0 * error),
            };
            let seconds = format_seconds(*seconds);
            format!("about {seconds}, without validation and checkpoints: {seconds_per_step:.3} s per step, {source}")
        }
        DurationEstimate::Unknown { reason } => format!("unknown ({reason})"),
    }
}

fn format_seconds(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 120.0 => format!("{seconds:.0} s"),
        seconds if seconds < 7200.0 => format!("{:.0} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interruption_without_room_for_its_checkpoint_is_told() {
        let disk = DiskEstimate {
            checkpoint: 6_000_000_000,
            final_model: 2_000_000_000,
            peak: 2_000_000_000,
            needed: 2_000_000_000,
            needed_if_interrupted: 6_000_000_000,
        };
        let warning = interruption_warning(&disk, Some(5_000_000_000)).unwrap();
        for part in ["Ctrl-C", "needs 6", "5", "would lose"] {
            assert!(warning.contains(part), "{warning}");
        }
        assert_eq!(interruption_warning(&disk, Some(6_000_000_000)), None);
    }
}
