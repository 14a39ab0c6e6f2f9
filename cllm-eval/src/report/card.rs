//! The headline of a run: its fastest strategy against the teacher's autoregressive answers.

use cllm_core::decode::Strategy;
use serde::Serialize;

use super::Run;
use crate::results::{Results, StrategyResults};
use crate::role::Role;
use crate::table::{format_accuracy, format_number, notes};

/// What stands on a card.
#[derive(Debug, Serialize)]
pub(super) struct Card {
    /// The benchmark and split.
    title: String,
    /// The figure.
    figure: String,
    /// What it is.
    caption: String,
    /// What it cost.
    lines: Vec<String>,
}

/// The fastest strategy that takes several tokens a forward, of the student, or of the only model; without timings that of
/// most tokens per forward.
pub(super) fn best(results: &Results) -> Option<(Role, &StrategyResults)> {
    let model = results.models.iter().find(|model| model.model.role == Role::Student).or(results.models.first())?;
    let several = model.strategies.iter().filter(|found| found.strategy != Strategy::Ar);
    let speed = |found: &StrategyResults| (found.tokens_per_second, found.tokens_per_forward);
    let fastest = several.max_by(|a, b| speed(a).partial_cmp(&speed(b)).unwrap_or(std::cmp::Ordering::Equal));
    fastest.or(model.strategies.first()).map(|found| (model.model.role, found))
}

impl Card {
    pub(super) fn of(run: &Run) -> Option<Self> {
        let (results, title) = (&run.results, run.title.clone());
        let Some((role, found)) = best(results) else {
            let model = results.models.last()?;
            let (figure, caption) = (format!("{:.2}", model.perplexity.as_ref()?.value), model.model.role.name());
            let caption = format!("perplexity of the {caption}");
            return Some(Card { title, figure, caption, lines: notes(results) });
        };
        let name = format!("{} {}", role.name(), found.label);
        let (figure, caption) = match (found.speedup_vs_teacher_ar, found.tokens_per_second) {
            (Some(ratio), _) => (format!("{ratio:.2}x"), format!("as fast as the teacher's AR: {name}")),
            (None, Some(rate)) => (format!("{rate:.0}"), format!("tokens/s at batch 1: {name}")),
            (None, None) => (format_number(found.tokens_per_forward, 2, ""), format!("tokens per forward: {name}")),
        };
        let points = |value: f64| format!("{:+.1}", 100.0 * value);
        let difference = results.paired.iter().find(|pair| role == Role::Student && pair.student == found.label);
        let cost = difference.and_then(|pair| {
            let [low, high] = pair.ci95?;
            let value = points(pair.difference?);
            Some(format!("accuracy {value} points (95 %: {} to {}) against the teacher", points(low), points(high)))
        });
        let own = (found.scored > 0).then(|| format!("accuracy {}", format_accuracy(found.accuracy, found.ci95)));
        let lines = [
            cost,
            own,
            found.tokens_per_forward_finished.map(|tpf| format!("{tpf:.2} tokens per forward in answers that ended")),
            Some(unfinished(results, role, found)),
            Some(results.hardware.summary()),
        ];
        Some(Card { title, figure, caption, lines: lines.into_iter().flatten().collect() })
    }
}

fn unfinished(results: &Results, role: Role, found: &StrategyResults) -> String {
    let own = format!("{} of {} answers unfinished", found.unfinished, found.examples);
    let teacher = results.models.iter().find(|model| model.model.role == Role::Teacher && role == Role::Student);
    let ar = teacher.and_then(|model| model.strategies.iter().find(|strategy| strategy.strategy == Strategy::Ar));
    ar.map_or(own.clone(), |ar| format!("{own} (teacher: {})", ar.unfinished))
}
