//! The cleaning rules, in the order in which they apply: a row is dropped by the first rule that it
//! breaks.
//!
//! To add a rule, add an entry to [`RULES`] and, if it can be tuned, a field to [`Settings`] and
//! its default. The rules here see one row at a time; duplicates, which only the whole data set
//! shows, are found in `clean` itself.

use std::cell::Cell;

use cllm_core::Result;
use cllm_core::task::Verdict;
use cllm_core::trajectory::{FinishReason, Trajectory};

use super::evaluation_prompts::EvaluationPrompts;
use super::repetition::{has_periodic_tail, has_repeated_sentence, has_token_run, repeated_ngram_fraction};
use super::settings::Settings;
use crate::scoring::Scorer;

/// A reason to drop a row.
pub(super) struct Rule {
    /// Name in the report and in `dropped.jsonl`.
    pub(super) name: &'static str,
    /// What the rows are, in messages: `3 unfinished`.
    pub(super) adjective: &'static str,
    /// How a user keeps the rows that the rule drops, if it is not obvious.
    pub(super) advice: Option<&'static str>,
    is_broken: fn(&Candidate<'_>) -> Result<bool>,
}

pub(super) const RULES: [Rule; 9] = [
    Rule {
        name: "empty",
        adjective: "empty",
        advice: None,
        is_broken: |candidate| Ok(candidate.text.trim().is_empty()),
    },
    Rule {
        name: "evaluation_prompt",
        adjective: "among the evaluation prompts",
        advice: None,
        is_broken: |candidate| Ok(candidate.is_evaluation_prompt()),
    },
    Rule {
        name: "unfinished_thought",
        adjective: "with a thought that never closed",
        advice: Some("set max_thinking_tokens in collect, or drop_unfinished=false"),
        is_broken: |candidate| {
            Ok(candidate.settings().drop_unfinished && candidate.context.scorer.ends_inside_thought(candidate.row))
        },
    },
    Rule {
        name: "unfinished",
        adjective: "unfinished",
        advice: Some("raise max_new_tokens of collect, or drop_unfinished=false"),
        is_broken: |candidate| {
            Ok(candidate.settings().drop_unfinished && candidate.row.finish_reason == FinishReason::Length)
        },
    },
    Rule {
        name: "token_run",
        adjective: "with a run of one token",
        advice: None,
        is_broken: |candidate| Ok(has_token_run(candidate.ids, candidate.settings().token_run)),
    },
    Rule {
        name: "repeated_4grams",
        adjective: "with many repeated 4-grams",
        advice: None,
        is_broken: |candidate| Ok(repeated_ngram_fraction(candidate.ids, 4) > candidate.settings().repeated_4grams),
    },
    Rule {
        name: "periodic_tail",
        adjective: "ending in a loop",
        advice: None,
        is_broken: |candidate| Ok(has_periodic_tail(candidate.ids, 64, candidate.settings().periodic_tail)),
    },
    Rule {
        name: "repeated_sentence",
        adjective: "with a repeated sentence",
        advice: None,
        is_broken: |candidate| {
            Ok(has_repeated_sentence(candidate.text, 12, candidate.settings().repeated_sentence, 64))
        },
    },
    Rule {
        name: "incorrect_answer",
        adjective: "incorrect",
        advice: None,
        is_broken: |candidate| Ok(candidate.settings().drop_incorrect && candidate.verdict()? == Verdict::Incorrect),
    },
];

/// Name of the rule that drops a row if an earlier row with the same prompt was kept. `clean`
/// applies it last.
pub(super) const DUPLICATE: &str = "duplicate";

/// What the rules need besides a row.
pub(super) struct RuleContext<'c> {
    pub(super) settings: &'c Settings,
    pub(super) scorer: Scorer<'c>,
    pub(super) evaluation_prompts: EvaluationPrompts,
}

/// A row that the rules look at.
pub(super) struct Candidate<'c> {
    row: &'c Trajectory,
    /// The decoded response.
    text: &'c str,
    /// The response without its EOS: a loop that ends properly is still a loop.
    ids: &'c [i32],
    prompt_hash: u128,
    context: &'c RuleContext<'c>,
    /// The verdict, once a rule has asked for it: scoring may execute queries.
    verdict: Cell<Option<Verdict>>,
}

impl<'c> Candidate<'c> {
    pub(super) fn new(row: &'c Trajectory, text: &'c str, prompt_hash: u128, context: &'c RuleContext<'c>) -> Self {
        let ids = match row.finish_reason {
            FinishReason::Eos => &row.response_ids[..row.response_ids.len().saturating_sub(1)],
            FinishReason::Length => &row.response_ids,
        };
        Candidate { row, text, ids, prompt_hash, context, verdict: Cell::new(None) }
    }

    /// The first rule that the row breaks.
    pub(super) fn broken_rule(&self) -> Result<Option<&'static str>> {
        for rule in &RULES {
            if (rule.is_broken)(self)? {
                return Ok(Some(rule.name));
            }
        }
        Ok(None)
    }

    /// Whether a rule asked for the verdict and the task could not give one.
    pub(super) fn is_unscored(&self) -> bool {
        self.verdict.get() == Some(Verdict::Unscored)
    }

    fn settings(&self) -> &Settings {
        self.context.settings
    }

    fn is_evaluation_prompt(&self) -> bool {
        self.context.evaluation_prompts.contain(self.row, self.prompt_hash)
    }

    fn verdict(&self) -> Result<Verdict> {
        if let Some(verdict) = self.verdict.get() {
            return Ok(verdict);
        }
        let verdict = self.context.scorer.score_text(self.row, self.text)?;
        self.verdict.set(Some(verdict));
        Ok(verdict)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reference_names_every_rule_in_order() {
        let page = include_str!("../../../docs/data-format.md");
        let names = RULES.iter().map(|rule| rule.name).chain([DUPLICATE]);
        let list = names.map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        assert!(page.contains(&list), "docs/data-format.md lacks: {list}");
    }
}
