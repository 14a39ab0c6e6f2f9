//! Chat templates (Jinja, as `transformers` renders them).

use serde::{Deserialize, Serialize};

use crate::Result;

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// Its text.
    pub content: String,
}

/// A compiled chat template with the special tokens that it may name.
pub struct ChatTemplate {}

impl ChatTemplate {
    /// The conversation as the model's prompt; `add_generation_prompt` opens the assistant's turn.
    ///
    /// # Errors
    /// When the template refuses the conversation (`raise_exception`).
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let _ = (messages, add_generation_prompt);
        todo!()
    }
}
