//! Which models a server has, from its settings: the model with its strategy, and one beside it that
//! decodes autoregressively.

use std::path::PathBuf;
use std::sync::Arc;

use cllm_core::chat_template::{self, Message};
use cllm_core::checkpoint::{self, hub};
use cllm_core::decode::{LiveRows, Strategy};
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::prompt_set::Prompt;
use cllm_core::thought::ThoughtLimit;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device};
use tokio::sync::Semaphore;

use super::engine::LaneModel;
use super::models::ServedModel;
use super::settings::ServeSettings;
use crate::draft_adapters;

/// The context of a server whose settings do not say it, if the model's is not shorter.
const DEFAULT_CONTEXT: usize = 2048;
/// Maximum number of answers that are decoded autoregressively beside the model's own.
const MAX_AR_ROWS: usize = 8;

/// A model's files except its weights.
struct Source {
    name: String,
    folder: PathBuf,
    config: ModelConfig,
    tokenizer: Arc<Tokenizer>,
    thought_limit: Option<ThoughtLimit>,
}

/// What is served, and from which files.
pub(super) struct Plan {
    sources: Vec<Source>,
    lanes: Vec<Lane>,
}

struct Lane {
    id: String,
    /// Index of the model that decides, and of the one that drafts for it.
    source: usize,
    draft: Option<usize>,
    strategy: Strategy,
    rows: LiveRows,
    context: usize,
    max_answers: usize,
}

/// Reads the files of the models, except their weights.
///
/// # Errors
/// When a file is missing or broken, or settings do not fit the models.
pub(super) fn plan(settings: &ServeSettings) -> Result<Plan> {
    let names = std::iter::once(&settings.model).chain(&settings.teacher);
    let sources = names.map(|name| Source::read(name, settings)).collect::<Result<Vec<_>>>()?;
    let teacher = sources.len() - 1;
    let strategy = strategy(settings, &sources[0])?;
    if strategy.needs_draft_model() && settings.teacher.is_none() {
        return Err(Error::usage(
            "strategy `drafted` needs the model that decides: set teacher=..., for which `model` drafts",
        ));
    }
    let (source, draft) = if strategy.needs_draft_model() { (teacher, Some(0)) } else { (0, None) };
    let context = |source: &Source| resolve_context(settings.context, source);
    let mut lanes = vec![Lane {
        id: settings.model.clone(),
        source,
        draft,
        strategy,
        rows: rows(settings.batch_size),
        context: context(&sources[source])?,
        max_answers: settings.batch_size + settings.max_queue,
    }];
    if teacher > 0 || strategy != Strategy::Ar {
        let num_rows = settings.batch_size.min(MAX_AR_ROWS);
        let other_name = settings.teacher.clone().filter(|name| *name != settings.model);
        lanes.push(Lane {
            id: other_name.unwrap_or_else(|| format!("{}:ar", settings.model)),
            source: teacher,
            draft: None,
            strategy: Strategy::Ar,
            rows: rows(num_rows),
            context: context(&sources[teacher])?,
            max_answers: num_rows + settings.max_queue,
        });
    }
    Ok(Plan { sources, lanes })
}

/// The strategy of the settings, or the one that suits the model.
fn strategy(settings: &ServeSettings, source: &Source) -> Result<Strategy> {
    let Some(strategy) = settings.strategy else {
        return Ok(Strategy::suitable(16, checkpoint::adapts_drafts(&source.folder)?));
    };
    draft_adapters::check(&source.folder, &[strategy], "strategy={gated: {n: 16}}")?;
    Ok(strategy)
}

/// A quarter of as many rows as sequences keep the beginnings of prompts.
fn rows(max_running: usize) -> LiveRows {
    LiveRows { max_running, num_prefix_rows: max_running.div_ceil(4) }
}

fn resolve_context(given: Option<usize>, source: &Source) -> Result<usize> {
    let (max, name) = (source.config.max_positions, &source.name);
    match given {
        None => Ok(max.min(DEFAULT_CONTEXT)),
        Some(context) if context <= max => Ok(context),
        Some(context) => Err(Error::usage(format!(
            "context={context}: {name} has a context of {max} tokens: set context to {max} at most"
        ))),
    }
}

impl Source {
    fn read(name: &str, settings: &ServeSettings) -> Result<Self> {
        let folder = hub::locate(name)?;
        let config = checkpoint::load_config(&folder)?;
        checkpoint::check(&folder)?;
        let tokenizer = Tokenizer::load_for(&folder, &settings.rendering.resolve(chat_template::today())?)?;
        let tokenizer = tokenizer.with_eos_ids(settings.eos_ids.as_deref(), &folder, config.vocab_size)?;
        let new_limit = |max| ThoughtLimit::new(&tokenizer, max, settings.max_new_tokens);
        let thought_limit = settings.max_thinking_tokens.map(new_limit).transpose()?;
        Ok(Source { name: name.to_owned(), folder, config, tokenizer: Arc::new(tokenizer), thought_limit })
    }

    fn is_chat(&self) -> bool {
        let question = Prompt::Conversation(vec![Message::new("user", "Hello")].into());
        self.tokenizer.encode_prompt(&question).is_ok()
    }
}

impl Plan {
    /// Loads the weights of all models.
    ///
    /// # Errors
    /// When they are broken or memory runs out.
    pub(super) fn load_weights(&self, settings: &ServeSettings) -> Result<Vec<Transformer>> {
        let device = device::parse(&settings.device)?;
        let kind = device::default_kind(device);
        self.sources.iter().map(|source| checkpoint::load(&source.folder, device, kind)).collect()
    }

    pub(super) fn lane_models<'m>(&self, weights: &'m [Transformer]) -> Vec<LaneModel<'m>> {
        let lane_model = |lane: &Lane| LaneModel {
            id: lane.id.clone(),
            model: &weights[lane.source],
            draft_model: lane.draft.map(|draft| &weights[draft]),
            strategy: lane.strategy,
            rows: lane.rows,
            context: lane.context,
        };
        self.lanes.iter().map(lane_model).collect()
    }

    pub(super) fn served_models(&self) -> Vec<Arc<ServedModel>> {
        let served = |(index, lane): (usize, &Lane)| {
            let source = &self.sources[lane.source];
            Arc::new(ServedModel {
                id: lane.id.clone(),
                lane: index,
                strategy: lane.strategy.to_string(),
                tokenizer: Arc::clone(&source.tokenizer),
                thought_limit: source.thought_limit.clone(),
                vocab_size: source.config.vocab_size,
                context: lane.context,
                is_chat: source.is_chat(),
                room: Arc::new(Semaphore::new(lane.max_answers)),
                max_answers: lane.max_answers,
            })
        };
        self.lanes.iter().enumerate().map(served).collect()
    }
}
