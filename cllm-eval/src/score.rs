//! Scoring of answers, and the verb `score`, which scores saved answers again with no model and no
//! GPU.

use std::path::{Path, PathBuf};

use cllm_core::prompt_set::Sample;
use cllm_core::sandbox::Sandbox;
use cllm_core::task::{Score, ScoreContext, Task};
use cllm_core::{Result, atomic_file, interrupt, progress};
use rayon::prelude::*;

use crate::records::{AnswerRecord, Records, SAMPLES};
use crate::results::{RESULTS, Results};

/// Scores the answers of one benchmark.
#[derive(Clone, Copy)]
pub struct AnswerScorer<'a> {
    task: Task,
    context: ScoreContext<'a>,
}

impl<'a> AnswerScorer<'a> {
    /// `data` is the folder of the benchmark's files; the code of answers runs in `sandbox`.
    pub fn new(task: Task, data: Option<&'a Path>, sandbox: Option<&'a Sandbox>) -> Self {
        AnswerScorer { task, context: ScoreContext { data, sandbox } }
    }

    /// Refuses a prompt whose answer could not be scored.
    ///
    /// # Errors
    /// As [`Task::check_scorable`].
    pub fn check(&self, sample: &Sample) -> Result<()> {
        self.task.check_scorable(self.context, sample)
    }

    /// Sets the verdicts of the answers, in parallel. If one answer cannot be scored, none is
    /// changed.
    ///
    /// # Errors
    /// As [`Task::score`].
    pub fn score(&self, answers: &mut [AnswerRecord]) -> Result<()> {
        let score =
            |answer: &AnswerRecord| self.task.score(self.context, &answer.sample(), &answer.text, answer.finish_reason);
        let scores: Vec<Score> = answers.par_iter().map(score).collect::<Result<_>>()?;
        for (answer, Score { verdict, alternative }) in answers.iter_mut().zip(scores) {
            (answer.verdict, answer.alternative) = (verdict, alternative);
        }
        Ok(())
    }
}

/// Opens the sandbox for the code of a task's answers. `None` if the answers contain no code, or if
/// `execute` is false; `advice` then says how to allow it.
///
/// # Errors
/// As [`Sandbox::open`].
pub fn open_sandbox(task: Task, execute: bool, advice: &str) -> Result<Option<Sandbox>> {
    if !task.runs_code() {
        return Ok(None);
    }
    if !execute {
        progress::log(format!(
            "answers of {} stay unscored: scoring them would run code that a model wrote; to allow it, {advice}",
            task.name()
        ));
        return Ok(None);
    }
    let sandbox = Sandbox::open()?;
    progress::log(format!(
        "the code of answers runs in {}, confined by {}",
        sandbox.python().display(),
        sandbox.layers().join(", ")
    ));
    for packages in sandbox.lost_packages() {
        progress::log(format!("code cannot import some packages: {packages}"));
    }
    Ok(Some(sandbox))
}

/// Scores the answers in a run's folder again and rewrites its files. `data` overrides the run's
/// own folder of the benchmark's files. Code in answers runs only with `execute`, whatever the
/// settings of the run say, because its files may come from anywhere.
///
/// # Errors
/// When the folder contains no run, or a file that scoring needs is missing.
pub fn score(folder: &Path, data: Option<PathBuf>, execute: bool) -> Result<Results> {
    let path = folder.join(SAMPLES);
    let mut records = Records::read(&path)?;
    let task = records.header.benchmark;
    let data = data.or_else(|| records.header.settings.data.clone());
    let sandbox = open_sandbox(task, execute, "add --execute-code")?;
    AnswerScorer::new(task, data.as_deref(), sandbox.as_ref()).score(&mut records.answers)?;
    interrupt::check()?;
    if task == Task::Spider && data.is_none() {
        progress::log("no answer was scored: name Spider's folder with --data");
    }
    // The header records where the verdicts come from, and the next scoring starts from the same
    // folder.
    records.header.sandbox = sandbox.map(|sandbox| sandbox.layers().to_vec());
    records.header.settings.execute_code = execute;
    records.header.settings.data = data;
    records.write(&path)?;
    let results = Results::from_records(&records);
    atomic_file::write_json(&folder.join(RESULTS), &results)?;
    Ok(results)
}
