//! Rotary positions (Su et al., arXiv 2104.09864), computed from positions in float32.

use tch::{Device, Kind, Tensor};

use super::config::{ModelConfig, RopeScaling};

/// Inverse wavelengths and the scale of cosine and sine.
pub(crate) struct Rope {
    /// float32 `[head_dim / 2]`.
    inverse: Tensor,
    scale: f64,
}

/// Cosine, and sine with its first half negated, `[batch, 1, seq, head_dim]` of some positions.
pub(crate) struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig, device: Device) -> Self {
        let half = config.head_dim / 2;
        let plain = (0..half).map(|i| config.rope_theta.powf(-(2 * i) as f64 / config.head_dim as f64));
        let (inverse, scale): (Vec<f64>, f64) = match &config.rope_scaling {
            RopeScaling::None => (plain.collect(), 1.0),
            RopeScaling::Linear { factor } => (plain.map(|frequency| frequency / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                let stretched = plain.map(|frequency| {
                    let rotations = original_max_positions * frequency / std::f64::consts::TAU;
                    let kept = ((rotations - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                    frequency * kept + frequency / factor * (1.0 - kept)
                });
                (stretched.collect(), 1.0)
            }
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_positions, attention_factor } => {
                let dim = config.head_dim as f64;
                let dimension_of = |rotations: f64| {
                    dim * (original_max_positions / (rotations * std::f64::consts::TAU)).ln()
                        / (2.0 * config.rope_theta.ln())
                };
                let low = dimension_of(*beta_fast).floor().max(0.0);
                let high = dimension_of(*beta_slow).ceil().min(dim - 1.0);
                let width = if high == low { 0.001 } else { high - low };
                let stretched = plain.enumerate().map(|(i, frequency)| {
                    let divided = ((i as f64 - low) / width).clamp(0.0, 1.0);
                    frequency / factor * divided + frequency * (1.0 - divided)
                });
                (stretched.collect(), *attention_factor)
            }
        };
        let inverse: Vec<f32> = inverse.into_iter().map(|frequency| frequency as f32).collect();
        Rope { inverse: Tensor::from_slice(&inverse).to_device(device), scale }
    }

    /// Cosines and sines, float32 `[count, head_dim / 2]`, of some positions `[count]`.
    pub(crate) fn angles(&self, positions: &Tensor) -> (Tensor, Tensor) {
        let angles = positions.to_kind(Kind::Float).unsqueeze(-1) * &self.inverse;
        ((angles.cos() * self.scale).contiguous(), (angles.sin() * self.scale).contiguous())
    }

    /// `positions`: int64 `[batch, seq]`.
    pub(crate) fn rotation(&self, positions: &Tensor, kind: Kind) -> Rotation {
        let angles = positions.to_kind(Kind::Float).unsqueeze(-1) * &self.inverse;
        let (cos, sin) = (angles.cos(), angles.sin());
        let whole = |first: &Tensor, second: &Tensor| {
            (Tensor::cat(&[first, second], -1).unsqueeze(1) * self.scale).to_kind(kind)
        };
        Rotation { cos: whole(&cos, &cos), sin: whole(&sin.neg(), &sin) }
    }
}

impl Rotation {
    /// Rotates `[batch, heads, seq, head_dim]`.
    pub(crate) fn apply(&self, x: &Tensor) -> Tensor {
        let width = self.cos.size()[3];
        (x * &self.cos).addcmul(&x.roll([width / 2], [3]), &self.sin)
    }
}
