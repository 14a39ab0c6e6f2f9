//! Formats the figures of a run as cells and sentences, for reports and for the terminal.

use std::collections::BTreeMap;

use cllm_core::progress::count;
use cllm_core::task::Task;

use crate::perplexity::Perplexity;
use crate::results::{Accuracy, AlternativeAccuracy, PairedDifference, Results, StrategyResults, Throughput};
use crate::role::Role;
use crate::similarity::Similarity;
use crate::spider_difficulty::Difficulty;
use crate::statistics::ratio;
use crate::words::with_commas;

/// Column heads of a run's table. The first two columns name the row.
const HEADS: [&str; 11] = [
    "model",
    "strategy",
    "accuracy (95 %)",
    "speed-up over teacher AR (95 %)",
    "accuracy − teacher's, points (95 %)",
    "tokens per forward",
    "tokens/s",
    "unfinished",
    "tokens per forward, finished answers",
    "speed-up over student AR (95 %)",
    "answers same as AR",
];

/// Columns of speed-ups in [`HEADS`]: over the teacher, and over the model itself.
const SPEEDUP: usize = 3;
const OWN_SPEEDUP: usize = 9;

/// Column heads of the table of continuous batching.
const CONCURRENCY_HEADS: [&str; 11] = [
    "model",
    "strategy",
    "rows",
    "speed-up over teacher AR",
    "tokens/s",
    "tokens/s per user",
    "speed-up over student AR",
    "tokens per forward",
    "tokens/s with prefill",
    "speed-up over teacher AR with prefill",
    "unfinished",
];

/// The heads of a table and its rows, without columns that have nothing.
type Columns = (Vec<&'static str>, Vec<Vec<String>>);

/// The table of a run: one row for each model and strategy.
pub fn columns(results: &Results) -> Columns {
    let row = |(role, figures): (Role, &StrategyResults)| {
        vec![
            role.to_string(),
            figures.label.clone(),
            score(figures),
            format_speedup(figures.speedup_vs_teacher_ar, figures.speedup_vs_teacher_ar_ci95),
            difference(results, role, figures),
            format_number(figures.tokens_per_forward, 2, ""),
            format_speed(figures.tokens_per_second),
            format_share(figures.unfinished, figures.examples),
            format_number(figures.tokens_per_forward_finished, 2, ""),
            format_speedup(figures.speedup_vs_student_ar, figures.speedup_vs_student_ar_ci95),
            format_percent(figures.exact_match_vs_ar),
        ]
    };
    let rows: Vec<Vec<String>> = results.strategies().map(row).collect();
    let mut kept = filled_columns(&rows);
    // Without a teacher, the speed-up over the model's own decoding is what decides.
    if let Some(at) = kept.iter().position(|&column| column == OWN_SPEEDUP).filter(|_| !kept.contains(&SPEEDUP)) {
        let own = kept.remove(at);
        kept.insert(SPEEDUP.min(kept.len()), own);
    }
    keep_columns(&kept, &HEADS, &rows)
}

/// Indices of the columns that have something.
fn filled_columns(rows: &[Vec<String>]) -> Vec<usize> {
    let num_columns = rows.first().map_or(0, Vec::len);
    (0..num_columns).filter(|&column| rows.iter().any(|row| row[column] != "-")).collect()
}

fn keep_columns(kept: &[usize], heads: &[&'static str], rows: &[Vec<String>]) -> Columns {
    let heads = kept.iter().map(|&column| heads[column]).collect();
    (heads, rows.iter().map(|row| kept.iter().map(|&column| row[column].clone()).collect()).collect())
}

/// Heads and rows of the table of accuracy by difficulty; no rows where that is not known.
pub fn difficulties(results: &Results) -> (Vec<String>, Vec<Vec<String>>) {
    let known =
        || results.strategies().filter_map(|(role, figures)| Some((role, figures, figures.by_difficulty.as_ref()?)));
    let mut classes: Vec<Difficulty> = known().flat_map(|(_, _, classes)| classes.keys().copied()).collect();
    classes.sort_unstable();
    classes.dedup();
    let heads = ["model", "strategy"].map(str::to_owned).into_iter().chain(classes.iter().map(ToString::to_string));
    let row = |(role, figures, accuracies): (Role, &StrategyResults, &BTreeMap<Difficulty, Accuracy>)| {
        let cell = |class| accuracies.get(class).map_or_else(|| "-".to_owned(), difficulty_text);
        [role.to_string(), figures.label.clone()].into_iter().chain(classes.iter().map(cell)).collect()
    };
    // Without a scored answer there is no class.
    let rows = if classes.is_empty() { Vec::new() } else { known().map(row).collect() };
    (heads.collect(), rows)
}

/// The accuracy. Answers that cannot be correct or incorrect are compared with their references.
pub fn score(figures: &StrategyResults) -> String {
    match &figures.similarity {
        Some(similarity) => format_similarity(similarity),
        None => format_accuracy(figures.accuracy, figures.ci95),
    }
}

/// The accuracy of a strategy of the student less that of the teacher, or `-`.
fn difference(results: &Results, role: Role, figures: &StrategyResults) -> String {
    let pair = results.paired.iter().find(|pair| role == Role::Student && pair.student == figures.label);
    let format = |pair: &PairedDifference| {
        let interval = pair.ci95.map(|ends| ends.map(format_points));
        let interval = interval.map_or_else(String::new, |[low, high]| format!(" ({low} to {high})"));
        Some(format_points(pair.difference?) + &interval)
    };
    pair.and_then(format).unwrap_or_else(|| "-".to_owned())
}

/// The table of continuous batching: from few rows of the batch to many, one row for each model and
/// strategy.
pub fn concurrency_columns(results: &Results) -> Columns {
    let row = |(role, strategy, batch): (Role, &StrategyResults, &Throughput)| {
        vec![
            role.to_string(),
            strategy.label.clone(),
            batch.concurrency.to_string(),
            format_number(batch.speedup_vs_teacher_ar, 2, "x"),
            format_speed(batch.tokens_per_second),
            format_speed(batch.tokens_per_second_per_user),
            format_number(batch.speedup_vs_student_ar, 2, "x"),
            format_number(batch.tokens_per_forward, 2, ""),
            format_speed(batch.end_to_end_tokens_per_second),
            format_number(batch.end_to_end_speedup_vs_teacher_ar, 2, "x"),
            format_share(batch.unfinished, batch.answers),
        ]
    };
    let rows: Vec<Vec<String>> = results.throughputs().into_iter().map(row).collect();
    keep_columns(&filled_columns(&rows), &CONCURRENCY_HEADS, &rows)
}

/// Says what the table of continuous batching shows.
pub const CONCURRENCY_NOTE: &str = "Continuous batching of the timed examples, with several requests for each row. When \
    an answer ends, the next request takes its row, and its prompt is cached while the other rows wait. Tokens/s count \
    all rows until the last answer has ended, and exclude prefill unless the column says otherwise; per user, they \
    count one answer in progress. Speed-ups are over AR with as many rows.";

/// A number, or `-` if it is unknown.
pub fn format_number(value: Option<f64>, digits: usize, unit: &str) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}{unit}"))
}

/// Tokens per second, or `-` if they are unknown: with three digits at least, and a comma at every
/// thousand.
pub fn format_speed(tokens_per_second: Option<f64>) -> String {
    match tokens_per_second {
        Some(speed) if speed >= 100.0 => with_commas(&format!("{speed:.0}")),
        speed => format_number(speed, 1, ""),
    }
}

/// A whole number, with a comma at every thousand.
pub fn format_whole(number: usize) -> String {
    with_commas(&number.to_string())
}

/// A whole number with its noun.
pub fn format_count(number: usize, noun: &str) -> String {
    count(number, noun).replacen(&number.to_string(), &format_whole(number), 1)
}

/// A number of others.
pub fn format_share(number: usize, all: usize) -> String {
    format!("{} of {}", format_whole(number), format_whole(all))
}

/// A fraction in percent, or `-` if it is unknown.
pub fn format_percent(fraction: Option<f64>) -> String {
    format_number(fraction.map(|fraction| 100.0 * fraction), 1, " %")
}

/// A difference of two fractions in percentage points, with its sign.
pub fn format_points(difference: f64) -> String {
    format!("{:+.1}", 100.0 * difference).replace('-', "−")
}

/// A 95 % interval in parentheses with a space before them, or nothing if there is none.
pub fn format_interval(ci95: Option<[f64; 2]>, format: impl Fn(f64) -> String) -> String {
    ci95.map_or_else(String::new, |[low, high]| format!(" (95 %: {} to {})", format(low), format(high)))
}

/// An accuracy with its 95 % interval, or `-` if it is unknown.
pub fn format_accuracy(accuracy: Option<f64>, ci95: Option<[f64; 2]>) -> String {
    match (accuracy, ci95) {
        (Some(accuracy), Some([low, high])) => {
            format!("{:.1} % ({:.1} to {:.1})", 100.0 * accuracy, 100.0 * low, 100.0 * high)
        }
        _ => "-".to_owned(),
    }
}

/// A speed-up with its 95 % interval, or `-` if it is unknown.
pub fn format_speedup(ratio: Option<f64>, ci95: Option<[f64; 2]>) -> String {
    let interval = ci95.map_or_else(String::new, |[low, high]| format!(" ({low:.2} to {high:.2})"));
    format_number(ratio, 2, "x") + &interval
}

/// A perplexity with its 95 % interval.
pub fn format_perplexity(perplexity: &Perplexity) -> String {
    let interval = format_interval(perplexity.ci95, |end| format!("{end:.3}"));
    format!("perplexity {:.3}{interval}", perplexity.value)
}

fn format_similarity(similarity: &Similarity) -> String {
    let bleu = format_number(similarity.bleu.map(|bleu| 100.0 * bleu), 1, "");
    format!("BLEU {bleu}, prefix {}", format_percent(similarity.exact_prefix))
}

/// One sentence that says what a run measured.
pub fn describe(results: &Results) -> String {
    if results.benchmark == Task::Perplexity {
        return format!("{}; nothing is generated.", format_count(results.examples, "text"));
    }
    let speed = match results.speed_examples {
        0 => "speed was not measured".to_owned(),
        number => format!("speed at batch 1 on {} of them, excluding prefill", format_whole(number)),
    };
    let examples = format_count(results.examples, "example");
    format!("{examples}, {}, answered in batches for accuracy; {speed}.", results.sampling())
}

/// The lines below a run's table: rows of the prompt set that are missing, perplexity, accuracy by
/// another rule, tokens per forward at batch 1 where they differ from those of the table, and thoughts
/// closed at their limit.
pub fn notes(results: &Results) -> Vec<String> {
    let perplexities = results.models.iter().filter_map(|model| {
        let perplexity = model.perplexity.as_ref()?;
        let (tokens, windows) = (format_count(perplexity.tokens, "token"), format_count(perplexity.windows, "window"));
        let (role, value) = (model.model.role, format_perplexity(perplexity));
        Some(format!("{role}: {value}, {:.4} nats per token, {tokens} in {windows}", perplexity.nll))
    });
    let thoughts = results
        .strategies()
        .filter_map(|(role, figures)| Some(format!("{role} {}: {}", figures.label, thoughts_text(figures)?)));
    let set_aside = (results.set_aside > 0).then(|| {
        format!("{} of the prompt set set aside: they cannot be read", format_count(results.set_aside, "row"))
    });
    let texts = alternatives_text(results).into_iter().chain(chosen_widths_text(results));
    set_aside.into_iter().chain(perplexities).chain(texts).chain(thoughts).collect()
}

/// The student against the teacher: a line for each of its strategies.
pub fn paired_notes(results: &Results) -> impl Iterator<Item = String> {
    results.paired.iter().filter(|pair| pair.examples > 0).map(paired_text)
}

/// Says which of a benchmark's two rules the table shows, and the accuracies by the other one.
fn alternatives_text(results: &Results) -> Option<String> {
    let alternatives = || {
        results.strategies().filter_map(|(role, figures)| Some((role, &figures.label, figures.alternative.as_ref()?)))
    };
    let metric = alternatives().next()?.2.metric;
    let accuracy = |(role, label, alternative): (Role, &String, &AlternativeAccuracy)| {
        format!("{role} {label} {}", format_accuracy(alternative.figures.accuracy, alternative.figures.ci95))
    };
    let accuracies: Vec<String> = alternatives().map(accuracy).collect();
    let (shown, other) = (metric.counterpart().description(), metric.description());
    Some(format!("accuracy is {shown}; {other}: {}", accuracies.join(", ")))
}

/// Says how many tokens per forward strategies had at batch 1 that choose the number of draft tokens. `None`
/// if none was timed, or answers were not decoded in batches.
fn chosen_widths_text(results: &Results) -> Option<String> {
    let at_batch_1 = |(role, figures): (Role, &StrategyResults)| {
        let rate = ratio(figures.speed_tokens? as f64, figures.speed_forwards? as f64)?;
        figures.strategy.has_chosen_width().then(|| format!("{role} {} had {rate:.2}", figures.label))
    };
    let rates: Vec<String> = results.strategies().filter_map(at_batch_1).collect();
    let differ = results.settings.batch_size > 1 && !rates.is_empty();
    let text = "n=auto drafts less in batches, where tokens per forward were counted; at batch 1";
    differ.then(|| format!("{text}, {}", rates.join(", ")))
}

/// How the thoughts of the answers ended. `None` if that says nothing.
fn thoughts_text(figures: &StrategyResults) -> Option<String> {
    let (all, open) = (figures.thoughts?, figures.open_thoughts.unwrap_or(0));
    if all == 0 {
        return Some("no answer has a thought".to_owned());
    }
    let closed = figures
        .closed_thoughts
        .map(|closed| format!("{} of {} closed at the limit", format_whole(closed), format_count(all, "thought")));
    let open = (open > 0).then(|| format!("{} never closed, which is no answer", format_count(open, "thought")));
    let parts: Vec<String> = closed.into_iter().chain(open).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn difficulty_text(accuracy: &Accuracy) -> String {
    format!("{} of {}", format_percent(accuracy.accuracy), format_whole(accuracy.scored))
}

fn paired_text(pairs: &PairedDifference) -> String {
    let difference = pairs.difference.map_or_else(|| "-".to_owned(), format_points);
    format!(
        "accuracy, student {} − teacher {}: {difference} points{} on {}",
        pairs.student,
        pairs.teacher,
        format_interval(pairs.ci95, format_points),
        format_count(pairs.examples, "example")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_have_three_digits_and_thousands_a_comma() {
        let speeds = [None, Some(9.27), Some(123.4), Some(999.6), Some(139_584.3), Some(1_234_007.0)];
        assert_eq!(speeds.map(format_speed), ["-", "9.3", "123", "1,000", "139,584", "1,234,007"]);
    }

    #[test]
    fn counts_have_a_comma_at_thousands() {
        assert_eq!(
            [1, 999, 1319].map(|number| format_count(number, "query")),
            ["1 query", "999 queries", "1,319 queries"]
        );
        assert_eq!(format_share(1000, 1319), "1,000 of 1,319");
    }

    #[test]
    fn differences_have_a_sign() {
        assert_eq!([format_points(0.0123), format_points(-0.083)], ["+1.2", "−8.3"]);
    }
}
