//! The document of a comparison, computed from the pairs of its two sides.

use std::path::PathBuf;

use cllm_core::Result;
use cllm_core::task::{Task, Verdict};
use cllm_core::trajectory::FinishReason;
use serde::Serialize;

use super::selection::Selection;
use crate::records::{AnswerRecord, SCHEMA_VERSION};
use crate::role::Role;
use crate::speedup;
use crate::statistics::{SIGNIFICANCE_LEVEL, mcnemar, paired_difference, ratio, wilson};

/// Two sides, A and B, over the examples that both answered.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    pub schema_version: u32,
    pub benchmark: Task,
    pub split: String,
    /// What A answered, as reports call it.
    #[serde(skip)]
    pub title: String,
    pub a: Side,
    pub b: Side,
    /// Number of examples that both answered.
    pub pairs: usize,
    /// Number of examples that only A answered.
    pub unpaired_a: usize,
    /// Number of examples that only B answered.
    pub unpaired_b: usize,
    /// Number of pairs that are scored on both sides. The accuracies are computed from these.
    pub scored: usize,
    /// Number of pairs that only A answered correctly.
    pub a_only: usize,
    /// Number of pairs that only B answered correctly.
    pub b_only: usize,
    /// Accuracy of B minus that of A.
    pub difference: Option<f64>,
    /// Bonett and Price's 95 % interval of the difference.
    pub ci95: Option<[f64; 2]>,
    /// Two-sided p value of the exact McNemar test. `None` if nothing is scored.
    pub mcnemar_p: Option<f64>,
    /// Fraction of A's correct answers that B also answered correctly.
    pub correct_kept_fraction: Option<f64>,
    /// Fraction of the pairs with the same prompt that have the same tokens.
    pub equal_tokens: Option<f64>,
    /// `None` if no example was timed in both.
    pub speed: Option<SpeedComparison>,
    /// The conclusion about the accuracy, in one sentence.
    pub verdict: String,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Side {
    /// Folder of the run.
    pub run: PathBuf,
    pub role: Role,
    /// Folder of the model.
    pub checkpoint: String,
    /// The strategy with its settings, such as `rolling n=16`.
    pub strategy: String,
    /// Fraction of the scored pairs that this side answered correctly.
    pub accuracy: Option<f64>,
    /// Wilson's 95 % interval of the accuracy.
    pub ci95: Option<[f64; 2]>,
    /// Number of answers that reached the length limit.
    pub unfinished: usize,
    pub tokens_per_forward: Option<f64>,
}

/// Speed at batch 1, excluding prefill.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SpeedComparison {
    /// Number of examples timed in both.
    pub examples: usize,
    /// Whether hardware and libraries are the same. If not, the ratio also reflects the machines.
    pub same_machine: bool,
    pub a_tokens_per_second: Option<f64>,
    pub b_tokens_per_second: Option<f64>,
    /// Tokens per second of B over those of A.
    pub ratio: Option<f64>,
    /// 95 % interval of the ratio by a bootstrap over the examples. `None` for a single
    /// example.
    pub ci95: Option<[f64; 2]>,
}

impl Comparison {
    /// # Errors
    /// As [`Selection::pair_answers`].
    pub(super) fn new(a: &Selection, b: &Selection) -> Result<Self> {
        let pairs = a.pair_answers(b)?;
        let correct: Vec<(bool, bool)> = pairs
            .iter()
            .filter(|(a, b)| a.verdict != Verdict::Unscored && b.verdict != Verdict::Unscored)
            .map(|(a, b)| (a.verdict == Verdict::Correct, b.verdict == Verdict::Correct))
            .collect();
        let count = |pair: (bool, bool)| correct.iter().filter(|&&other| other == pair).count();
        let (a_only, b_only, both) = (count((true, false)), count((false, true)), count((true, true)));
        let difference = ratio(b_only as f64 - a_only as f64, correct.len() as f64);
        let mcnemar_p = (!correct.is_empty()).then(|| mcnemar(a_only, b_only));
        let (a_answers, b_answers): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
        let (a_correct, b_correct): (Vec<_>, Vec<_>) = correct.iter().copied().unzip();
        Ok(Comparison {
            schema_version: SCHEMA_VERSION,
            benchmark: a.header().benchmark,
            split: a.header().split.clone(),
            title: a.header().settings.title(a.header().benchmark, &a.header().split),
            a: Side::new(a, &a_answers, &a_correct),
            b: Side::new(b, &b_answers, &b_correct),
            pairs: pairs.len(),
            unpaired_a: a.num_answers() - pairs.len(),
            unpaired_b: b.num_answers() - pairs.len(),
            scored: correct.len(),
            a_only,
            b_only,
            difference,
            ci95: paired_difference(b_only, a_only, correct.len()),
            mcnemar_p,
            correct_kept_fraction: ratio(both as f64, (both + a_only) as f64),
            equal_tokens: equal_tokens(&pairs),
            speed: SpeedComparison::new(a, b),
            verdict: verdict(difference, mcnemar_p),
        })
    }
}

impl Side {
    /// `answers` are those of the pairs; `correct` says which of the scored ones are correct.
    fn new(selection: &Selection, answers: &[&AnswerRecord], correct: &[bool]) -> Self {
        let num_correct = correct.iter().filter(|&&correct| correct).count();
        let tokens: usize = answers.iter().map(|answer| answer.num_decoded_tokens()).sum();
        let forwards: usize = answers.iter().map(|answer| answer.forwards).sum();
        let model = selection.header().model(selection.role);
        Side {
            run: selection.run.clone(),
            role: selection.role,
            checkpoint: model.map(|model| model.path.clone()).unwrap_or_default(),
            strategy: selection.strategy.to_string(),
            accuracy: ratio(num_correct as f64, correct.len() as f64),
            ci95: wilson(num_correct, correct.len()),
            unfinished: answers.iter().filter(|answer| answer.finish_reason == FinishReason::Length).count(),
            tokens_per_forward: ratio(tokens as f64, forwards as f64),
        }
    }
}

/// Second turns of MT-bench have different prompts if the answers to the first turn differ. Only
/// answers to the same prompt count.
fn equal_tokens(pairs: &[(&AnswerRecord, &AnswerRecord)]) -> Option<f64> {
    let same_prompt = || pairs.iter().filter(|(a, b)| a.prompt == b.prompt);
    let num_equal = same_prompt().filter(|(a, b)| a.response_ids == b.response_ids).count();
    ratio(num_equal as f64, same_prompt().count() as f64)
}

impl SpeedComparison {
    fn new(a: &Selection, b: &Selection) -> Option<Self> {
        let pairs = a.pair_speeds(b);
        if pairs.is_empty() {
            return None;
        }
        let [a_tokens_per_second, b_tokens_per_second] = speedup::tokens_per_second(&pairs);
        let (header_a, header_b) = (a.header(), b.header());
        Some(SpeedComparison {
            examples: pairs.len(),
            same_machine: (&header_a.hardware, &header_a.toolkit) == (&header_b.hardware, &header_b.toolkit),
            a_tokens_per_second,
            b_tokens_per_second,
            ratio: ratio(b_tokens_per_second, a_tokens_per_second),
            ci95: speedup::interval(&pairs),
        })
    }
}

fn verdict(difference: Option<f64>, p: Option<f64>) -> String {
    match (difference, p) {
        (Some(difference), Some(p)) if p < SIGNIFICANCE_LEVEL => {
            let word = if difference > 0.0 { "more" } else { "less" };
            format!("B is significantly {word} accurate than A (McNemar, p = {})", format_p(p))
        }
        (_, Some(p)) => format!("no significant difference in accuracy (McNemar, p = {})", format_p(p)),
        _ => "no answer was scored in both: nothing can be said about accuracy".to_owned(),
    }
}

/// Formats a p value with two decimals, or four if it is small.
fn format_p(p: f64) -> String {
    if p < 0.01 { format!("{p:.4}") } else { format!("{p:.2}") }
}
