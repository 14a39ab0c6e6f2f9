use std::path::PathBuf;

use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Measurements on held-out data during training, which pick the best checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct ValidationSettings {
    /// Prompt set that the model answers, for tokens per forward and accuracy; `null` skips this.
    #[garde(skip)]
    pub prompts: Option<PathBuf>,
    /// Folder of the benchmark's files, for tasks whose scores need them (Spider's databases).
    #[garde(skip)]
    pub data: Option<PathBuf>,
    /// Held-out trajectory data set for the validation losses (objective `consistency` only);
    /// `null` skips them.
    #[garde(skip)]
    pub trajectories: Option<PathBuf>,
    /// Use only the first N prompts, and the first N rows of the trajectories.
    #[garde(range(min = 1))]
    pub num_examples: usize,
    /// Steps between validations. The first validates the initial model.
    #[garde(range(min = 1))]
    pub every: usize,
    /// How far the accuracy of the best checkpoint may fall below that of the initial model, as a
    /// fraction of the answers.
    #[garde(range(min = 0.0, max = 1.0))]
    pub max_accuracy_drop: f64,
    /// Stop after N validations in a row without a new best checkpoint; `null` never stops early.
    #[garde(range(min = 1))]
    pub patience: Option<usize>,
    /// Tokens of a block of Jacobi decoding or, with `lora.on: drafts`, of a window of `gated`, which
    /// has at most 32.
    #[garde(range(min = 2, max = 1024))]
    pub n: usize,
    /// Maximum length of an answer, in tokens.
    #[garde(range(min = 1, max = 1_048_576))]
    pub max_new_tokens: usize,
}

impl Default for ValidationSettings {
    fn default() -> Self {
        ValidationSettings {
            prompts: None,
            data: None,
            trajectories: None,
            num_examples: 32,
            every: 200,
            max_accuracy_drop: 0.05,
            patience: None,
            n: 16,
            max_new_tokens: 256,
        }
    }
}
