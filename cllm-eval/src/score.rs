//! `score`: scores saved answers again, with no model and no GPU.

use std::path::Path;

use cllm_core::task::Verdict;
use cllm_core::{Result, atomic_file, interrupt};
use rayon::prelude::*;

use crate::records::{AnswerRecord, Records, SAMPLES};
use crate::results::{RESULTS, Results};

/// Scores the answers in a run's folder and rewrites its files.
///
/// # Errors
/// When the folder holds no run.
pub fn score(folder: &Path) -> Result<Results> {
    let path = folder.join(SAMPLES);
    let mut records = Records::read(&path)?;
    let task = records.header.benchmark;
    let data = records.header.settings.data.clone();
    let score = |answer: &AnswerRecord| task.score(data.as_deref(), &answer.sample(), &answer.text);
    let verdicts: Vec<Verdict> = records.answers.par_iter().map(score).collect::<Result<_>>()?;
    interrupt::check()?;
    for (answer, verdict) in records.answers.iter_mut().zip(verdicts) {
        answer.verdict = verdict;
    }
    records.write(&path)?;
    let results = Results::of(&records);
    atomic_file::write_json(&folder.join(RESULTS), &results)?;
    Ok(results)
}
