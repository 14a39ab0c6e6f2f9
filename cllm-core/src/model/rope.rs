//! Rotary position embeddings (RoPE; Su et al., arXiv 2104.09864) and their scalings past the
//! trained context.
//!
//! A new scaling is a variant of [`RopeScaling`], its frequencies in [`RopeScaling::frequencies`],
//! and its keys of config.json in `hf_config.rs`.

use std::f64::consts::TAU;

use tch::{Device, Kind, Tensor};

/// How frequencies are scaled so that a model can read more positions than it was trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    /// Every frequency is divided by the factor.
    Linear {
        factor: f64,
    },
    /// Llama 3: low frequencies are divided by the factor, high ones are kept, with a ramp between
    /// them.
    Llama3 {
        factor: f64,
        /// Frequencies with at most this many rotations within the trained context are divided.
        low_freq_factor: f64,
        /// Frequencies with at least this many rotations within the trained context are kept.
        high_freq_factor: f64,
        original_max_positions: f64,
    },
    /// YaRN (Peng et al., arXiv 2309.00071).
    Yarn {
        factor: f64,
        /// Dimensions with at least this many rotations within the trained context are kept.
        beta_fast: f64,
        /// Dimensions with at most this many rotations within the trained context are divided.
        beta_slow: f64,
        original_max_positions: f64,
        /// Scale of cosines and sines, and therefore of queries and keys.
        attention_factor: f64,
        /// Whether the bounds between kept and divided dimensions are rounded outwards.
        truncate: bool,
    },
}

impl RopeScaling {
    /// Radians per position of each of the `head_dim / 2` pairs of dimensions.
    fn frequencies(&self, head_dim: i64, theta: f64) -> Vec<f64> {
        let unscaled = (0..head_dim / 2).map(|i| theta.powf(-(2 * i) as f64 / head_dim as f64));
        match self {
            RopeScaling::None => unscaled.collect(),
            RopeScaling::Linear { factor } => unscaled.map(|frequency| frequency / factor).collect(),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => unscaled
                .map(|frequency| {
                    let rotations = original_max_positions * frequency / TAU;
                    let kept = ((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    frequency * kept + frequency / factor * (1.0 - kept)
                })
                .collect(),
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_positions, truncate, .. } => {
                let dim = head_dim as f64;
                // The dimension that rotates this often within the trained context.
                let dimension_with =
                    |rotations: f64| dim * (original_max_positions / (rotations * TAU)).ln() / (2.0 * theta.ln());
                let (mut low, mut high) = (dimension_with(*beta_fast), dimension_with(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min(dim - 1.0));
                let width = if high == low { 0.001 } else { high - low };
                unscaled
                    .enumerate()
                    .map(|(i, frequency)| {
                        let divided = ((i as f64 - low) / width).clamp(0.0, 1.0);
                        frequency / factor * divided + frequency * (1.0 - divided)
                    })
                    .collect()
            }
        }
    }

    /// The longest context of a model whose config.json has this `max_position_embeddings`. As vLLM
    /// reads it: that number times a linear factor, or YaRN's original context times its factor,
    /// whichever of the two contexts the file has.
    pub fn max_positions(&self, max_position_embeddings: usize) -> usize {
        match self {
            RopeScaling::None | RopeScaling::Llama3 { .. } => max_position_embeddings,
            RopeScaling::Linear { factor } => (max_position_embeddings as f64 * factor) as usize,
            RopeScaling::Yarn { factor, original_max_positions, .. } => (original_max_positions * factor) as usize,
        }
    }

    fn attention_factor(&self) -> f64 {
        match self {
            RopeScaling::Yarn { attention_factor, .. } => *attention_factor,
            RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
        }
    }
}

pub(crate) struct RotaryEmbedding {
    /// Radians per position, float32 `[head_dim / 2]`.
    inv_freq: Tensor,
    attention_factor: f64,
}

impl RotaryEmbedding {
    pub(crate) fn new(scaling: &RopeScaling, head_dim: i64, theta: f64, device: Device) -> Self {
        let frequencies = scaling.frequencies(head_dim, theta);
        let inv_freq: Vec<f32> = frequencies.into_iter().map(|frequency| frequency as f32).collect();
        RotaryEmbedding {
            inv_freq: Tensor::from_slice(&inv_freq).to_device(device),
            attention_factor: scaling.attention_factor(),
        }
    }

    /// Cosines and sines, float32 `[count, head_dim / 2]` each, of the angles at
    /// `positions [count]`.
    pub(crate) fn cos_sin(&self, positions: &Tensor) -> (Tensor, Tensor) {
        let angles = self.angles(positions);
        ((angles.cos() * self.attention_factor).contiguous(), (angles.sin() * self.attention_factor).contiguous())
    }

    /// The rotation of tokens at `positions`, int64 `[batch, seq]`, for queries and keys of type
    /// `kind`.
    pub(crate) fn rotation(&self, positions: &Tensor, kind: Kind) -> Rotation {
        let angles = self.angles(positions);
        let (cos, sin) = (angles.cos(), angles.sin());
        let join = |first: &Tensor, second: &Tensor| {
            (Tensor::cat(&[first, second], -1).unsqueeze(1) * self.attention_factor).to_kind(kind)
        };
        Rotation { cos: join(&cos, &cos), sin: join(&sin.neg(), &sin) }
    }

    /// `[.., head_dim / 2]`, in float32: bf16 would confuse neighboring positions.
    fn angles(&self, positions: &Tensor) -> Tensor {
        positions.to_kind(Kind::Float).unsqueeze(-1) * &self.inv_freq
    }
}

/// Cosines, and sines with their first half negated, `[batch, 1, seq, head_dim]` each. In this
/// form, rotating the two halves of a head is two products and a sum.
pub(crate) struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rotation {
    /// Rotates queries or keys `[batch, heads, seq, head_dim]`.
    pub(crate) fn apply(&self, x: &Tensor) -> Tensor {
        let head_dim = self.cos.size()[3];
        (x * &self.cos).addcmul(&x.roll([head_dim / 2], [3]), &self.sin)
    }
}
