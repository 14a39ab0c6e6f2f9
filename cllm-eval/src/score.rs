//! Scoring of answers, and the verb `score`, which scores saved answers again with no model and no
//! GPU.

use std::path::{Path, PathBuf};

use cllm_core::prompt_set::Sample;
use cllm_core::sandbox::Sandbox;
use cllm_core::task::{Score, ScoreContext, Task};
use cllm_core::thought::Thought;
use cllm_core::{Error, Result, interrupt, output_folder, progress};
use rayon::prelude::*;

use crate::config::RunSettings;
use crate::records::{AnswerRecord, Records, SAMPLES};
use crate::results::Results;

/// Scores the answers of one benchmark.
#[derive(Clone, Copy)]
pub struct AnswerScorer<'a> {
    task: Task,
    context: ScoreContext<'a>,
}

impl<'a> AnswerScorer<'a> {
    /// The code of answers runs in `sandbox`.
    pub fn new(task: Task, settings: &'a RunSettings, sandbox: Option<&'a Sandbox>) -> Self {
        let data = settings.data.as_deref();
        AnswerScorer { task, context: ScoreContext { data, sandbox, keep_distinct: settings.keep_distinct } }
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
    /// As [`Task::score`]; a signal that asked to stop.
    pub fn score(&self, answers: &mut [AnswerRecord]) -> Result<()> {
        let score = |answer: &AnswerRecord| {
            interrupt::check()?;
            let is_open = answer.thought == Some(Thought::Open);
            self.task.score(self.context, &answer.sample(), &answer.text, answer.finish_reason, is_open)
        };
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

/// Refuses the option that chooses between Spider's two rules for a benchmark that would ignore it.
///
/// # Errors
/// [`Error::Usage`] for any other benchmark.
pub fn expect_spider(task: Task, option: &str) -> Result<()> {
    match task {
        Task::Spider => Ok(()),
        other => Err(Error::usage(format!("`{option}` is for spider only, not for {}: leave it out", other.name()))),
    }
}

/// Scores the answers in a run's folder again and rewrites its files. `data` and `keep_distinct`
/// override the run's own settings. Code in answers runs only with `execute`, whatever the settings
/// of the run say, because its files may come from anywhere.
///
/// # Errors
/// When the folder contains no run, a file that scoring needs is missing, or `keep_distinct` is set
/// for a benchmark that does not know it.
pub fn score(folder: &Path, data: Option<PathBuf>, keep_distinct: Option<bool>, execute: bool) -> Result<Results> {
    let path = folder.join(SAMPLES);
    // Before reading: what another command adds meanwhile would be lost.
    let _lock = path.exists().then(|| output_folder::lock(folder)).transpose()?;
    let mut records = Records::read(&path)?;
    records.log_missing_answers(&path);
    let task = records.header.benchmark;
    if keep_distinct.is_some() {
        expect_spider(task, "--keep-distinct")?;
    }
    let sandbox = open_sandbox(task, execute, "add --execute-code")?;
    // The header records where the verdicts come from, and the next scoring starts from the same
    // settings.
    let settings = &mut records.header.settings;
    settings.data = data.or(settings.data.take());
    settings.keep_distinct = keep_distinct.unwrap_or(settings.keep_distinct);
    settings.execute_code = execute;
    let scored = AnswerScorer::new(task, settings, sandbox.as_ref()).score(&mut records.answers);
    scored.map_err(|error| error.in_file(&path))?;
    interrupt::check()?;
    if task == Task::Spider && settings.data.is_none() {
        progress::log("no answer was scored: name Spider's folder with --data");
    }
    records.header.sandbox = sandbox.map(|sandbox| sandbox.layers().to_vec());
    records.write(&path)?;
    let results = Results::from_records(&records);
    let path = results.write(folder)?;
    progress::log(format!("wrote {}; `cllm-eval report {}` draws it again", path.display(), folder.display()));
    Ok(results)
}
