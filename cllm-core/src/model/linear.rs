//! A projection, or several projections of the same input in one matrix product, with their
//! low-rank adapters.

use tch::Tensor;

use super::lora::LoraAdapter;

pub(crate) struct Linear {
    /// `[out, in]`.
    pub(crate) weight: Tensor,
    /// `[out]`.
    pub(crate) bias: Option<Tensor>,
    pub(crate) adapters: Vec<LoraAdapter>,
}

impl Linear {
    /// `[.., in]` to `[.., out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        let product = x.linear(&self.weight, self.bias.as_ref());
        for adapter in &self.adapters {
            let _ = adapter.narrow(&product, -1).g_add_(&adapter.forward(x));
        }
        product
    }
}
