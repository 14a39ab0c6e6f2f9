//! `score`: scores saved answers again, with no model and no GPU.

use std::path::{Path, PathBuf};

use cllm_core::sandbox::Sandbox;
use cllm_core::task::{ScoreContext, Task, Verdict};
use cllm_core::{Result, atomic_file, interrupt, progress};
use rayon::prelude::*;

use crate::records::{AnswerRecord, Records, SAMPLES};
use crate::results::{RESULTS, Results};

/// The verdict on an answer.
///
/// # Errors
/// As [`Task::score`].
pub fn judge(task: Task, judge: ScoreContext<'_>, answer: &AnswerRecord) -> Result<Verdict> {
    task.score(judge, &answer.sample(), &answer.text, answer.finish_reason)
}

/// Where the code of a task's answers runs, if it has any and `execute` asks for that; `advice` is said where only the latter lacks.
///
/// # Errors
/// As [`Sandbox::open`].
pub fn sandbox(task: Task, execute: bool, advice: &str) -> Result<Option<Sandbox>> {
    if !task.runs_code() {
        return Ok(None);
    }
    if !execute {
        progress::log(format!(
            "answers of {} stay unscored, since that takes running code that a model wrote: {advice}",
            task.name()
        ));
        return Ok(None);
    }
    let sandbox = Sandbox::open()?;
    progress::log(format!("code runs in {}, held by {}", sandbox.python().display(), sandbox.layers().join(", ")));
    Ok(Some(sandbox))
}

/// Scores the answers in a run's folder and rewrites its files. `data` is where the benchmark's files are, when not where
/// the run had them. Code in the answers runs only where `execute` says so, whatever the run's settings say: its files may come
/// from anywhere.
///
/// # Errors
/// When the folder holds no run, or a file that scoring needs is missing.
pub fn score(folder: &Path, data: Option<PathBuf>, execute: bool) -> Result<Results> {
    let path = folder.join(SAMPLES);
    let mut records = Records::read(&path)?;
    let task = records.header.benchmark;
    let data = data.or_else(|| records.header.settings.data.clone());
    let sandbox = sandbox(task, execute, "add --execute-code")?;
    let by = ScoreContext { data: data.as_deref(), sandbox: sandbox.as_ref() };
    let score = |answer: &AnswerRecord| judge(task, by, answer);
    let verdicts: Vec<Verdict> = records.answers.par_iter().map(score).collect::<Result<_>>()?;
    interrupt::check()?;
    if task == Task::Spider && data.is_none() {
        progress::log("no answer was scored: name Spider's folder with --data");
    }
    // What the verdicts come from is what results.json tells, and the next scoring looks there too.
    records.header.sandbox = sandbox.map(|sandbox| sandbox.layers().to_vec());
    records.header.settings.execute_code = execute;
    records.header.settings.data = data;
    for (answer, verdict) in records.answers.iter_mut().zip(verdicts) {
        answer.verdict = verdict;
    }
    records.write(&path)?;
    let results = Results::of(&records);
    atomic_file::write_json(&folder.join(RESULTS), &results)?;
    Ok(results)
}
