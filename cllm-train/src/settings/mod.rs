//! Settings of a training run: one file per section. The doc comments are what
//! `cllm-train settings` and docs/configuration.md show.

mod consistency;
mod init;
mod optimizer;
mod sft;
mod validation;

use std::path::{Path, PathBuf};

use cllm_core::chat_template::RenderSettings;
use cllm_core::decode::{MAX_GATED_TOKENS, Strategy};
use cllm_core::model::{AdaptedTokens, LoraConfig, ModelConfig};
use cllm_core::settings::required_path;
use cllm_core::{Error, Result};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::byte_size::parse_bytes;
use crate::losses::Losses;
pub use consistency::{BlockContext, ConsistencySettings, Divergence, LabelSource, PositionWeights, StateSampling};
pub use init::InitSettings;
pub use optimizer::{OptimizerSettings, StateDtype};
pub use sft::SftSettings;
pub use validation::ValidationSettings;

/// What a run trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// Supervised fine-tuning on the references of prompt sets. Makes a teacher.
    Sft,
    /// Consistency training on trajectories: predict the fixed point from any state. Makes a
    /// student.
    Consistency,
}

/// A training run.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The model to start from: a folder, or an id in the Hugging Face cache. Either this or `init`
    /// must be given.
    #[garde(skip)]
    pub model: Option<String>,
    /// Start from random weights of this shape instead of `model`.
    #[garde(dive)]
    pub init: Option<InitSettings>,
    /// Train low-rank adapters beside the frozen weights of `model` (LoRA, arXiv 2106.09685);
    /// `null` trains every weight.
    #[garde(dive)]
    pub lora: Option<LoraConfig>,
    /// What the run trains.
    #[garde(skip)]
    pub objective: Objective,
    /// Prompt sets (`sft`) or trajectory data sets (`consistency`).
    #[garde(length(min = 1))]
    pub datasets: Vec<PathBuf>,
    /// Folder of the run.
    #[garde(custom(required_path))]
    pub output: PathBuf,
    /// Seed of random weights, of the order of the examples, and of the states drawn from them.
    #[garde(skip)]
    pub seed: u64,
    /// Passes over the data.
    #[garde(range(min = 1, max = 100_000))]
    pub epochs: usize,
    /// Stop after N steps; the learning rate schedule ends there too. `null` runs all epochs.
    #[garde(range(min = 1))]
    pub max_steps: Option<usize>,
    /// Maximum number of tokens in a forward. Examples, with their noisy blocks, are packed into
    /// batches of up to this size.
    #[garde(range(min = 1, max = 16_777_216))]
    pub max_batch_tokens: usize,
    /// Number of batches whose gradients are accumulated into one step, over all processes.
    #[garde(range(min = 1, max = 65_536))]
    pub accumulation: usize,
    /// Maximum number of packed tokens in an example. Longer examples are excluded, and their
    /// number is logged.
    #[garde(range(min = 1, max = 16_777_216))]
    pub max_example_tokens: usize,
    /// Number of leading layers with activation checkpointing: they save only their input and are
    /// recomputed in the backward. This saves memory and costs time. Layers before the first one with
    /// adapters count too, but save nothing in any case.
    #[garde(skip)]
    pub checkpointed_layers: usize,
    /// The optimizer.
    #[garde(dive)]
    pub optimizer: OptimizerSettings,
    /// The supervised objective.
    #[garde(dive)]
    pub sft: SftSettings,
    /// The consistency objective.
    #[garde(dive)]
    pub consistency: ConsistencySettings,
    /// Measurements on held-out data. The checkpoint `best` is the one with the most tokens per
    /// forward in finished answers among those that are accurate enough.
    #[garde(dive)]
    pub validation: ValidationSettings,
    /// Steps between lines of metrics.jsonl.
    #[garde(range(min = 1))]
    pub log_every: usize,
    /// Steps between checkpoints that the run can resume from. With `0` or `null` it saves one only
    /// when it is interrupted; `plan` and `run` say so if the disk has no room for that one.
    #[garde(skip)]
    pub save_every: Option<usize>,
    /// Number of checkpoints to keep, in addition to the best one.
    #[garde(range(min = 1))]
    pub max_checkpoints: usize,
    /// Save the training state after the last step too, and keep that of the checkpoints, to inspect
    /// it or to continue with tools of your own: no command continues a finished run. Without it, a
    /// finished run has models only.
    #[garde(skip)]
    pub keep_state: bool,
    /// Ids that end an answer, in place of the model's own. `sft` ends its answers with the first.
    /// They are also saved with the trained model, in place of those that it started from.
    #[garde(length(min = 1))]
    pub eos_ids: Option<Vec<i32>>,
    /// auto, cpu, cuda or cuda:N. `plan` also takes the name of a GPU that this machine may lack, such
    /// as `h100-80gb`, or several of them, `2xh100-80gb`; with an unknown name it lists those it knows.
    #[garde(skip)]
    pub device: String,
    /// Memory of the GPU to plan for, such as `80GB`, instead of that of `device`; with device=cpu,
    /// memory of the host. Only `plan` takes it.
    #[garde(custom(memory_size))]
    pub memory: Option<String>,
    /// How prompts are rendered, for `sft` and for validation.
    #[garde(dive)]
    #[serde(flatten)]
    pub rendering: RenderSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            model: None,
            init: None,
            lora: None,
            objective: Objective::Consistency,
            datasets: Vec::new(),
            output: PathBuf::new(),
            seed: 0,
            epochs: 4,
            max_steps: None,
            max_batch_tokens: 8192,
            accumulation: 1,
            max_example_tokens: 4096,
            checkpointed_layers: 0,
            optimizer: OptimizerSettings::default(),
            sft: SftSettings::default(),
            consistency: ConsistencySettings::default(),
            validation: ValidationSettings::default(),
            log_every: 10,
            save_every: Some(200),
            max_checkpoints: 2,
            keep_state: false,
            eos_ids: None,
            device: "auto".to_owned(),
            memory: None,
            rendering: RenderSettings::default(),
        }
    }
}

#[cfg(test)]
impl Settings {
    /// The simplest run: one pass over the data, no second model, no average of the weights.
    pub fn plain() -> Self {
        let plain = ConsistencySettings { ar_weight: 10.0, anchor_weight: 0.0, ..ConsistencySettings::default() };
        let optimizer = OptimizerSettings { ema_decay: None, ..OptimizerSettings::default() };
        Settings { epochs: 1, consistency: plain, optimizer, ..Settings::default() }
    }
}

fn memory_size(memory: &Option<String>, _: &()) -> garde::Result {
    match memory {
        Some(text) if parse_bytes(text).is_none() => Err(garde::Error::new("expected a size such as 80GB")),
        _ => Ok(()),
    }
}

impl Settings {
    /// Whether a frozen model runs beside the student: for the anchor loss, or for the targets of the
    /// global loss. Below adapters for draft tokens, the student's own clean stream is frozen.
    pub fn is_anchored(&self) -> bool {
        let consistency = &self.consistency;
        self.objective == Objective::Consistency
            && (consistency.anchor_weight > 0.0 || consistency.has_frozen_targets() && !self.adapts_drafts())
    }

    /// Whether the run trains adapters that act on draft tokens alone.
    pub fn adapts_drafts(&self) -> bool {
        self.lora.as_ref().is_some_and(|lora| lora.on == AdaptedTokens::Drafts)
    }

    /// Whether the anchor is a model of its own. Below adapters is the initial model, which is also
    /// the anchor unless the settings name another.
    pub fn has_second_model(&self) -> bool {
        self.is_anchored() && (self.lora.is_none() || self.consistency.anchor.is_some())
    }

    /// Whether a checkpoint to resume from is due after a step, counted from 1.
    pub fn saves_after(&self, step: usize) -> bool {
        self.save_every.is_some_and(|every| step.is_multiple_of(every))
    }

    /// The weight of each loss in the total.
    pub fn loss_weights(&self) -> Losses<f64> {
        let ConsistencySettings { ar_weight, global_weight, local_weight, anchor_weight, .. } = self.consistency;
        match self.objective {
            Objective::Sft => Losses { ar: 1.0, ..Losses::default() },
            Objective::Consistency => {
                Losses { ar: ar_weight, global: global_weight, local: local_weight, anchor: anchor_weight }
            }
        }
    }

    /// How many numbers of a model with this configuration the run trains: all weights, or the
    /// adapters only.
    pub fn trained_parameters(&self, config: &ModelConfig) -> i64 {
        self.lora.as_ref().map_or_else(|| config.num_parameters(), |lora| lora.num_parameters(config))
    }

    /// Whether each process keeps only its shard of the gradients. That costs no more communication
    /// than to sum them once in a step if each has at most one batch in it. Adapters have few.
    pub fn shards_gradients(&self, world_size: usize) -> bool {
        world_size > 1 && self.accumulation == world_size && self.lora.is_none()
    }

    /// Checks that a run can be divided over so many processes.
    ///
    /// # Errors
    /// [`Error::Usage`] if a step has fewer batches than there are processes.
    pub fn check_processes(&self, world_size: usize) -> Result<()> {
        if self.accumulation >= world_size {
            return Ok(());
        }
        Err(Error::usage(format!(
            "accumulation={} is too few for {world_size} processes, because each needs a batch: set \
             accumulation={world_size} (or a multiple of it)",
            self.accumulation
        )))
    }

    /// How validation answers its prompts.
    pub fn probe_strategy(&self) -> Strategy {
        let n = self.validation.n;
        if self.adapts_drafts() { Strategy::gated(n) } else { Strategy::Jacobi { n } }
    }

    /// Checks what a run with adapters for draft tokens cannot have: losses of other tokens, which
    /// the frozen model computes, and what has no effect on those of the draft tokens.
    fn check_draft_adapters(&self) -> Result<()> {
        let usage = |message: String| Err(Error::usage(message));
        let ConsistencySettings { ar_weight, anchor_weight, global_weight, local_weight, .. } = self.consistency;
        if self.objective != Objective::Consistency {
            return usage(
                "lora.on=drafts needs objective=consistency: other objectives have no draft tokens".to_owned(),
            );
        }
        let weights = [("ar_weight", ar_weight), ("anchor_weight", anchor_weight)];
        let unused: Vec<String> = weights
            .into_iter()
            .filter(|&(_, weight)| weight != 0.0)
            .map(|(name, _)| format!("consistency.{name}=0"))
            .collect();
        if !unused.is_empty() {
            return usage(format!(
                "lora.on=drafts leaves the model's answers as they are, so it needs no loss that teaches or keeps them: add {}",
                unused.join(" ")
            ));
        }
        if global_weight == 0.0 && local_weight == 0.0 {
            return usage(
                "consistency.global_weight and consistency.local_weight are both 0, and lora.on=drafts has no other loss: \
                 nothing would be trained"
                    .to_owned(),
            );
        }
        self.check_draft_context()?;
        let n = self.validation.n;
        if n > MAX_GATED_TOKENS {
            return usage(format!(
                "validation.n={n} is too large with lora.on=drafts, because a forward has each token of a window twice: \
                 set it from 2 to {MAX_GATED_TOKENS}"
            ));
        }
        Ok(())
    }

    /// Checks that adapters for draft tokens are trained on what they read when they decode, and by
    /// nothing but the model that they belong to.
    fn check_draft_context(&self) -> Result<()> {
        let ConsistencySettings { anchor, labels, context, .. } = &self.consistency;
        if anchor.is_some() {
            return Err(Error::usage(
                "consistency.anchor has no effect with lora.on=drafts, whose targets are those of `model`: set it to null",
            ));
        }
        if *labels == LabelSource::Dataset {
            return Err(Error::usage(
                "consistency.labels=dataset has no effect with lora.on=drafts, which has no autoregressive loss: set it to \
                 teacher",
            ));
        }
        if *context == BlockContext::NoisyWindow {
            return Err(Error::usage(
                "consistency.context=noisy_window does not go with lora.on=drafts, because `gated` decodes every window \
                 after accepted tokens alone: set it to clean",
            ));
        }
        Ok(())
    }

    /// Checks the rules that involve more than one key.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the keys.
    pub fn check(&self) -> Result<()> {
        let usage = |message: &str| Err(Error::usage(message));
        match (&self.init, &self.model) {
            (None, None) => return usage("model: expected a folder or an id (or `init`, for random weights)"),
            (Some(_), Some(_)) => return usage("model and init are both set: choose one to start from"),
            _ => {}
        }
        let folder = |path: &Path| path.canonicalize().ok();
        if self
            .model
            .as_ref()
            .and_then(|model| folder(Path::new(model)))
            .is_some_and(|model| Some(model) == folder(&self.output))
        {
            return usage("output is the folder of the model: choose another, since a run writes its files there");
        }
        if self.init.is_some() && self.lora.is_some() {
            return usage("lora needs `model`: adapters do not turn random weights into a model");
        }
        if self.init.is_some() && self.is_anchored() && self.consistency.anchor.is_none() {
            return usage(
                "random weights cannot be an anchor: set consistency.anchor_weight=0 and consistency.ar_weight=10, or name a \
                 model in consistency.anchor",
            );
        }
        if self.lora.is_some() && self.optimizer.state_dtype == StateDtype::Bfloat16 {
            return usage(
                "optimizer.state_dtype must be float32 with lora: adapters are float32, and so is their state",
            );
        }
        if self.adapts_drafts() {
            self.check_draft_adapters()?;
        }
        if self.consistency.context == BlockContext::NoisyWindow && self.consistency.max_blocks.is_some() {
            return usage(
                "consistency.max_blocks must be null with consistency.context=noisy_window: a window needs all its blocks",
            );
        }
        if self.consistency.context == BlockContext::NoisyWindow && self.consistency.min_block_tokens.is_some() {
            return usage(
                "consistency.min_block_tokens must be null with consistency.context=noisy_window: later blocks attend to \
                 whole ones",
            );
        }
        if self.objective == Objective::Sft && self.validation.trajectories.is_some() {
            return usage("validation.trajectories needs objective=consistency: sft has no losses on trajectories");
        }
        if self.validation.patience.is_some() && self.validation.prompts.is_none() {
            return usage("validation.patience needs validation.prompts: without answers there is no best checkpoint");
        }
        if self.max_example_tokens > self.max_batch_tokens {
            return Err(Error::usage(format!(
                "max_example_tokens ({}) is larger than max_batch_tokens ({}): an example must fit into a batch",
                self.max_example_tokens, self.max_batch_tokens
            )));
        }
        Ok(())
    }
}
