//! The first tables of a report on several runs: the fastest strategy of each.

use serde::Serialize;

use super::model_card::model_name;
use super::run::Run;
use crate::results::{ModelResults, Results};
use crate::role::Role;
use crate::table::{format_accuracy, format_number, format_share, format_speedup};

/// Column heads. The first two columns name the run and its strategy.
pub(super) const HEADS: [&str; 7] = [
    "run",
    "strategy",
    "accuracy (95 %)",
    "speed-up (95 %)",
    "accuracy of the baseline (95 %)",
    "tokens per forward, finished answers",
    "unfinished",
];

/// Runs whose speed-ups are over the same model's autoregressive decoding.
#[derive(Debug, Serialize)]
pub(super) struct Overview {
    /// What the table shows, and what its speed-ups are over.
    caption: String,
    /// One row per run.
    rows: Vec<Vec<String>>,
}

/// One table for each baseline, so that no two ratios of a table are to different ones. Empty for a
/// single run, because its own table shows the same.
pub(super) fn tables(runs: &[Run]) -> Vec<Overview> {
    if runs.len() < 2 {
        return Vec::new();
    }
    let mut groups: Vec<(Option<&str>, Vec<&Run>)> = Vec::new();
    for run in runs {
        let baseline = run.results.baseline().map(|(model, _)| model.fingerprint.as_str());
        match groups.iter_mut().find(|(other, _)| *other == baseline) {
            Some((_, group)) => group.push(run),
            None => groups.push((baseline, vec![run])),
        }
    }
    // Two baselines may have one name, such as a teacher that was trained twice.
    let names: Vec<Option<String>> = groups.iter().map(|(_, group)| baseline_name(group)).collect();
    let is_shared = |name: &Option<String>| names.iter().filter(|other| *other == name).count() > 1;
    let tables = groups.iter().zip(&names).map(|((fingerprint, group), name)| {
        let own_fingerprint = fingerprint.filter(|_| is_shared(name));
        Overview::new(group, name.as_deref(), own_fingerprint)
    });
    tables.collect()
}

fn baseline_name(runs: &[&Run]) -> Option<String> {
    let (model, _) = runs.first()?.results.baseline()?;
    Some(format!("{} {}", model.role, model_name(model)))
}

impl Overview {
    fn new(runs: &[&Run], baseline: Option<&str>, fingerprint: Option<&str>) -> Self {
        let over = baseline.map_or_else(String::new, |name| {
            let weights = fingerprint.map_or_else(String::new, |fingerprint| format!(" (weights {fingerprint})"));
            format!("; speed-ups are at batch 1, over autoregressive decoding of the {name}{weights}")
        });
        Overview {
            caption: format!(
                "The fastest strategy of each run among those that accept several tokens per forward{over}"
            ),
            rows: runs.iter().map(|run| row(run)).collect(),
        }
    }
}

fn row(run: &Run) -> Vec<String> {
    let results: &Results = &run.results;
    let or_dash = |cell: Option<String>| cell.unwrap_or_else(|| "-".to_owned());
    let fastest = results.headline();
    let teacher = results.model(Role::Teacher).and_then(ModelResults::autoregressive);
    let speedup = fastest.map(|(_, strategy)| results.speedup(strategy));
    vec![
        run.title.clone(),
        or_dash(fastest.map(|(role, strategy)| format!("{role} {}", strategy.label))),
        or_dash(fastest.map(|(_, strategy)| format_accuracy(strategy.accuracy, strategy.ci95))),
        or_dash(speedup.map(|(ratio, ci95)| format_speedup(ratio, ci95))),
        or_dash(teacher.map(|strategy| format_accuracy(strategy.accuracy, strategy.ci95))),
        format_number(fastest.and_then(|(_, strategy)| strategy.tokens_per_forward_finished), 2, ""),
        or_dash(fastest.map(|(_, strategy)| format_share(strategy.unfinished, strategy.examples))),
    ]
}
