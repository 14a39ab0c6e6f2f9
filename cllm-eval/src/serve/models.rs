//! The models of a server as its endpoints see them.

use std::sync::Arc;

use axum::http::StatusCode;
use cllm_core::decode::StopConditions;
use cllm_core::prompt_set::Prompt;
use cllm_core::thought::ThoughtLimit;
use cllm_core::tokenizer::Tokenizer;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::api_error::ApiError;
use super::requests::{PromptText, Prompts};

/// A model that requests can name.
pub(super) struct ServedModel {
    pub(super) id: String,
    /// Its lane of the engine.
    pub(super) lane: usize,
    pub(super) strategy: String,
    pub(super) tokenizer: Arc<Tokenizer>,
    pub(super) thought_limit: Option<ThoughtLimit>,
    pub(super) vocab_size: i64,
    /// Maximum number of tokens of a prompt with its answer.
    pub(super) context: usize,
    /// Whether it has a chat template.
    pub(super) is_chat: bool,
    /// Room for answers that run or wait.
    pub(super) room: Arc<Semaphore>,
    pub(super) max_answers: usize,
}

/// A prompt as text and tokens.
pub(super) struct EncodedPrompt {
    pub(super) text: String,
    pub(super) ids: Vec<i32>,
}

impl ServedModel {
    /// What `/v1/models` says about it.
    pub(super) fn json(&self, created: u64) -> Value {
        json!({
            "id": self.id, "object": "model", "created": created, "owned_by": "cllm", "strategy": self.strategy,
            "max_model_len": self.context, "chat": self.is_chat,
        })
    }

    /// Renders and tokenizes the prompts.
    ///
    /// # Errors
    /// For prompts that the chat template refuses, and for ids that the model does not have.
    pub(super) fn encode(&self, prompts: Prompts) -> Result<Vec<EncodedPrompt>, ApiError> {
        match prompts {
            Prompts::Chat(conversation) => {
                let (text, ids) = self.encode_prompt(&Prompt::Conversation(*conversation), "messages")?;
                Ok(vec![EncodedPrompt { text, ids }])
            }
            Prompts::Texts(prompts) => prompts.into_iter().map(|prompt| self.encode_text(prompt)).collect(),
        }
    }

    fn encode_text(&self, prompt: PromptText) -> Result<EncodedPrompt, ApiError> {
        let (text, ids) = match prompt {
            PromptText::Text(text) => self.encode_prompt(&Prompt::Text(text), "prompt")?,
            PromptText::Ids(ids) => match ids.iter().find(|&&id| id < 0 || i64::from(id) >= self.vocab_size) {
                Some(id) => {
                    let last = self.vocab_size - 1;
                    return Err(ApiError::field("prompt", format!("has the token id {id}: ids are from 0 to {last}")));
                }
                None => {
                    (self.tokenizer.decode(&ids).map_err(|error| ApiError::field("prompt", error.to_string()))?, ids)
                }
            },
        };
        Ok(EncodedPrompt { text, ids })
    }

    fn encode_prompt(&self, prompt: &Prompt, param: &str) -> Result<(String, Vec<i32>), ApiError> {
        self.tokenizer.encode_prompt(prompt).map_err(|error| ApiError::field(param, error.to_string()))
    }

    /// The maximum number of new tokens after a prompt; `None` asks for `default` or what fits.
    ///
    /// # Errors
    /// If they do not fit the context.
    pub(super) fn max_new_tokens(
        &self,
        prompt_ids: &[i32],
        asked: Option<usize>,
        default: usize,
        param: &str,
    ) -> Result<usize, ApiError> {
        let (num_prompt_tokens, context) = (prompt_ids.len(), self.context);
        if num_prompt_tokens == 0 {
            return Err(ApiError::field(param, "is empty: there is nothing to continue"));
        }
        let room = context.saturating_sub(num_prompt_tokens);
        let max_new_tokens = asked.unwrap_or(default.min(room.max(1)));
        if max_new_tokens <= room {
            return Ok(max_new_tokens);
        }
        let message = format!(
            "{num_prompt_tokens} prompt tokens and {max_new_tokens} new tokens do not fit the context of {context} tokens: \
             shorten the prompt, or lower max_tokens"
        );
        Err(ApiError::field(param, message).with_code("context_length_exceeded"))
    }

    /// When an answer of at most so many tokens ends. One that would end before it could go on after a
    /// thought of the greatest length has no limit on thoughts.
    pub(super) fn stop_conditions(&self, max_new_tokens: usize) -> StopConditions {
        let thought_limit = self.thought_limit.clone().filter(|limit| limit.leaves_room(max_new_tokens));
        StopConditions { thought_limit, ..StopConditions::new(max_new_tokens, self.tokenizer.eos_ids().to_vec()) }
    }

    /// Takes room for some answers, for as long as the result lives.
    ///
    /// # Errors
    /// If too many answers are waiting, or as many could never wait.
    pub(super) fn reserve(&self, num_answers: usize) -> Result<OwnedSemaphorePermit, ApiError> {
        let max = self.max_answers;
        if num_answers > max {
            let message =
                format!("{num_answers} answers at once are more than the server takes ({max}): ask for fewer");
            return Err(ApiError { param: Some("n".to_owned()), ..ApiError::new(StatusCode::BAD_REQUEST, message) });
        }
        let permits = Arc::clone(&self.room).try_acquire_many_owned(num_answers as u32);
        permits.map_err(|_| ApiError::queue_is_full())
    }
}
