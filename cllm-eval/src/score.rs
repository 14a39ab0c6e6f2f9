//! `score`: scores saved answers again, with no model and no GPU.

use std::path::{Path, PathBuf};

use cllm_core::task::{Task, Verdict};
use cllm_core::{Result, atomic_file, interrupt, progress};
use rayon::prelude::*;

use crate::records::{AnswerRecord, Records, SAMPLES};
use crate::results::{RESULTS, Results};

/// The verdict on an answer.
///
/// # Errors
/// As [`Task::judge`].
pub fn judge(task: Task, data: Option<&Path>, answer: &AnswerRecord) -> Result<Verdict> {
    task.judge(data, &answer.sample(), &answer.text, answer.finish_reason)
}

/// Scores the answers in a run's folder and rewrites its files. `data` is where the benchmark's files are, when not where
/// the run had them.
///
/// # Errors
/// When the folder holds no run, or a file that scoring needs is missing.
pub fn score(folder: &Path, data: Option<PathBuf>) -> Result<Results> {
    let path = folder.join(SAMPLES);
    let mut records = Records::read(&path)?;
    let task = records.header.benchmark;
    let data = data.or_else(|| records.header.settings.data.clone());
    let score = |answer: &AnswerRecord| judge(task, data.as_deref(), answer);
    let verdicts: Vec<Verdict> = records.answers.par_iter().map(score).collect::<Result<_>>()?;
    interrupt::check()?;
    if task == Task::Spider && data.is_none() {
        progress::say("no answer was scored: name Spider's folder with --data");
    }
    // What the verdicts come from is what results.json tells, and the next scoring looks there too.
    records.header.settings.data = data;
    for (answer, verdict) in records.answers.iter_mut().zip(verdicts) {
        answer.verdict = verdict;
    }
    records.write(&path)?;
    let results = Results::of(&records);
    atomic_file::write_json(&folder.join(RESULTS), &results)?;
    Ok(results)
}
