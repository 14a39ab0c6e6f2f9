//! The first table of a report on several runs: the fastest strategy of each.

use super::run::Run;
use crate::results::ModelResults;
use crate::role::Role;
use crate::table::{format_accuracy, format_number};

/// Column heads. The first two columns name the run and its strategy.
pub(super) const HEADS: [&str; 7] = [
    "run",
    "strategy",
    "accuracy (95 %)",
    "teacher AR accuracy (95 %)",
    "unfinished",
    "tokens/forward, finished answers",
    "speed-up over teacher AR",
];

/// One row per run. Empty for a single run, because its own table shows the same.
pub(super) fn rows(runs: &[Run]) -> Vec<Vec<String>> {
    if runs.len() < 2 { Vec::new() } else { runs.iter().map(row).collect() }
}

fn row(run: &Run) -> Vec<String> {
    let results = &run.results;
    let or_dash = |cell: Option<String>| cell.unwrap_or_else(|| "-".to_owned());
    let fastest = results.headline();
    let teacher = results.model(Role::Teacher).and_then(ModelResults::autoregressive);
    vec![
        run.title.clone(),
        or_dash(fastest.map(|(role, strategy)| format!("{role} {}", strategy.label))),
        or_dash(fastest.map(|(_, strategy)| format_accuracy(strategy.accuracy, strategy.ci95))),
        or_dash(teacher.map(|strategy| format_accuracy(strategy.accuracy, strategy.ci95))),
        or_dash(fastest.map(|(_, strategy)| format!("{} of {}", strategy.unfinished, strategy.examples))),
        format_number(fastest.and_then(|(_, strategy)| strategy.tokens_per_forward_finished), 2, ""),
        format_number(fastest.and_then(|(_, strategy)| strategy.speedup_vs_teacher_ar), 2, "x"),
    ]
}
