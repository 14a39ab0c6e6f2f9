//! A model's tokenizer with its chat template and the ids that end an answer.

use std::path::Path;

use crate::Result;
use crate::prompt_set::Prompt;

/// Tokenizer of a model folder.
pub struct Tokenizer {}

impl Tokenizer {
    /// Loads `tokenizer.json`, `tokenizer_config.json` (chat template) and the EOS ids of generation_config.json,
    /// config.json and the tokenizer together.
    ///
    /// # Errors
    /// When a file is missing or broken, or the tokenizer has ids past the model's vocabulary.
    pub fn load(folder: &Path) -> Result<Self> {
        let _ = folder;
        todo!()
    }

    /// Every id that ends an answer, ascending.
    pub fn eos_ids(&self) -> &[i32] {
        todo!()
    }

    /// Number of ids, added tokens included.
    pub fn vocab_size(&self) -> usize {
        todo!()
    }

    /// Token ids of `text`, with no special tokens added; special tokens written in the text are recognised.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        let _ = text;
        todo!()
    }

    /// Text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// When an id is none of the tokenizer's.
    pub fn decode(&self, ids: &[i32]) -> Result<String> {
        let _ = ids;
        todo!()
    }

    /// The rendered prompt and its ids: messages go through the chat template (with the generation prompt), plain
    /// text is taken as it is (with the BOS token first where the tokenizer adds one).
    ///
    /// # Errors
    /// When the template refuses the messages, or the model has none.
    pub fn prompt(&self, prompt: &Prompt) -> Result<(String, Vec<i32>)> {
        let _ = prompt;
        todo!()
    }

    /// Ids of a training answer to a prompt: its text and the id that ends the turn.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn target(&self, text: &str) -> Result<Vec<i32>> {
        let _ = text;
        todo!()
    }

    /// Fingerprint of tokenizer.json.
    pub fn fingerprint(&self) -> &str {
        todo!()
    }
}
