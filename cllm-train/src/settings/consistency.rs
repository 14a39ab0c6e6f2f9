use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Divergence of the student's distribution from its (detached) target distribution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// KL(target || student).
    Forward,
    /// KL(student || target).
    Reverse,
    /// Jensen-Shannon divergence.
    Jsd,
    /// Negative logarithm of the acceptance rate a = sum of min(target, student) (LK,
    /// arXiv 2602.23881).
    Nla,
    /// w KL(target || student) + (1 - w) (1 - a), where w = exp(-3 a) moves from the first term to
    /// the second as the acceptance rate a grows (LK).
    LkHybrid,
}

/// How much the positions of a noisy block count in the global loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PositionWeights {
    /// All the same.
    Uniform,
    /// By what they contribute to the expected number of accepted tokens, given the student's
    /// present confidence in each token of the block (D-PACE, arXiv 2605.18810).
    Acceptance,
}

/// What a noisy block attends to before its own tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BlockContext {
    /// The clean response up to the block (CLLM).
    Clean,
    /// The noisy blocks before it in its window, and the clean response before the window (Jacobi
    /// Forcing).
    NoisyWindow,
}

/// Answers that the autoregressive loss teaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum LabelSource {
    /// The teacher's response in each trajectory.
    Teacher,
    /// The data set's own answer to each prompt, packed as a sequence of its own. Rows without one
    /// contribute to the other losses only.
    Dataset,
}

/// How the recorded state of a block is drawn for each pass over the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StateSampling {
    /// Every state but the fixed point is equally likely (CLLM).
    Uniform,
    /// The state whose fraction of incorrect tokens is closest to a target that rises from 0 to 1
    /// over the blocks of a window (Jacobi Forcing).
    Progressive,
}

/// The consistency objective. Each loss is a mean over its own tokens in all batches of a step.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ConsistencySettings {
    /// Weight of the global consistency loss, which draws a state's predictions towards the fixed
    /// point.
    #[garde(range(min = 0.0))]
    pub global_weight: f64,
    /// Weight of the local consistency loss, which draws a state's predictions towards those of the
    /// next state; 0 turns it off. States changed by `augment` have no next state.
    #[garde(range(min = 0.0))]
    pub local_weight: f64,
    /// Weight of the autoregressive loss on `labels`. If this weight and that of the anchor are 0, the
    /// targets of the global loss are the frozen model's predictions instead of the student's own,
    /// which nothing would keep from becoming all the same. This trains a draft model.
    #[garde(range(min = 0.0))]
    pub ar_weight: f64,
    /// Answers that the autoregressive loss teaches.
    #[garde(skip)]
    pub labels: LabelSource,
    /// Weight of the anchor loss, KL(frozen model || student), which keeps the student's answers
    /// close to the frozen model's on prompts it was not trained on; 0 turns it off.
    #[garde(range(min = 0.0))]
    pub anchor_weight: f64,
    /// Folder or Hugging Face id of the frozen model; `null` uses the model that the run starts
    /// from.
    #[garde(skip)]
    pub anchor: Option<String>,
    /// Fraction of the prompt tokens included in the anchor loss. All response tokens always are.
    #[garde(range(min = 0.0, max = 1.0))]
    pub anchor_prompt_fraction: f64,
    /// Divergence used by the global and local losses.
    #[garde(skip)]
    pub divergence: Divergence,
    /// How much the positions of a noisy block count in the global loss.
    #[garde(skip)]
    pub position_weights: PositionWeights,
    /// Weight in the global loss of the positions of a noisy block behind the first one whose token
    /// the student does not predict: 1 counts them in full, 0 leaves them out, as decoding drops them
    /// (Spec-AUF, arXiv 2607.01893).
    #[garde(range(min = 0.0, max = 1.0))]
    pub after_miss_weight: f64,
    /// What a noisy block attends to before its own tokens.
    #[garde(skip)]
    pub context: BlockContext,
    /// How the recorded state of a block is drawn.
    #[garde(skip)]
    pub states: StateSampling,
    /// Different states of each block trained in one pass over the data, or all that it has if they
    /// are fewer. They share the prompt and the clean response.
    #[garde(range(min = 1, max = 1024))]
    pub states_per_block: usize,
    /// Blocks per window (for `noisy_window` and `progressive`).
    #[garde(range(min = 1, max = 65_536))]
    pub window_blocks: usize,
    /// Cut each noisy block after a number of tokens that is drawn from this one to that of the block,
    /// but never before its first incorrect token; `null` cuts none.
    #[garde(range(min = 1))]
    pub min_block_tokens: Option<usize>,
    /// Blocks of a response trained in one pass over the data, drawn anew each epoch; `null` trains
    /// all of them.
    #[garde(range(min = 1))]
    pub max_blocks: Option<usize>,
}

impl Default for ConsistencySettings {
    fn default() -> Self {
        ConsistencySettings {
            global_weight: 1.0,
            local_weight: 0.0,
            ar_weight: 0.0,
            labels: LabelSource::Teacher,
            anchor_weight: 10.0,
            anchor: None,
            anchor_prompt_fraction: 0.25,
            divergence: Divergence::Forward,
            position_weights: PositionWeights::Uniform,
            after_miss_weight: 1.0,
            context: BlockContext::Clean,
            states: StateSampling::Uniform,
            states_per_block: 1,
            window_blocks: 4,
            min_block_tokens: None,
            max_blocks: None,
        }
    }
}

impl ConsistencySettings {
    /// Whether the targets of the global loss are the frozen model's predictions, not the student's own.
    pub fn has_frozen_targets(&self) -> bool {
        self.ar_weight == 0.0 && self.anchor_weight == 0.0
    }
}
