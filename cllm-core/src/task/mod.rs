//! Benchmarks, one file each: load, prompt, score; used for prompts, cleaning and evaluation alike.

mod codesearchnet;
mod gsm8k;
mod humaneval;
mod jsonl;
mod mbpp;
mod mt_bench;
mod perplexity;
mod python;
mod spider;
mod sql;
pub mod synthetic;

pub use jsonl::Scorer;
pub use python::extract_code;

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::prompt_set::{self, Sample};
use crate::sandbox::Sandbox;
use crate::trajectory::FinishReason;

/// A benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// Grade-school maths (Cobbe et al., arXiv 2110.14168).
    Gsm8k,
    /// Text to SQL (Yu et al., arXiv 1809.08887), scored by execution.
    Spider,
    /// Python functions (Chen et al., arXiv 2107.03374), scored by running them where that was asked for.
    Humaneval,
    /// Python functions (Austin et al., arXiv 2108.07732), scored by running them where that was asked for.
    Mbpp,
    /// Questions of two turns (Zheng et al., arXiv 2306.05685); not scored: the answers are written for a judge.
    #[serde(rename = "mt-bench")]
    MtBench,
    /// Python functions from their docstrings (Husain et al., arXiv 1909.09436); compared with the reference, not scored.
    Codesearchnet,
    /// Texts, which the models are measured on and do not answer.
    Perplexity,
    /// Any prompts with an exact answer.
    Jsonl,
    /// Word problems and SQL made by this project from a seed.
    Synthetic,
}

/// The verdict on one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Right.
    Correct,
    /// Wrong, or no answer found.
    Incorrect,
    /// The sample has nothing to score against.
    Unscored,
}

impl Verdict {
    fn of(right: bool) -> Self {
        if right { Verdict::Correct } else { Verdict::Incorrect }
    }
}

/// What scoring has at hand beside the sample.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScoreContext<'a> {
    /// The benchmark's folder, in which Spider has its databases: without it Spider is [`Verdict::Unscored`].
    pub data: Option<&'a Path>,
    /// Where the code of answers runs: without it HumanEval and MBPP are [`Verdict::Unscored`].
    pub sandbox: Option<&'a Sandbox>,
}

impl Task {
    /// Every task.
    pub const ALL: [Task; 9] = [
        Task::Gsm8k,
        Task::Spider,
        Task::Humaneval,
        Task::Mbpp,
        Task::MtBench,
        Task::Codesearchnet,
        Task::Perplexity,
        Task::Jsonl,
        Task::Synthetic,
    ];

    /// Its name in prompts' sources and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Task::Gsm8k => "gsm8k",
            Task::Spider => "spider",
            Task::Humaneval => "humaneval",
            Task::Mbpp => "mbpp",
            Task::MtBench => "mt-bench",
            Task::Codesearchnet => "codesearchnet",
            Task::Perplexity => "perplexity",
            Task::Jsonl => prompt_set::DEFAULT_SOURCE,
            Task::Synthetic => "synthetic",
        }
    }

    /// What it needs, in one line.
    pub fn expected_data(self) -> &'static str {
        match self {
            Task::Gsm8k => "a folder with train.jsonl and test.jsonl of grade-school-math",
            Task::Spider => "a folder with train_spider.json, dev.json, tables.json and database/ of Spider",
            Task::Humaneval => "a folder with HumanEval.jsonl.gz, packed or not",
            Task::Mbpp => "a folder with mbpp.jsonl or sanitized-mbpp.json",
            Task::MtBench => "a folder with question.jsonl of FastChat",
            Task::Codesearchnet => "a folder with python.jsonl of CodeSearchNet, or with a file a split",
            Task::Perplexity => "a .txt file, a .jsonl file with `text`, or a folder of them",
            Task::Jsonl => "a JSONL or Parquet file of prompts; the answer is compared with `reference`",
            Task::Synthetic => "nothing: it is made from a seed",
        }
    }

    /// The task of a prompt's `source` (`gsm8k/test`), by its first part; [`Task::Jsonl`] for what is none of ours.
    pub fn from_source(source: &str) -> Task {
        let name = source.split('/').next().unwrap_or_default();
        Task::ALL.into_iter().find(|task| task.name() == name).unwrap_or(Task::Jsonl)
    }

    /// Whether the benchmark has no split but test.
    pub fn has_only_test_split(self) -> bool {
        matches!(self, Task::Humaneval | Task::MtBench)
    }

    /// Reads one split of the benchmark's files in `data`.
    ///
    /// # Errors
    /// When a file is missing or a row is not as expected.
    pub fn load(self, data: &Path, split: &str) -> Result<Vec<Sample>> {
        match self {
            Task::Gsm8k => gsm8k::load(data, split),
            Task::Spider => spider::load(data, split),
            Task::Humaneval => humaneval::load(data, split),
            Task::Mbpp => mbpp::load(data, split),
            Task::MtBench => mt_bench::load(data, split),
            Task::Codesearchnet => codesearchnet::load(data, split),
            Task::Perplexity => perplexity::load(data, split),
            Task::Jsonl => prompt_set::read_with_generated_ids(data),
            Task::Synthetic => Ok(synthetic::generate(0, split, synthetic::DEFAULT_NUM_PROBLEMS)),
        }
    }

    /// Whether its answers are scored by running the code in them.
    pub fn runs_code(self) -> bool {
        matches!(self, Task::Humaneval | Task::Mbpp)
    }

    /// Refuses a sample that [`Task::score`] could not score, for want of a file or of tests or for a broken pattern: for use before
    /// there are answers to lose.
    ///
    /// # Errors
    /// As [`Task::score`].
    pub fn check_scorable(self, judge: ScoreContext<'_>, sample: &Sample) -> Result<()> {
        match (self, judge) {
            (Task::Spider, ScoreContext { data: Some(data), .. }) => spider::database(data, sample).map(drop),
            (Task::Humaneval, ScoreContext { sandbox: Some(_), .. }) => {
                python::meta::<humaneval::Tests>(sample).map(drop)
            }
            (Task::Mbpp, ScoreContext { sandbox: Some(_), .. }) => python::meta::<mbpp::Tests>(sample).map(drop),
            (Task::Jsonl, _) => jsonl::check(sample),
            _ => Ok(()),
        }
    }

    /// The verdict on an answer to `sample`; a broken answer is [`Verdict::Incorrect`]. So is one that was cut at the length limit,
    /// whatever stands in it: it gave no answer, and a number or query that happens to be its last would be luck.
    ///
    /// # Errors
    /// Only when scoring itself is impossible: a database is missing, the sample's `meta` lacks what it needs, code cannot be run.
    pub fn score(
        self,
        judge: ScoreContext<'_>,
        sample: &Sample,
        answer: &str,
        finish_reason: FinishReason,
    ) -> Result<Verdict> {
        let verdict = self.score_complete(judge, sample, answer)?;
        let cut = finish_reason == FinishReason::Length;
        Ok(if cut && verdict == Verdict::Correct { Verdict::Incorrect } else { verdict })
    }

    fn score_complete(self, judge: ScoreContext<'_>, sample: &Sample, answer: &str) -> Result<Verdict> {
        let Some(reference) = &sample.reference else { return Ok(Verdict::Unscored) };
        match (self, judge) {
            (Task::Gsm8k, _) => Ok(Verdict::of(gsm8k::is_right(reference, answer))),
            (Task::Jsonl, _) => jsonl::is_right(sample, reference, answer).map(Verdict::of),
            (Task::Synthetic, _) => synthetic::score(sample, reference, answer),
            (Task::Spider, ScoreContext { data: Some(data), .. }) => spider::score(data, sample, reference, answer),
            (Task::Humaneval, ScoreContext { sandbox: Some(sandbox), .. }) => humaneval::score(sandbox, sample, answer),
            (Task::Mbpp, ScoreContext { sandbox: Some(sandbox), .. }) => mbpp::score(sandbox, sample, answer),
            (Task::Spider | Task::Humaneval | Task::Mbpp, _) => Ok(Verdict::Unscored),
            (Task::MtBench | Task::Codesearchnet | Task::Perplexity, _) => Ok(Verdict::Unscored),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt_set::Prompt;

    #[test]
    fn an_answer_that_was_cut_is_never_right() {
        let sample = |reference: Option<&str>| Sample {
            id: "a".to_owned(),
            source: "jsonl/test".to_owned(),
            prompt: Prompt::question("What is 1 and 1?"),
            reference: reference.map(str::to_owned),
            meta: None,
        };
        let judge = |reference: Option<&str>, answer: &str, finish_reason| {
            Task::Jsonl.score(ScoreContext::default(), &sample(reference), answer, finish_reason).unwrap()
        };
        assert_eq!(judge(Some("2"), "2", FinishReason::Eos), Verdict::Correct);
        assert_eq!(judge(Some("2"), "2", FinishReason::Length), Verdict::Incorrect);
        assert_eq!(judge(Some("2"), "3", FinishReason::Length), Verdict::Incorrect);
        assert_eq!(judge(None, "2", FinishReason::Length), Verdict::Unscored);
    }
}
