//! Several runs beside one another, a row each.

use cllm_core::decode::Strategy;

use super::Run;
use super::card::best;
use crate::results::StrategyResults;
use crate::role::Role;
use crate::table::{format_accuracy, format_number};

/// Heads of the columns; the first two name the row and its strategy.
pub(super) const HEADS: [&str; 7] = [
    "run",
    "strategy",
    "accuracy (95 %)",
    "teacher AR accuracy (95 %)",
    "unfinished",
    "tokens/forward, finished only",
    "vs teacher AR",
];

/// A row for each run; none where there is one run alone, whose own table says it all.
pub(super) fn rows(runs: &[Run]) -> Vec<Vec<String>> {
    if runs.len() < 2 { Vec::new() } else { runs.iter().map(row).collect() }
}

fn row(run: &Run) -> Vec<String> {
    let results = &run.results;
    let teacher = results.models.iter().find(|model| model.model.role == Role::Teacher);
    let ar = teacher.and_then(|model| model.strategies.iter().find(|found| found.strategy == Strategy::Ar));
    let found = best(results);
    let of = |figure: &dyn Fn(&StrategyResults) -> String| {
        found.map_or_else(|| "-".to_owned(), |(_, strategy)| figure(strategy))
    };
    vec![
        run.title.clone(),
        found.map_or_else(|| "-".to_owned(), |(role, strategy)| format!("{} {}", role.name(), strategy.label)),
        of(&|strategy| format_accuracy(strategy.accuracy, strategy.ci95)),
        ar.map_or_else(|| "-".to_owned(), |strategy| format_accuracy(strategy.accuracy, strategy.ci95)),
        of(&|strategy| format!("{} of {}", strategy.unfinished, strategy.examples)),
        of(&|strategy| format_number(strategy.tokens_per_forward_finished, 2, "")),
        of(&|strategy| format_number(strategy.speedup_vs_teacher_ar, 2, "x")),
    ]
}
