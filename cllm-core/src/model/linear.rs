//! A projection, or several projections of the same input in one matrix product, with their
//! low-rank adapters.

use tch::{Kind, Tensor};

use super::lora::JoinedAdapters;
use super::quantized::dequantize;
use crate::Result;

pub(crate) struct Linear {
    /// `[out, in]`, in int8 if there are scales.
    pub(crate) weight: Tensor,
    /// Factor of each row of the weight, float32 `[out]`.
    pub(crate) scales: Option<Tensor>,
    /// `[out]`.
    pub(crate) bias: Option<Tensor>,
    pub(crate) adapters: Option<JoinedAdapters>,
}

impl Linear {
    /// `[.., in]` to `[.., out]`. `draft_rows`: see [`JoinedAdapters::add_to`].
    pub(crate) fn forward(&self, x: &Tensor, draft_rows: Option<&Tensor>) -> Tensor {
        let weight = self.dequantized(x.kind()).expect("a tensor of the weight's size");
        let product = x.linear(&weight, self.bias.as_ref());
        match &self.adapters {
            Some(adapters) => adapters.add_to(product, x, draft_rows),
            None => product,
        }
    }

    /// The weight for products of inputs in type `kind`: itself, or a new tensor if it is quantized.
    pub(crate) fn dequantized(&self, kind: Kind) -> Result<Tensor> {
        match &self.scales {
            Some(scales) => dequantize(&self.weight, scales, kind),
            None => Ok(self.weight.shallow_clone()),
        }
    }
}
