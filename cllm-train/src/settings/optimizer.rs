use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Type of the optimizer's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StateDtype {
    /// Moments in float32, and a float32 master copy of weights in any other type.
    Float32,
    /// Moments in bfloat16 without a master copy, rounded stochastically: 4 bytes per weight
    /// instead of 12. Requires bfloat16 weights, and so a GPU.
    Bfloat16,
}

impl StateDtype {
    /// Bytes of each number of the state.
    pub fn num_bytes(self) -> u64 {
        match self {
            StateDtype::Float32 => 4,
            StateDtype::Bfloat16 => 2,
        }
    }
}

/// AdamW with linear warm-up and cosine decay.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerSettings {
    /// Peak learning rate. 4e-4 was best for a model of 135 million weights; it falls about in
    /// proportion to 1 over the width of the model.
    #[garde(range(min = 0.0, max = 1.0))]
    pub lr: f64,
    /// Decay of the first moment. At 1 the update would divide by zero.
    #[garde(range(min = 0.0, max = 0.99999))]
    pub beta1: f64,
    /// Decay of the second moment. At 1 the update would divide by zero.
    #[garde(range(min = 0.0, max = 0.99999))]
    pub beta2: f64,
    /// Added to the denominator of the update, so that it is never 0.
    #[garde(range(min = 1e-15, max = 1.0))]
    pub eps: f64,
    /// Decoupled weight decay. Applies to matrices only, not to norms and biases.
    #[garde(range(min = 0.0, max = 1.0))]
    pub weight_decay: f64,
    /// Fraction of the steps over which the learning rate rises to its peak.
    #[garde(range(min = 0.0, max = 1.0))]
    pub warmup_fraction: f64,
    /// Learning rate of the last step, as a fraction of the peak.
    #[garde(range(min = 0.0, max = 1.0))]
    pub min_lr_fraction: f64,
    /// Gradients with a larger norm are scaled down to it; `null` turns clipping off.
    #[garde(range(min = 1e-6))]
    pub max_grad_norm: Option<f64>,
    /// Type of the optimizer's state.
    #[garde(skip)]
    pub state_dtype: StateDtype,
    /// Decay of an exponential moving average of the weights. Checkpoints, the final model and
    /// validation then use the average. 0.999 averages roughly the last thousand steps; `null`
    /// keeps no average.
    #[garde(range(min = 0.0, max = 0.999_999))]
    pub ema_decay: Option<f64>,
}

impl Default for OptimizerSettings {
    fn default() -> Self {
        OptimizerSettings {
            lr: 1e-4,
            beta1: 0.9,
            beta2: 0.98,
            eps: 1e-8,
            weight_decay: 0.0,
            warmup_fraction: 0.05,
            min_lr_fraction: 0.1,
            max_grad_norm: Some(1.0),
            state_dtype: StateDtype::Float32,
            ema_decay: Some(0.999),
        }
    }
}
