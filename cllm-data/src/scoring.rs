//! Scores the answer of a row by its task. Code in answers is not run here: only `cllm-eval` does, where that was asked for.

use std::path::Path;

use cllm_core::prompt_set::{Prompt, Sample};
use cllm_core::task::{ScoreContext, Task, Verdict};
use cllm_core::trajectory::Trajectory;
use cllm_core::{Error, Result};

/// Scores a row of the data set `file` whose answer reads `text`; `data` is the folder of the benchmark's files.
pub(crate) fn score(file: &Path, row: &Trajectory, text: &str, data: Option<&Path>) -> Result<Verdict> {
    let bad_meta = |error| Error::file(file, format!("row `{}`: meta is no JSON: {error}", row.sample_id));
    let sample = Sample {
        id: row.sample_id.clone(),
        source: row.source.clone(),
        prompt: Prompt::Text(row.prompt.clone()),
        reference: row.reference.clone(),
        meta: row.meta.as_deref().map(serde_json::from_str).transpose().map_err(bad_meta)?,
    };
    Task::from_source(&row.source).score(ScoreContext { data, sandbox: None }, &sample, text, row.finish_reason)
}
