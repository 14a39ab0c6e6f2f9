//! The model that answers the prompts.

use std::path::PathBuf;

use cllm_core::Result;
use cllm_core::chat_template::Rendering;
use cllm_core::checkpoint::{self, hub};
use cllm_core::model::ModelConfig;
use cllm_core::thought::{ThoughtLimit, ThoughtTokens};
use cllm_core::tokenizer::Tokenizer;

use super::settings::Settings;

/// The teacher without its weights, which are loaded when an answer is missing.
pub(super) struct Teacher {
    pub(super) folder: PathBuf,
    pub(super) config: ModelConfig,
    pub(super) tokenizer: Tokenizer,
    /// The tokens around its thoughts, if it is a thinking model.
    pub(super) thought_tokens: Option<ThoughtTokens>,
    pub(super) thought_limit: Option<ThoughtLimit>,
}

impl Teacher {
    /// Finds and checks the files of the model.
    ///
    /// # Errors
    /// For a model that is missing, broken or does not fit the settings, and for adapters that act on
    /// draft tokens alone: no recorded state would show them.
    pub(super) fn find(settings: &Settings, rendering: &Rendering) -> Result<Self> {
        let folder = hub::locate(&settings.model)?;
        checkpoint::refuse_draft_adapters(&folder, "no trajectory shows")?;
        let config = checkpoint::load_config(&folder)?;
        let tokenizer = Tokenizer::load_for(&folder, rendering)?;
        let tokenizer = tokenizer.with_eos_ids(settings.eos_ids.as_deref(), &folder, config.vocab_size)?;
        let thought_tokens = ThoughtTokens::find(&tokenizer)?;
        let new_limit = |max| ThoughtLimit::new(&tokenizer, max, settings.max_new_tokens);
        let thought_limit = settings.max_thinking_tokens.map(new_limit).transpose()?;
        checkpoint::check(&folder)?;
        Ok(Teacher { folder, config, tokenizer, thought_tokens, thought_limit })
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.config.vocab_size as usize
    }

    /// The longest prompt that fits the context together with its response.
    pub(super) fn max_prompt_tokens(&self, max_new_tokens: usize) -> usize {
        self.config.max_positions.saturating_sub(max_new_tokens)
    }

    /// Whether a prompt is not empty, and fits the context together with its response.
    pub(super) fn can_answer(&self, prompt_ids: &[i32], max_new_tokens: usize) -> bool {
        (1..=self.max_prompt_tokens(max_new_tokens)).contains(&prompt_ids.len())
    }
}
