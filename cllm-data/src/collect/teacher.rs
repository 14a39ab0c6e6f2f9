//! The model that answers the prompts.

use std::path::PathBuf;

use cllm_core::chat_template::Rendering;
use cllm_core::checkpoint::{self, hub};
use cllm_core::distributed::ProcessEnv;
use cllm_core::model::Transformer;
use cllm_core::thought::{ThoughtLimit, ThoughtTokens};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Result, device};

use super::settings::Settings;

pub(super) struct Teacher {
    pub(super) folder: PathBuf,
    pub(super) tokenizer: Tokenizer,
    /// The tokens around its thoughts, if it is a thinking model.
    pub(super) thought_tokens: Option<ThoughtTokens>,
    pub(super) thought_limit: Option<ThoughtLimit>,
    pub(super) model: Transformer,
}

impl Teacher {
    /// Loads the model onto the device of this process.
    ///
    /// # Errors
    /// For a model that is missing, broken or does not fit the settings, and for adapters that act on
    /// draft tokens alone: no recorded state would show them.
    pub(super) fn load(settings: &Settings, rendering: &Rendering, process: Option<&ProcessEnv>) -> Result<Self> {
        let device = device::for_process(&settings.device, process)?;
        let folder = hub::locate(&settings.model)?;
        checkpoint::refuse_draft_adapters(&folder, "no trajectory shows")?;
        let vocab_size = checkpoint::load_config(&folder)?.vocab_size;
        let tokenizer = Tokenizer::load_for(&folder, rendering)?;
        let tokenizer = tokenizer.with_eos_ids(settings.eos_ids.as_deref(), &folder, vocab_size)?;
        let thought_tokens = ThoughtTokens::find(&tokenizer)?;
        let new_limit = |max| ThoughtLimit::new(&tokenizer, max, settings.max_new_tokens);
        let thought_limit = settings.max_thinking_tokens.map(new_limit).transpose()?;
        let model = checkpoint::load(&folder, device, device::default_kind(device))?;
        Ok(Teacher { folder, tokenizer, thought_tokens, thought_limit, model })
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.model.config().vocab_size as usize
    }

    /// The longest prompt that fits the context together with its response.
    pub(super) fn max_prompt_tokens(&self, max_new_tokens: usize) -> usize {
        self.model.config().max_positions.saturating_sub(max_new_tokens)
    }
}
