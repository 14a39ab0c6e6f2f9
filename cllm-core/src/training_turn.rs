//! Training targets: what a chat template itself renders for an assistant's turn. The template
//! renders the conversation before the turn, as a prompt, and the conversation with the turn. What
//! the second text adds to the first is what the model would have had to generate.

use crate::chat_template::{Conversation, Message};
use crate::prompt_set::Prompt;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Characters that an error shows of each of two texts.
const SHOWN_CHARS: usize = 60;

/// A turn to learn, as token ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingTurn {
    /// What the model is asked.
    pub prompt_ids: Vec<i32>,
    /// What it should answer, through the token that ends the answer.
    pub target_ids: Vec<i32>,
}

impl Tokenizer {
    /// Encodes a prompt and its reference.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_turn`].
    pub fn encode_reference(&self, prompt: &Prompt, reference: &str) -> Result<TrainingTurn> {
        let (text, prompt_ids) = self.encode_prompt(prompt)?;
        let target_ids = self.encode_reference_after(prompt, &text, &prompt_ids, reference)?;
        Ok(TrainingTurn { prompt_ids, target_ids })
    }

    /// Ids of the reference of a prompt whose text and ids [`Tokenizer::encode_prompt`] gave. For a
    /// plain-text prompt they are those of the reference and the token that ends an answer.
    ///
    /// # Errors
    /// As [`Tokenizer::encode_turn`].
    pub fn encode_reference_after(
        &self,
        prompt: &Prompt,
        text: &str,
        prompt_ids: &[i32],
        reference: &str,
    ) -> Result<Vec<i32>> {
        match prompt {
            Prompt::Text(_) => self.encode_target(reference),
            Prompt::Conversation(before) => {
                self.encode_turn_after(before, text, prompt_ids, &Message::new("assistant", reference))
            }
        }
    }

    /// Encodes an assistant's turn and the conversation before it. The target ends with the first
    /// token that ends an answer; if the template renders none, that token is appended.
    ///
    /// # Errors
    /// When the template refuses the conversation, or renders the prompt otherwise once the answer
    /// is known: then there is nothing that the model could have continued.
    pub fn encode_turn(&self, before: &Conversation, turn: &Message) -> Result<TrainingTurn> {
        let prompt = self.renderer().render(before, true)?;
        let prompt_ids = self.encode(&prompt)?;
        let target_ids = self.encode_turn_after(before, &prompt, &prompt_ids, turn)?;
        Ok(TrainingTurn { prompt_ids, target_ids })
    }

    /// The target of a turn after a conversation that was rendered as `prompt`, with these ids.
    fn encode_turn_after(
        &self,
        before: &Conversation,
        prompt: &str,
        prompt_ids: &[i32],
        turn: &Message,
    ) -> Result<Vec<i32>> {
        let mut whole = before.clone();
        whole.messages.push(turn.clone());
        let text = self.renderer().render(&whole, false)?;
        let Some(continuation) = text.strip_prefix(prompt) else { return Err(not_a_prefix(prompt, &text)) };
        let ids = self.encode(&text)?;
        // Tokens may span the end of the prompt; the model continues after the prompt's own.
        let target_ids = match ids.strip_prefix(prompt_ids) {
            Some(rest) => rest.to_vec(),
            None => self.encode_continuation(continuation)?,
        };
        Ok(self.end_target(target_ids))
    }
}

fn not_a_prefix(prompt: &str, text: &str) -> Error {
    let equal = prompt.chars().zip(text.chars()).take_while(|(a, b)| a == b).count();
    let shown = |text: &str| text.chars().skip(equal).take(SHOWN_CHARS).collect::<String>();
    let before: String = prompt.chars().take(equal).skip(equal.saturating_sub(SHOWN_CHARS)).collect();
    Error::usage(format!(
        "the chat template does not continue the prompt with the answer: after {before:?} the prompt has {:?}, and the \
         conversation with the answer {:?}; choose other chat_template_kwargs, or another chat_template",
        shown(prompt),
        shown(text)
    ))
}
