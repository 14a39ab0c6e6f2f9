//! Prompt sets: JSONL (or Parquet) rows of prompts with what a task needs to score the answers.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Result;
use crate::chat_template::Message;

/// A prompt: plain text, or a conversation for the model's chat template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Prompt {
    /// `prompt`: text as it is.
    #[serde(rename = "prompt")]
    Text(String),
    /// `messages`: a conversation.
    Messages(Vec<Message>),
}

/// One row of a prompt set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Stable, unique in the set.
    pub id: String,
    /// Benchmark and split, such as `gsm8k/train`.
    pub source: String,
    /// `prompt` or `messages`.
    #[serde(flatten)]
    pub prompt: Prompt,
    /// The data set's own answer; the target of supervised fine-tuning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// What the task needs to score an answer, such as `db_id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<Value>,
}

/// Reads a prompt set, `.jsonl` or `.parquet`.
///
/// # Errors
/// Names file and line of a bad row, and a doubled id.
pub fn read(path: &Path) -> Result<Vec<Sample>> {
    let _ = path;
    todo!()
}

/// Writes a prompt set, `.jsonl` or `.parquet` by its name.
///
/// # Errors
/// File-system errors.
pub fn write(path: &Path, samples: &[Sample]) -> Result<()> {
    let _ = (path, samples);
    todo!()
}
