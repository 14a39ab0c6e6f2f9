//! The verdict on an answer, which every benchmark gives, and the second verdict of the benchmarks
//! that have two rules of what is correct.

use serde::{Deserialize, Serialize};

/// The score of one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Correct,
    /// Incorrect, or no answer could be extracted.
    Incorrect,
    /// There is nothing to score the answer with.
    Unscored,
}

impl Verdict {
    pub(super) fn from_correct(is_correct: bool) -> Self {
        if is_correct { Verdict::Correct } else { Verdict::Incorrect }
    }

    /// What is left of the verdict when the answer did not reach its end.
    fn of_cut_answer(self) -> Self {
        if self == Verdict::Correct { Verdict::Incorrect } else { self }
    }
}

/// A rule of what is correct, of a benchmark that has two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// GSM8K: the final number, however the answer writes it.
    FinalNumber,
    /// GSM8K: the official extraction.
    Strict,
    /// Spider: `DISTINCT` is taken out of both queries.
    IgnoreDistinct,
    /// Spider: the queries run as they are.
    KeepDistinct,
}

impl Metric {
    /// The benchmark's other rule.
    pub fn counterpart(self) -> Self {
        match self {
            Metric::FinalNumber => Metric::Strict,
            Metric::Strict => Metric::FinalNumber,
            Metric::IgnoreDistinct => Metric::KeepDistinct,
            Metric::KeepDistinct => Metric::IgnoreDistinct,
        }
    }

    /// The rule in words, for reports.
    pub fn description(self) -> &'static str {
        match self {
            Metric::FinalNumber => "by the final number",
            Metric::Strict => "by the official extraction",
            Metric::IgnoreDistinct => "with DISTINCT ignored",
            Metric::KeepDistinct => "with DISTINCT kept",
        }
    }
}

/// The verdict by the rule that accuracy does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alternative {
    pub metric: Metric,
    pub verdict: Verdict,
}

/// What a benchmark says about one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Score {
    /// The verdict that accuracy counts.
    pub verdict: Verdict,
    /// `None` if the benchmark has one rule.
    pub alternative: Option<Alternative>,
}

impl From<Verdict> for Score {
    fn from(verdict: Verdict) -> Self {
        Score { verdict, alternative: None }
    }
}

impl Score {
    /// `metric` is the rule of the second verdict.
    pub(super) fn with_alternative(verdict: Verdict, metric: Metric, alternative: Verdict) -> Self {
        Score { verdict, alternative: Some(Alternative { metric, verdict: alternative }) }
    }

    /// The score of an answer that did not reach its end, or whose thought never closed: it is
    /// correct by no rule.
    pub(super) fn of_cut_answer(self) -> Self {
        let cut =
            |alternative: Alternative| Alternative { verdict: alternative.verdict.of_cut_answer(), ..alternative };
        Score { verdict: self.verdict.of_cut_answer(), alternative: self.alternative.map(cut) }
    }
}
