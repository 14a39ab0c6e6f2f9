//! Thoughts of thinking models (Qwen3, DeepSeek-R1) in tokens: where they begin and end, and a limit
//! on their length, which closes a thought that does not end by itself.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::thought_text::{CLOSING, END, START};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// What a chat template may write after `<think>` when it opens the thought in the prompt.
const AFTER_START: [&str; 3] = ["", "\n", "\n\n"];

/// The tokens by which a model marks its thoughts.
#[derive(Debug, Clone)]
pub struct ThoughtTokens {
    start_id: i32,
    end_id: i32,
    /// The ends of prompts whose chat template has opened the thought already.
    openings: Vec<Vec<i32>>,
}

/// How a thought is closed at its limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThoughtClosing {
    /// Number of tokens of an answer after which an open thought is closed.
    pub max_thinking_tokens: usize,
    /// The tokens that close it.
    pub closing_ids: Vec<i32>,
}

/// A limit on the length of thoughts.
#[derive(Debug, Clone)]
pub struct ThoughtLimit {
    pub tokens: ThoughtTokens,
    pub closing: ThoughtClosing,
}

/// How the thought of an answer ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Thought {
    /// The model closed it.
    Closed,
    /// It was closed at the limit. The tokens at these positions of the answer did it; they were not
    /// decoded.
    Forced(Range<usize>),
    /// The answer ended inside of it.
    Open,
}

impl Thought {
    /// Positions in the answer of the tokens that closed the thought at its limit; an empty range if
    /// there are none.
    pub fn forced_tokens(&self) -> Range<usize> {
        match self {
            Thought::Forced(positions) => positions.clone(),
            Thought::Closed | Thought::Open => 0..0,
        }
    }
}

impl ThoughtTokens {
    /// The tokens that begin and end a thought, and the ends of prompts that have opened one.
    pub fn new(start_id: i32, end_id: i32, openings: Vec<Vec<i32>>) -> Self {
        ThoughtTokens { start_id, end_id, openings }
    }

    /// Finds the tokens. `None` if the model has none: it does not think, or marks its thoughts in
    /// another way.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn find(tokenizer: &Tokenizer) -> Result<Option<Self>> {
        let (Some(start_id), Some(end_id)) = (tokenizer.token_id(START), tokenizer.token_id(END)) else {
            return Ok(None);
        };
        let openings = AFTER_START.iter().map(|after| tokenizer.encode(&format!("{START}{after}")));
        Ok(Some(ThoughtTokens::new(start_id, end_id, openings.collect::<Result<_>>()?)))
    }

    /// Whether an answer ends inside a thought.
    pub fn is_open(&self, prompt_ids: &[i32], answer_ids: &[i32]) -> bool {
        match answer_ids.iter().rfind(|&&id| self.is_mark(id)) {
            Some(&last) => last == self.start_id,
            None => self.is_opened_by(prompt_ids),
        }
    }

    /// Whether an answer has a thought, which may be open and may have begun in the prompt.
    pub fn has_thought(&self, prompt_ids: &[i32], answer_ids: &[i32]) -> bool {
        self.is_opened_by(prompt_ids) || answer_ids.iter().any(|&id| self.is_mark(id))
    }

    /// How the thought of an answer ended whose thoughts have no limit. `None` if it has no thought.
    pub fn thought(&self, prompt_ids: &[i32], answer_ids: &[i32]) -> Option<Thought> {
        if self.is_open(prompt_ids, answer_ids) {
            Some(Thought::Open)
        } else {
            self.has_thought(prompt_ids, answer_ids).then_some(Thought::Closed)
        }
    }

    fn is_mark(&self, id: i32) -> bool {
        id == self.start_id || id == self.end_id
    }

    fn is_opened_by(&self, prompt_ids: &[i32]) -> bool {
        self.openings.iter().any(|opening| prompt_ids.ends_with(opening))
    }
}

impl ThoughtLimit {
    /// Makes the limit that the setting `max_thinking_tokens` asks for.
    ///
    /// # Errors
    /// [`Error::Usage`] if the model has no tokens for thoughts, or an answer would have no room after
    /// a thought of this length.
    pub fn new(tokenizer: &Tokenizer, max_thinking_tokens: usize, max_new_tokens: usize) -> Result<Self> {
        let tokens = ThoughtTokens::find(tokenizer)?.ok_or_else(|| {
            Error::usage(format!(
                "max_thinking_tokens: the model's tokenizer has no tokens {START} and {END}, so its thoughts cannot be \
                 found; leave max_thinking_tokens out"
            ))
        })?;
        // Some tokenizers put a space before the first word of a text, which this is not.
        let mut closing_ids = tokenizer.encode(&format!("{START}{CLOSING}"))?;
        closing_ids.drain(..=closing_ids.iter().position(|&id| id == tokens.start_id).unwrap_or(0));
        let limit = ThoughtLimit { tokens, closing: ThoughtClosing { max_thinking_tokens, closing_ids } };
        if !limit.leaves_room(max_new_tokens) {
            let (num_closing, min_new_tokens) = (limit.closing.closing_ids.len(), limit.min_new_tokens());
            return Err(Error::usage(format!(
                "max_thinking_tokens={max_thinking_tokens}, the {num_closing} tokens that close a thought, and an answer \
                 do not fit into max_new_tokens={max_new_tokens}; lower max_thinking_tokens, or raise max_new_tokens to \
                 {min_new_tokens} at least"
            )));
        }
        Ok(limit)
    }

    /// Whether an answer of at most so many tokens has room after a thought of the greatest length.
    pub fn leaves_room(&self, max_new_tokens: usize) -> bool {
        max_new_tokens >= self.min_new_tokens()
    }

    fn min_new_tokens(&self) -> usize {
        self.closing.max_thinking_tokens.saturating_add(self.closing.closing_ids.len() + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens() -> ThoughtTokens {
        ThoughtTokens::new(1, 2, vec![vec![1], vec![1, 9]])
    }

    #[test]
    fn a_thought_is_open_after_its_start_in_the_answer_or_at_the_end_of_the_prompt() {
        for (prompt, answer, is_open, has_thought) in [
            (&[5, 6][..], &[7, 7][..], false, false),
            (&[5, 6], &[1, 7], true, true),
            (&[5, 6], &[1, 7, 2, 8], false, true),
            (&[5, 6], &[1, 7, 2, 8, 1], true, true),
            (&[5, 1], &[7, 7], true, true),
            (&[5, 1, 9], &[7, 7], true, true),
            (&[5, 1, 9], &[7, 2], false, true),
            // A prompt that speaks of thoughts, or whose template has closed an empty one.
            (&[5, 1, 6], &[7, 7], false, false),
            (&[5, 1, 9, 2, 9], &[7, 7], false, false),
        ] {
            assert_eq!(tokens().is_open(prompt, answer), is_open, "{prompt:?} {answer:?}");
            assert_eq!(tokens().has_thought(prompt, answer), has_thought, "{prompt:?} {answer:?}");
        }
    }

    #[test]
    fn how_a_thought_ended_is_a_word_or_the_positions_that_closed_it() {
        let json = |thought: &Thought| serde_json::to_string(thought).unwrap();
        assert_eq!(json(&Thought::Closed), "\"closed\"");
        assert_eq!(json(&Thought::Forced(64..67)), r#"{"forced":{"start":64,"end":67}}"#);
        assert_eq!(json(&Thought::Open), "\"open\"");
    }
}
