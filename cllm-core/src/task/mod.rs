//! Benchmarks, one file each: load, prompt, score; used for prompts, cleaning and evaluation alike.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::prompt_set::Sample;

/// A benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// Grade-school maths (Cobbe et al., arXiv 2110.14168).
    Gsm8k,
    /// Text to SQL (Yu et al., arXiv 1809.08887), scored by execution.
    Spider,
    /// Python functions (Chen et al., arXiv 2107.03374).
    Humaneval,
    /// Python functions (Austin et al., arXiv 2108.07732).
    Mbpp,
    /// Any JSONL.
    Jsonl,
    /// Made by this project from a seed.
    Synthetic,
}

/// The verdict on one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Right.
    Right,
    /// Wrong, or no answer found.
    Wrong,
    /// This task has no score for it here.
    Unscored,
}

/// Scores answers of one task; holds what that needs (the folder of Spider's databases, say).
pub struct Scorer {
    task: Task,
    data: Option<PathBuf>,
}

impl Task {
    /// The task of a prompt's `source` (`gsm8k/test`), by its first part.
    pub fn of_source(source: &str) -> Option<Task> {
        let _ = source;
        todo!()
    }

    /// Reads one split of the benchmark's files in `data`, in the original or the Hugging Face form.
    ///
    /// # Errors
    /// When a file is missing or a row is not as expected.
    pub fn load(self, data: &Path, split: &str) -> Result<Vec<Sample>> {
        let _ = (data, split);
        todo!()
    }
}

impl Scorer {
    /// A scorer; `data` is the benchmark's folder, needed by tasks that score by files of it.
    pub fn new(task: Task, data: Option<&Path>) -> Self {
        Scorer { task, data: data.map(Path::to_owned) }
    }

    /// Scores an answer to `sample`.
    ///
    /// # Errors
    /// Only when scoring itself is impossible (a database is missing); a broken answer is [`Verdict::Wrong`].
    pub fn score(&self, sample: &Sample, answer: &str) -> Result<Verdict> {
        let _ = (sample, answer, &self.task, &self.data);
        todo!()
    }
}
