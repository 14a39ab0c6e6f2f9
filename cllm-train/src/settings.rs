//! Settings of a training run; `cllm-train validate` prints them in full.

use std::path::PathBuf;

use cllm_core::model::{Lora, ModelConfig};
use cllm_core::{Error, Result};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is learnt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// The references of prompt sets: makes a teacher.
    Sft,
    /// To jump to the fixed points of trajectories: makes a student.
    Consistency,
}

/// Which divergence the consistency loss takes, with the detached clean distribution first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Divergence {
    /// KL(clean || noisy).
    Forward,
    /// KL(noisy || clean).
    Reverse,
    /// Jensen-Shannon.
    Jsd,
}

/// How the losses of single tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// Each loss is a mean over its own tokens in all batches of a step.
    TokenMean,
}

/// What a noisy block sees before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Context {
    /// The clean response (CLLM).
    Clean,
    /// The noisy blocks of its window, and the clean response before the window (Jacobi Forcing).
    NoisyWindow,
}

/// In what the optimizer keeps its state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Float32 moments, and float32 masters of weights that are not.
    Float32,
    /// Moments in bf16 and no masters, rounded at random: 4 bytes a weight instead of 12. For bf16 weights (on a GPU).
    Bfloat16,
}

/// Which answers the autoregressive loss teaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Labels {
    /// The teacher's response of each trajectory.
    Teacher,
    /// The data set's own answer to each prompt, as a sequence of its own; rows without one have a part in the other losses alone.
    Dataset,
}

/// Which recorded state of a block is trained in a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum States {
    /// Each is as likely as the others (CLLM).
    Uniform,
    /// That whose share of wrong tokens is nearest to a ratio that rises from 0 to 1 over the blocks of a window (Jacobi Forcing).
    Progressive,
}

/// A training run.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The model to start from: a folder, or an id in the Hugging Face cache. Empty with `init`.
    #[garde(skip)]
    pub model: String,
    /// Start from random weights of this shape instead.
    #[garde(dive)]
    pub init: Option<Init>,
    /// Train low-rank adapters beside the frozen weights of `model` (LoRA, arXiv 2106.09685); without it, every weight.
    #[garde(dive)]
    pub lora: Option<Lora>,
    /// What is learnt.
    #[garde(skip)]
    pub objective: Objective,
    /// Prompt sets (sft) or trajectory data sets (consistency).
    #[garde(length(min = 1))]
    pub data: Vec<PathBuf>,
    /// Folder of the run.
    #[garde(length(min = 1))]
    pub output: String,
    /// Seed of order, states and random weights.
    #[garde(skip)]
    pub seed: u64,
    /// Passes over the data.
    #[garde(range(min = 1))]
    pub epochs: usize,
    /// Stop after so many steps; 0 for the epochs alone. The learning rate's schedule ends there too.
    #[garde(skip)]
    pub max_steps: usize,
    /// Most tokens of one forward: so many responses, with their noisy blocks, are packed one behind another.
    #[garde(range(min = 1))]
    pub tokens_per_batch: usize,
    /// Forwards whose gradients make one step.
    #[garde(range(min = 1))]
    pub accumulation: usize,
    /// Responses of more packed tokens are left out, and counted.
    #[garde(range(min = 1))]
    pub max_tokens: usize,
    /// Leading layers that are computed again in the backward, so that only their input is kept: less memory, more time.
    #[garde(skip)]
    pub recompute: usize,
    /// The optimizer.
    #[garde(dive)]
    pub optimizer: Optimizer,
    /// The consistency objective.
    #[garde(dive)]
    pub consistency: Consistency,
    /// Speed, accuracy and losses on held-out data; the checkpoint `best` has most tokens per forward in the answers that ended,
    /// of all that are accurate enough.
    #[garde(dive)]
    pub probe: Probe,
    /// Steps between lines of metrics.jsonl.
    #[garde(range(min = 1))]
    pub log_every: usize,
    /// Steps between checkpoints; 0 for none but the last.
    #[garde(skip)]
    pub save_every: usize,
    /// Checkpoints that are kept, the best aside.
    #[garde(range(min = 1))]
    pub keep: usize,
    /// Ids that end an answer, instead of the model's own; the first ends the answers of sft. The trained model names them too.
    #[garde(skip)]
    pub eos_ids: Vec<i32>,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
}

/// A Llama of random weights.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Init {
    /// Folder of its tokenizer (see `cllm-train tokenizer`).
    #[garde(length(min = 1))]
    pub tokenizer: String,
    /// Width of the residual stream.
    #[garde(range(min = 2))]
    pub hidden_size: i64,
    /// Width of the feed-forward layer.
    #[garde(range(min = 2))]
    pub intermediate_size: i64,
    /// Layers.
    #[garde(range(min = 1))]
    pub num_layers: i64,
    /// Query heads.
    #[garde(range(min = 1))]
    pub num_heads: i64,
    /// Key and value heads.
    #[garde(range(min = 1))]
    pub num_kv_heads: i64,
    /// Most positions.
    #[garde(range(min = 16))]
    pub max_positions: i64,
}

/// AdamW with warm-up and cosine decay.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Optimizer {
    /// Highest learning rate.
    #[garde(range(min = 0.0, max = 1.0))]
    pub lr: f64,
    /// Decay of the first moment; at 1 the update would divide by zero.
    #[garde(range(min = 0.0, max = 0.99999))]
    pub beta1: f64,
    /// Decay of the second moment; likewise.
    #[garde(range(min = 0.0, max = 0.99999))]
    pub beta2: f64,
    /// Added to the denominator, which may be 0 without it.
    #[garde(range(min = 1e-15, max = 1.0))]
    pub eps: f64,
    /// Decoupled weight decay, of matrices alone.
    #[garde(range(min = 0.0, max = 1.0))]
    pub weight_decay: f64,
    /// Share of the steps in which the rate rises.
    #[garde(range(min = 0.0, max = 1.0))]
    pub warmup: f64,
    /// The last rate, as a share of the highest.
    #[garde(range(min = 0.0, max = 1.0))]
    pub min_lr: f64,
    /// Largest norm of the gradient; 0 for no clipping.
    #[garde(range(min = 0.0))]
    pub clip: f64,
    /// In what moments and masters are kept.
    #[garde(skip)]
    pub state: Precision,
    /// Decay of an exponential moving average of the weights, which then is what checkpoints, the final model and the probe have;
    /// 0 for none. 0.999 averages about the last thousand steps.
    #[garde(range(min = 0.0, max = 0.999_999))]
    pub ema: f64,
}

/// The consistency objective.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Consistency {
    /// Weight of the global consistency loss (a state towards the fixed point), a mean over noisy tokens.
    #[garde(range(min = 0.0))]
    pub weight: f64,
    /// Weight of the local consistency loss (a state towards the next one), a mean over its tokens; 0 leaves it out. States
    /// that `augment` changed have no next one.
    #[garde(range(min = 0.0))]
    pub local_weight: f64,
    /// Weight of the autoregressive loss, a mean over the tokens of the labels.
    #[garde(range(min = 0.0))]
    pub ar_weight: f64,
    /// Which answers the autoregressive loss teaches.
    #[garde(skip)]
    pub labels: Labels,
    /// Weight of the anchor, a mean over its tokens: KL from the distributions of a frozen model to the student's, so that the
    /// student keeps that model's answers on prompts it never saw. 0 leaves it out.
    #[garde(range(min = 0.0))]
    pub anchor_weight: f64,
    /// Folder or id of the frozen model; without it, the model that the run starts from.
    #[garde(skip)]
    pub anchor: Option<String>,
    /// Share of the prompts' tokens that the anchor holds, besides all of the responses'.
    #[garde(range(min = 0.0, max = 1.0))]
    pub anchor_prompts: f64,
    /// How each loss is reduced, before its weight.
    #[garde(skip)]
    pub reduction: Reduction,
    /// The divergence.
    #[garde(skip)]
    pub divergence: Divergence,
    /// What a noisy block sees.
    #[garde(skip)]
    pub context: Context,
    /// Which state of a block is trained.
    #[garde(skip)]
    pub states: States,
    /// Blocks of a window (`noisy_window`, `progressive`).
    #[garde(range(min = 1))]
    pub window: usize,
    /// Blocks of a response that are trained in a pass, drawn anew each epoch; 0 for all.
    #[garde(skip)]
    pub blocks: usize,
}

/// Speed, accuracy and losses on held-out data during training.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Probe {
    /// The prompt set that is answered; empty for none.
    #[garde(skip)]
    pub prompts: PathBuf,
    /// Folder of the benchmark's files, to score answers that need them: Spider's databases.
    #[garde(skip)]
    pub data: Option<PathBuf>,
    /// A trajectory data set, held out, of which the losses are taken (consistency); empty for none.
    #[garde(skip)]
    pub trajectories: PathBuf,
    /// Prompts that are answered, and rows of the trajectories: the first so many.
    #[garde(range(min = 1))]
    pub count: usize,
    /// Steps between probes; the first is of the model that the run starts from.
    #[garde(range(min = 1))]
    pub every: usize,
    /// By how much the accuracy of the best checkpoint may be below that of the model that the run starts from; a share of the
    /// answers.
    #[garde(range(min = 0.0, max = 1.0))]
    pub max_accuracy_drop: f64,
    /// Probes without a new best after which the run ends; 0 for never.
    #[garde(skip)]
    pub patience: usize,
    /// Tokens of a block.
    #[garde(range(min = 2))]
    pub n: usize,
    /// Most tokens of an answer.
    #[garde(range(min = 1))]
    pub max_new_tokens: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            model: String::new(),
            init: None,
            lora: None,
            objective: Objective::Consistency,
            data: Vec::new(),
            output: String::new(),
            seed: 0,
            epochs: 1,
            max_steps: 0,
            tokens_per_batch: 8192,
            accumulation: 1,
            max_tokens: 4096,
            recompute: 0,
            optimizer: Optimizer::default(),
            consistency: Consistency::default(),
            probe: Probe::default(),
            log_every: 10,
            save_every: 200,
            keep: 2,
            eos_ids: Vec::new(),
            device: "auto".to_owned(),
        }
    }
}

impl Default for Init {
    fn default() -> Self {
        Init {
            tokenizer: String::new(),
            hidden_size: 128,
            intermediate_size: 384,
            num_layers: 4,
            num_heads: 4,
            num_kv_heads: 4,
            max_positions: 512,
        }
    }
}

impl Default for Optimizer {
    fn default() -> Self {
        Optimizer {
            lr: 3e-4,
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-8,
            weight_decay: 0.0,
            warmup: 0.05,
            min_lr: 0.1,
            clip: 1.0,
            state: Precision::Float32,
            ema: 0.0,
        }
    }
}

impl Default for Consistency {
    fn default() -> Self {
        Consistency {
            weight: 1.0,
            local_weight: 0.0,
            ar_weight: 10.0,
            labels: Labels::Teacher,
            anchor_weight: 0.0,
            anchor: None,
            anchor_prompts: 0.0,
            reduction: Reduction::TokenMean,
            divergence: Divergence::Forward,
            context: Context::Clean,
            states: States::Uniform,
            window: 4,
            blocks: 0,
        }
    }
}

impl Default for Probe {
    fn default() -> Self {
        Probe {
            prompts: PathBuf::new(),
            data: None,
            trajectories: PathBuf::new(),
            count: 32,
            every: 200,
            max_accuracy_drop: 0.05,
            patience: 0,
            n: 16,
            max_new_tokens: 256,
        }
    }
}

impl Settings {
    /// Whether the student is held to a frozen model.
    pub fn anchored(&self) -> bool {
        self.objective == Objective::Consistency && self.consistency.anchor_weight > 0.0
    }

    /// Numbers that a run changes of a model of this shape: its weights, or the adapters alone.
    pub fn trained_parameters(&self, config: &ModelConfig) -> i64 {
        self.lora.as_ref().map_or_else(|| config.parameter_count(), |lora| lora.parameter_count(config))
    }

    /// Rules over several keys.
    ///
    /// # Errors
    /// [`Error::Usage`] naming both keys.
    pub fn check(&self) -> Result<()> {
        match (&self.init, self.model.is_empty()) {
            (None, true) => {
                return Err(Error::usage("model: expected a folder or an id (or `init`, for random weights)"));
            }
            (Some(_), false) => return Err(Error::usage("model and init are both set: give the one to start from")),
            _ => {}
        }
        if self.init.is_some() && self.anchored() && self.consistency.anchor.is_none() {
            return Err(Error::usage(
                "consistency.anchor_weight needs `model` or consistency.anchor: random weights are nothing to hold on to",
            ));
        }
        if self.init.is_some() && self.lora.is_some() {
            return Err(Error::usage("lora needs `model`: adapters alone make no model out of random weights"));
        }
        if self.consistency.context == Context::NoisyWindow && self.consistency.blocks != 0 {
            return Err(Error::usage(
                "consistency.blocks must be 0 with consistency.context=noisy_window: a window needs all",
            ));
        }
        if self.objective == Objective::Sft && !self.probe.trajectories.as_os_str().is_empty() {
            return Err(Error::usage(
                "probe.trajectories needs objective=consistency: its losses are those of trajectories",
            ));
        }
        if self.probe.patience > 0 && self.probe.prompts.as_os_str().is_empty() {
            return Err(Error::usage(
                "probe.patience needs probe.prompts: without answers there is no best checkpoint",
            ));
        }
        if self.max_tokens > self.tokens_per_batch {
            return Err(Error::usage(format!(
                "max_tokens ({}) is more than tokens_per_batch ({}): such a response fits no batch",
                self.max_tokens, self.tokens_per_batch
            )));
        }
        Ok(())
    }
}
