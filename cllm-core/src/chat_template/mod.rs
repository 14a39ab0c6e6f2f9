//! Chat templates: Jinja programs in a model's tokenizer files that turn a conversation into a
//! prompt. They are written for `transformers`, so this module reproduces its Jinja settings, the
//! functions that it adds, and the way in which it picks a template, byte for byte.

mod dates;
mod files;
mod filters;
mod json;
mod percent;
mod python;
mod renderer;
mod rendering;
mod system_frame;
mod template;

pub use jiff::civil::Date;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use files::{TEMPLATE_FILE, TEMPLATE_FOLDER};
pub use renderer::Renderer;
pub use rendering::{RenderSettings, Rendering, RenderingRecord, today};
pub use system_frame::SystemFrame;
pub use template::ChatTemplate;

/// Variables of a template that the prompts themselves give. `transformers` refuses them as well.
pub(crate) const RESERVED_KWARGS: [&str; 2] = ["messages", "add_generation_prompt"];

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    pub content: String,
    /// Other keys, which some templates read, such as `tool_calls`, `name` or `reasoning_content`.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Message {
    /// A message without other keys.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into(), other: Map::new() }
    }
}

/// What a chat template renders: messages, and what they need besides.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conversation {
    pub messages: Vec<Message>,
    /// The tools that the model may call, each as a JSON schema. Empty: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<Value>,
    /// Variables of the template, such as `enable_thinking`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub chat_template_kwargs: Map<String, Value>,
}

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Self {
        Conversation { messages, ..Conversation::default() }
    }
}
