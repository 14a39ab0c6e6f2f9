//! Selectors of a model and a strategy: `student/rolling n=16`, or only one of the two.

use std::result::Result;

use cllm_core::decode::Strategy;

use crate::results::{Results, StrategyResults, fastest};
use crate::role::Role;

/// The answers to select where a selector names no role or strategy.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum DefaultChoice {
    /// The teacher's autoregressive answers.
    Baseline,
    /// The student's fastest strategy.
    Fastest,
}

/// The parts of a selector that are given.
struct Selector<'t> {
    role: Option<Role>,
    /// Name of a strategy, with or without its settings.
    strategy: Option<&'t str>,
}

impl<'t> Selector<'t> {
    fn parse(text: Option<&'t str>) -> Result<Self, String> {
        let Some(text) = text else { return Ok(Selector { role: None, strategy: None }) };
        match text.split_once('/') {
            Some((name, strategy)) => {
                let role = Role::from_name(name).ok_or_else(|| format!("`{name}` is neither teacher nor student"))?;
                Ok(Selector { role: Some(role), strategy: Some(strategy) })
            }
            None => {
                let role = Role::from_name(text);
                Ok(Selector { role, strategy: if role.is_some() { None } else { Some(text) } })
            }
        }
    }
}

/// Finds the role and strategy that a selector names. `default` decides what the selector leaves
/// open; if several strategies match, the fastest is chosen.
///
/// # Errors
/// A description of the problem.
pub(super) fn select(
    results: &Results,
    text: Option<&str>,
    default: DefaultChoice,
) -> Result<(Role, Strategy), String> {
    let selector = Selector::parse(text)?;
    let has_answers = |role: Role| answered(results).any(|(other, _)| other == role);
    let preferred = match default {
        DefaultChoice::Baseline => [Role::Teacher, Role::Student],
        DefaultChoice::Fastest => [Role::Student, Role::Teacher],
    };
    let role = selector.role.or_else(|| preferred.into_iter().find(|&role| has_answers(role)));
    let role = role.ok_or("has no answers")?;
    let is_baseline = default == DefaultChoice::Baseline && selector.strategy.is_none();
    let ar_role = results.model(role).map(|model| model.model.autoregressive_role());
    let role = ar_role.filter(|_| is_baseline).unwrap_or(role);
    let matches = |figures: &StrategyResults| match selector.strategy {
        Some(name) => figures.name == name || figures.label == name,
        None => default == DefaultChoice::Fastest || figures.strategy == Strategy::Ar,
    };
    let candidates = answered(results).filter(|&(other, figures)| other == role && matches(figures));
    match fastest(candidates.map(|(_, figures)| figures)) {
        Some(figures) => Ok((role, figures.strategy)),
        None => Err(format!("has no answers of {role}/{}", selector.strategy.unwrap_or("ar"))),
    }
}

/// Every role and strategy with answers.
pub(super) fn answered(results: &Results) -> impl Iterator<Item = (Role, &StrategyResults)> {
    results.strategies().filter(|(_, figures)| figures.examples > 0)
}
