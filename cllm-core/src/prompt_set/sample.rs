//! One prompt of a prompt set, and how JSON holds it.

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::chat_template::{Conversation, Message};

/// The `source` of a prompt that does not name one.
pub const DEFAULT_SOURCE: &str = "jsonl";

/// Plain text, or a conversation for the model's chat template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Prompt {
    /// Text that the model continues as it is.
    Text(#[serde(serialize_with = "serialize_text")] String),
    /// A conversation that the model's chat template renders. It ends before the turn to answer.
    Conversation(Conversation),
}

impl Prompt {
    /// A conversation that consists of one question.
    pub fn question(content: impl Into<String>) -> Self {
        Prompt::Conversation(vec![Message::new("user", content)].into())
    }
}

/// Writes a text as the field `prompt`, beside the other fields of its sample.
fn serialize_text<S: Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
    let mut fields = serializer.serialize_map(Some(1))?;
    fields.serialize_entry("prompt", text)?;
    fields.end()
}

/// One row of a prompt set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sample {
    /// Stable, and unique in the prompt set.
    pub id: String,
    /// Benchmark and split, such as `gsm8k/train`.
    pub source: String,
    #[serde(flatten)]
    pub prompt: Prompt,
    /// The benchmark's own answer, which is also the target of supervised fine-tuning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Data that the task needs to score an answer, such as `db_id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub meta: Option<Value>,
}
