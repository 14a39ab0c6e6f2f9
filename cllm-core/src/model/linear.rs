//! A projection, or several of the same input in one matrix product, with the low-rank adapters
//! beside it.

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
