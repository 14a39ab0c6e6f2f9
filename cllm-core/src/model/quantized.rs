//! Frozen projections in int8, with a scale for each row: the largest absolute value over 127. This
//! is the vector-wise quantization of LLM.int8() (Dettmers et al., arXiv 2208.07339) for weights
//! alone: products dequantize a weight right before they use it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;
use super::params::ParamBuffer;
use crate::Result;

/// The largest quantized number.
const MAX: f64 = 127.0;

/// Type of the weights below adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BaseDtype {
    /// The type of the model: bfloat16 on a GPU, float32 on the CPU.
    Model,
    /// The projections of all layers in int8, with a scale for each row; the other weights as in
    /// the model. Halves the memory of the weights, and the adapters are trained on slightly other
    /// weights than those that they are merged into. With `on: drafts`, nothing is merged: keys, values
    /// and targets are the quantized model's in training, and the original's in decoding.
    Int8,
}

impl BaseDtype {
    /// Whether the weight of this name is in int8.
    fn quantizes(self, name: &str) -> bool {
        self == BaseDtype::Int8 && name.starts_with("model.layers.") && name.ends_with("_proj.weight")
    }

    /// Bytes of all weights of a configuration whose other weights are in type `kind`.
    pub fn weight_bytes(self, config: &ModelConfig, kind: Kind) -> u64 {
        let bytes = |(name, shape): &(String, Vec<i64>)| match self.quantizes(name) {
            true => shape[0] * (shape[1] + Kind::Float.elt_size_in_bytes() as i64),
            false => shape.iter().product::<i64>() * kind.elt_size_in_bytes() as i64,
        };
        config.parameter_shapes().iter().map(bytes).sum::<i64>() as u64
    }
}

/// The weights of a model, in buffers.
pub(crate) struct ModelParams {
    /// All that are not quantized.
    pub(super) params: ParamBuffer,
    pub(super) quantized: Option<QuantizedParams>,
}

/// Projections in int8. A weight is the product of its values and its scales.
pub(super) struct QuantizedParams {
    /// Int8 `[out, in]` each.
    values: ParamBuffer,
    /// Float32 `[out]` each, under the names of the weights.
    scales: ParamBuffer,
}

impl ModelParams {
    /// Zeros for every weight of a configuration, in type `kind` unless they are quantized.
    pub(crate) fn zeros(config: &ModelConfig, device: Device, kind: Kind, base_dtype: BaseDtype) -> Self {
        let shapes = config.parameter_shapes().into_iter();
        let (projections, others): (Vec<_>, Vec<_>) = shapes.partition(|(name, _)| base_dtype.quantizes(name));
        let rows = projections.iter().map(|(name, shape)| (name.clone(), vec![shape[0]])).collect();
        ModelParams {
            params: ParamBuffer::zeros(others, device, kind),
            quantized: (base_dtype == BaseDtype::Int8).then(|| QuantizedParams {
                values: ParamBuffer::zeros(projections, device, Kind::Int8),
                scales: ParamBuffer::zeros(rows, device, Kind::Float),
            }),
        }
    }

    /// The same weights in the same memory.
    pub(super) fn shallow_clone(&self) -> Self {
        let clone = |quantized: &QuantizedParams| QuantizedParams {
            values: quantized.values.shallow_clone(),
            scales: quantized.scales.shallow_clone(),
        };
        ModelParams { params: self.params.shallow_clone(), quantized: self.quantized.as_ref().map(clone) }
    }

    /// Where the weight of this name is; `None` if it is quantized.
    pub(crate) fn get(&self, name: &str) -> Option<Tensor> {
        self.params.get(name)
    }

    /// Stores a weight, quantized if the others of its kind are.
    ///
    /// # Panics
    /// For a name that is none of the configuration's.
    pub(crate) fn set(&self, name: &str, weight: &Tensor) -> Result<()> {
        match (self.get(name), &self.quantized) {
            (Some(mut param), _) => Ok(param.f_copy_(weight)?),
            (None, Some(quantized)) => quantized.set(name, weight),
            (None, None) => panic!("{name} is no weight of the model"),
        }
    }

    /// A weight in type `kind`.
    ///
    /// # Panics
    /// As [`Self::set`].
    pub(super) fn dequantized(&self, name: &str, kind: Kind) -> Result<Tensor> {
        match (self.get(name), &self.quantized) {
            (Some(param), _) => Ok(param.f_to_kind(kind)?),
            (None, Some(quantized)) => {
                let (values, scales) = quantized.get_joined(&[name.to_owned()]).expect("a weight of the model");
                dequantize(&values, &scales, kind)
            }
            (None, None) => panic!("{name} is no weight of the model"),
        }
    }
}

impl QuantizedParams {
    /// Values and scales of weights that are neighbors in the buffer, joined.
    pub(super) fn get_joined(&self, names: &[String]) -> Option<(Tensor, Tensor)> {
        self.values.get_joined(names).zip(self.scales.get_joined(names))
    }

    fn set(&self, name: &str, weight: &Tensor) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let (mut values, mut scales) = self.get_joined(&[name.to_owned()]).expect("a weight of the model");
        let weight = weight.f_to_device(values.device())?.f_to_kind(Kind::Float)?;
        let row_scales = weight.f_abs()?.f_amax([1], true)? / MAX;
        scales.f_copy_(&row_scales.f_squeeze_dim(1)?)?;
        // A row of zeros has the scale 0, and zeros as values.
        let quotients = weight.f_div(&row_scales.f_clamp_min(f64::from(f32::MIN_POSITIVE))?)?;
        Ok(values.f_copy_(&quotients.f_round()?)?)
    }
}

/// `values [out, in]` times `scales [out]`, computed in float32 and rounded to `kind`.
pub(super) fn dequantize(values: &Tensor, scales: &Tensor, kind: Kind) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let weight = Tensor::f_empty(values.size(), (kind, values.device()))?;
    let _ = values.f_mul_out(&weight, &scales.f_unsqueeze(1)?)?;
    Ok(weight)
}
