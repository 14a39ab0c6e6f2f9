//! One prompt of a prompt set, and the forms in which files hold it.

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::chat_template::{Conversation, Message};

/// The `source` of a prompt that does not name one.
pub const DEFAULT_SOURCE: &str = "jsonl";

/// Plain text, or a conversation for the model's chat template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Prompt {
    /// Text that the model continues as it is.
    Text(#[serde(serialize_with = "serialize_text")] String),
    /// A conversation that the model's chat template renders.
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Row")]
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

/// A row as other tools write it: few fields are required, and unknown ones are kept.
#[derive(Deserialize)]
pub(super) struct Row {
    id: Option<Id>,
    source: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    #[serde(default)]
    tools: Vec<Value>,
    #[serde(default)]
    chat_template_kwargs: Map<String, Value>,
    reference: Option<String>,
    meta: Option<Value>,
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Id {
    Text(String),
    Number(i64),
}

impl Row {
    /// Gives a row without an id one made of its number, counted from 1.
    pub(super) fn ensure_id(&mut self, number: usize) {
        self.id.get_or_insert_with(|| Id::Text(format!("{DEFAULT_SOURCE}-{number}")));
    }
}

impl TryFrom<Row> for Sample {
    type Error = &'static str;

    fn try_from(row: Row) -> Result<Self, Self::Error> {
        Ok(Sample {
            id: match row.id {
                Some(Id::Text(id)) => id,
                Some(Id::Number(id)) => id.to_string(),
                None => return Err("missing field `id`: `cllm-data prepare jsonl` adds one to each row"),
            },
            source: row.source.unwrap_or_else(|| DEFAULT_SOURCE.to_owned()),
            prompt: match (row.prompt, row.messages) {
                (Some(text), None) => Prompt::Text(text),
                (None, Some(messages)) => Prompt::Conversation(Conversation {
                    messages,
                    tools: row.tools,
                    chat_template_kwargs: row.chat_template_kwargs,
                }),
                (None, None) => return Err("missing field `prompt` or `messages`"),
                (Some(_), Some(_)) => return Err("has both `prompt` and `messages`: keep the one to answer"),
            },
            reference: row.reference,
            meta: merge_unknown(row.meta, row.unknown),
        })
    }
}

/// Adds the unknown fields to `meta`, whose own fields win.
fn merge_unknown(meta: Option<Value>, mut unknown: Map<String, Value>) -> Option<Value> {
    unknown.retain(|_, value| !value.is_null());
    match meta {
        meta if unknown.is_empty() => meta,
        Some(Value::Object(own)) => {
            unknown.extend(own);
            Some(unknown.into())
        }
        Some(other) => {
            unknown.insert("meta".to_owned(), other);
            Some(unknown.into())
        }
        None => Some(unknown.into()),
    }
}
