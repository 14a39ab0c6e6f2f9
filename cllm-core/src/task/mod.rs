//! Benchmarks, one file each: how its published files become prompts, and how an answer is scored.
//! Collection, cleaning, training and evaluation all score here, so that they agree on what is
//! correct.

mod answer;
mod codesearchnet;
mod gsm8k;
mod humaneval;
mod jsonl;
mod mbpp;
mod mt_bench;
mod number;
mod perplexity;
mod python;
mod spider;
mod sql;
pub mod synthetic;
mod verdict;

pub use jsonl::Scorer;
pub use python::compared_code;
pub use verdict::{Alternative, Metric, Score, Verdict};

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::prompt_set::{self, Sample};
use crate::sandbox::Sandbox;
use crate::thought_text::without_thought;
use crate::trajectory::FinishReason;
use crate::{Error, Result};

/// A benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// Grade-school word problems (Cobbe et al., arXiv 2110.14168).
    Gsm8k,
    /// Text to SQL (Yu et al., arXiv 1809.08887), scored by execution.
    Spider,
    /// Python functions (Chen et al., arXiv 2107.03374), scored by running their tests if code may
    /// be executed.
    Humaneval,
    /// Python functions (Austin et al., arXiv 2108.07732), scored by running their tests if code
    /// may be executed.
    Mbpp,
    /// Questions with two turns (Zheng et al., arXiv 2306.05685); not scored: a judge model reads
    /// the answers.
    #[serde(rename = "mt-bench")]
    MtBench,
    /// Python functions from their docstrings (Husain et al., arXiv 1909.09436); compared with the
    /// reference, not scored.
    Codesearchnet,
    /// Texts that the models read; reports their perplexity.
    Perplexity,
    /// Any prompts, with an optional reference.
    Jsonl,
    /// Word problems and SQL, generated from a seed.
    Synthetic,
}

/// The inputs of scoring other than the sample and the answer.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScoreContext<'a> {
    /// The benchmark's folder with the databases of Spider, whose answers are [`Verdict::Unscored`]
    /// without it.
    pub data: Option<&'a Path>,
    /// Runs the code of answers to HumanEval and MBPP, which are [`Verdict::Unscored`] without it.
    pub sandbox: Option<&'a Sandbox>,
    /// Whether the verdicts on Spider's answers keep `DISTINCT`, which the official judge ignores
    /// unless told otherwise. The other verdict is the alternative.
    pub keep_distinct: bool,
}

impl Task {
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

    /// The name in prompts' sources and on the command line.
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

    /// The files that [`Task::load`] reads, in one line for messages.
    pub fn expected_data(self) -> &'static str {
        match self {
            Task::Gsm8k => "a folder with train.jsonl and test.jsonl of grade-school-math",
            Task::Spider => "a folder with train_spider.json, dev.json, tables.json and database/ of Spider",
            Task::Humaneval => "a folder with HumanEval.jsonl.gz or HumanEval.jsonl",
            Task::Mbpp => "a folder with mbpp.jsonl or sanitized-mbpp.json",
            Task::MtBench => "a folder with question.jsonl of FastChat",
            Task::Codesearchnet => "a folder with python.jsonl of CodeSearchNet, or with one file per split",
            Task::Perplexity => "a .txt file, a .jsonl file with `text`, or a folder of them",
            Task::Jsonl => "a JSONL, JSON or Parquet file of prompts or chats; the answer is compared with `reference`",
            Task::Synthetic => "nothing: it is generated from a seed",
        }
    }

    /// The task with this name.
    pub fn from_name(name: &str) -> Option<Task> {
        Task::ALL.into_iter().find(|task| task.name() == name)
    }

    /// The task that a prompt's `source` names as TASK/SPLIT, such as `gsm8k/test`; [`Task::Jsonl`]
    /// for any other source. A name alone is where people say that their rows come from.
    pub fn from_source(source: &str) -> Task {
        source.split_once('/').and_then(|(name, _)| Task::from_name(name)).unwrap_or(Task::Jsonl)
    }

    /// Whether the benchmark has no split for training.
    pub fn has_only_test_split(self) -> bool {
        matches!(self, Task::Humaneval | Task::MtBench)
    }

    /// Where the rows are: the only file of rows in the folder `data` for benchmarks that have a
    /// single file, whatever its name; otherwise `data` itself.
    pub fn locate(self, data: &Path) -> PathBuf {
        let is_one_file = matches!(self, Task::Jsonl | Task::Mbpp | Task::Humaneval);
        let only_file = || prompt_set::dataset_file::only_file(data);
        if is_one_file { only_file() } else { None }.unwrap_or_else(|| data.to_owned())
    }

    /// Reads one split of the benchmark's files in `data`.
    ///
    /// # Errors
    /// When a file is missing, a row lacks a field, or no row is of the split: the message lists the
    /// splits that are there.
    pub fn load(self, data: &Path, split: &str) -> Result<Vec<Sample>> {
        let data = &self.locate(data);
        let samples = self.read(data, split)?;
        if samples.is_empty() {
            let has_rows = |other: &&&str| self.read(data, other).is_ok_and(|samples| !samples.is_empty());
            let there = match &self.splits().iter().filter(has_rows).copied().collect::<Vec<_>>()[..] {
                [] => "it is empty".to_owned(),
                splits => format!("choose one of {}", splits.join(", ")),
            };
            return Err(Error::file(data, format!("has no rows of the split `{split}` of {}: {there}", self.name())));
        }
        Ok(samples)
    }

    /// The splits of the published files.
    fn splits(self) -> &'static [&'static str] {
        match self {
            Task::Gsm8k => &["train", "test"],
            Task::Spider => &["train", "dev", "test", "heldout", "rest"],
            Task::Mbpp => &["train", "validation", "test", "prompt"],
            Task::Codesearchnet => &["train", "validation", "test"],
            Task::Humaneval | Task::MtBench => &["test"],
            Task::Perplexity | Task::Jsonl | Task::Synthetic => &[],
        }
    }

    fn read(self, data: &Path, split: &str) -> Result<Vec<Sample>> {
        match self {
            Task::Gsm8k => gsm8k::load(data, split),
            Task::Spider => spider::load(data, split),
            Task::Humaneval => humaneval::load(data, split),
            Task::Mbpp => mbpp::load(data, split),
            Task::MtBench => mt_bench::load(data, split),
            Task::Codesearchnet => codesearchnet::load(data, split),
            Task::Perplexity => perplexity::load(data, split),
            Task::Jsonl => prompt_set::read(data),
            Task::Synthetic => synthetic::load(0, split, synthetic::DEFAULT_NUM_PROBLEMS),
        }
    }

    /// Whether scoring runs the code of the answers.
    pub fn runs_code(self) -> bool {
        matches!(self, Task::Humaneval | Task::Mbpp)
    }

    /// Checks that [`Task::score`] can score answers to `sample`: its database or tests are there
    /// and its pattern is valid. Without a reference, answers stay unscored, and nothing is needed.
    /// Call it before answers are generated, which would otherwise be lost.
    ///
    /// # Errors
    /// As [`Task::score`].
    pub fn check_scorable(self, context: ScoreContext<'_>, sample: &Sample) -> Result<()> {
        if sample.reference.is_none() {
            return Ok(());
        }
        match (self, context) {
            (Task::Spider, ScoreContext { data: Some(data), .. }) => spider::database_paths(data, sample).map(drop),
            (Task::Humaneval, ScoreContext { sandbox: Some(_), .. }) => {
                python::read_meta::<humaneval::Tests>(sample).map(drop)
            }
            (Task::Mbpp, ScoreContext { sandbox: Some(_), .. }) => python::read_meta::<mbpp::Tests>(sample).map(drop),
            (Task::Jsonl, _) => jsonl::check(sample),
            _ => Ok(()),
        }
    }

    /// Scores an answer to `sample`, without what the model thought before it. An answer that was
    /// cut at the length limit or ends inside a thought is never correct: it did not reach its end,
    /// and a number or query that happens to be its last would be luck. Only the tokens tell whether a
    /// thought is open, since the prompt may have opened it.
    ///
    /// # Errors
    /// Only when scoring itself is impossible: a database is missing, the sample's `meta` lacks
    /// what it needs, or the sandbox does not work. A broken answer is [`Verdict::Incorrect`].
    pub fn score(
        self,
        context: ScoreContext<'_>,
        sample: &Sample,
        answer: &str,
        finish_reason: FinishReason,
        thought_is_open: bool,
    ) -> Result<Score> {
        let score = self.score_complete(context, sample, answer)?;
        let is_cut = finish_reason == FinishReason::Length || thought_is_open;
        Ok(if is_cut { score.of_cut_answer() } else { score })
    }

    /// Scores an answer that reached its end.
    fn score_complete(self, context: ScoreContext<'_>, sample: &Sample, answer: &str) -> Result<Score> {
        let Some(reference) = &sample.reference else { return Ok(Verdict::Unscored.into()) };
        let (reference, answer) = (without_thought(reference), without_thought(answer));
        let verdict = match (self, context) {
            (Task::Gsm8k, _) => return Ok(gsm8k::score(reference, answer)),
            (Task::Jsonl, _) => Verdict::from_correct(jsonl::is_correct(sample, reference, answer)?),
            (Task::Synthetic, _) => synthetic::score(sample, reference, answer)?,
            (Task::Spider, ScoreContext { data: Some(data), keep_distinct, .. }) => {
                return spider::score(data, sample, reference, answer, keep_distinct);
            }
            (Task::Humaneval, ScoreContext { sandbox: Some(sandbox), .. }) => {
                humaneval::score(sandbox, sample, answer)?
            }
            (Task::Mbpp, ScoreContext { sandbox: Some(sandbox), .. }) => mbpp::score(sandbox, sample, answer)?,
            (Task::Spider | Task::Humaneval | Task::Mbpp, _) => Verdict::Unscored,
            (Task::MtBench | Task::Codesearchnet | Task::Perplexity, _) => Verdict::Unscored,
        };
        Ok(verdict.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompt_set::Prompt;

    #[test]
    fn a_truncated_answer_is_never_correct() {
        let sample = |reference: Option<&str>| Sample {
            id: "a".to_owned(),
            source: "jsonl/test".to_owned(),
            prompt: Prompt::question("What is 1 and 1?"),
            reference: reference.map(str::to_owned),
            meta: None,
        };
        let score = |reference: Option<&str>, answer: &str, finish_reason, thought_is_open| {
            let sample = sample(reference);
            let score = Task::Jsonl.score(ScoreContext::default(), &sample, answer, finish_reason, thought_is_open);
            score.unwrap().verdict
        };
        assert_eq!(score(Some("2"), "2", FinishReason::Eos, false), Verdict::Correct);
        assert_eq!(score(Some("2"), "2", FinishReason::Eos, true), Verdict::Incorrect);
        for thought_is_open in [false, true] {
            assert_eq!(score(Some("2"), "2", FinishReason::Length, thought_is_open), Verdict::Incorrect);
            assert_eq!(score(Some("2"), "3", FinishReason::Length, thought_is_open), Verdict::Incorrect);
            assert_eq!(score(None, "2", FinishReason::Length, thought_is_open), Verdict::Unscored);
        }
    }

    #[test]
    fn a_thought_is_no_part_of_an_answer_or_a_reference() {
        let sample = Sample {
            id: "a".to_owned(),
            source: "jsonl/test".to_owned(),
            prompt: Prompt::question("What is 1 and 1?"),
            reference: Some("<think>\n1 + 1\n</think>\n\n2".to_owned()),
            meta: None,
        };
        for (answer, verdict) in [
            ("2", Verdict::Correct),
            ("<think>\n\n</think>\n\n2", Verdict::Correct),
            ("2</think>3", Verdict::Incorrect),
            ("<think>2", Verdict::Incorrect),
        ] {
            let score = Task::Jsonl.score(ScoreContext::default(), &sample, answer, FinishReason::Eos, false);
            assert_eq!(score.unwrap().verdict, verdict, "{answer}");
        }
    }

    #[test]
    fn every_task_is_known_by_its_name() {
        for task in Task::ALL {
            assert_eq!(Task::from_name(task.name()), Some(task));
            assert_eq!(Task::from_source(&format!("{}/test", task.name())), task);
            assert_eq!(serde_json::to_value(task).unwrap(), task.name());
        }
        for source in ["mine", "mine/test", "gsm8k", "synthetic", "", "/gsm8k"] {
            assert_eq!(Task::from_source(source), Task::Jsonl, "{source}");
        }
    }
}
