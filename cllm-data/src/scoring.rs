//! Scores recorded responses by their task, for `collect` and `clean`. Code in responses never runs
//! here: only `cllm-eval` runs code, and only when asked to.

use std::path::Path;

use cllm_core::prompt_set::{Prompt, Sample};
use cllm_core::task::{ScoreContext, Task, Verdict};
use cllm_core::thought::ThoughtTokens;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::Trajectory;
use cllm_core::{Error, Result};

/// Scores the rows of one data set.
#[derive(Clone, Copy)]
pub(crate) struct Scorer<'a> {
    /// The data set, for error messages.
    pub(crate) data_set: &'a Path,
    pub(crate) tokenizer: &'a Tokenizer,
    /// Folder of the benchmark's files. Without it, tasks that need them leave responses unscored.
    pub(crate) data: Option<&'a Path>,
    /// The tokens around thoughts, if the model thinks: a thought that never closed is no answer.
    pub(crate) thought_tokens: Option<&'a ThoughtTokens>,
}

impl Scorer<'_> {
    pub(crate) fn score(&self, row: &Trajectory) -> Result<Verdict> {
        self.score_text(row, &self.tokenizer.decode_answer(&row.prompt_ids, &row.response_ids)?)
    }

    /// Scores a row whose response has been decoded to `text` already.
    pub(crate) fn score_text(&self, row: &Trajectory, text: &str) -> Result<Verdict> {
        let bad_meta =
            |error| Error::file(self.data_set, format!("row `{}`: meta is not JSON: {error}", row.sample_id));
        let sample = Sample {
            id: row.sample_id.clone(),
            source: row.source.clone(),
            prompt: Prompt::Text(row.prompt.clone()),
            reference: row.reference.clone(),
            meta: row.meta.as_deref().map(serde_json::from_str).transpose().map_err(bad_meta)?,
        };
        let context = ScoreContext { data: self.data, ..ScoreContext::default() };
        let (task, is_open) = (Task::from_source(&row.source), self.ends_inside_thought(row));
        let score = task.score(context, &sample, text, row.finish_reason, is_open);
        Ok(score.map_err(|error| error.in_file(self.data_set))?.verdict)
    }

    pub(crate) fn ends_inside_thought(&self, row: &Trajectory) -> bool {
        self.thought_tokens.is_some_and(|tokens| row.ends_inside_thought(tokens))
    }
}
