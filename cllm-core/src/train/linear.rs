//! The forward and backward of a projection by hand, for the CUDA pass. Rows are tokens:
//! `[tokens, in]` to `[tokens, out]`.

use tch::{Kind, Tensor};

use crate::Result;
use crate::model::Linear;

impl Linear {
    /// The gradient of the input.
    pub(super) fn backward_input(&self, d_output: &Tensor) -> Result<Tensor> {
        let d_input = d_output.f_mm(&self.weight)?;
        for adapter in &self.adapters {
            let d_low_rank = adapter.narrow(d_output, 1).f_mm(&adapter.lora_b)? * adapter.scale;
            let _ = d_input.shallow_clone().f_addmm_(&d_low_rank, &adapter.lora_a)?;
        }
        Ok(d_input)
    }

    /// Adds to the gradients of the weight, the bias and the adapters, if they collect gradients.
    pub(super) fn backward_weights(&self, input: &Tensor, d_output: &Tensor) -> Result<()> {
        if self.weight.requires_grad() {
            let _ = self.weight.grad().f_addmm_(&d_output.f_tr()?, input)?;
        }
        if let Some(bias) = self.bias.as_ref().filter(|bias| bias.requires_grad()) {
            let _ = bias.grad().f_add_(&d_output.f_sum_dim_intlist(0, false, Kind::Float)?)?;
        }
        for adapter in self.adapters.iter().filter(|adapter| adapter.lora_b.requires_grad()) {
            let d_scaled = adapter.narrow(d_output, 1) * adapter.scale;
            let low_rank = input.f_mm(&adapter.lora_a.f_tr()?)?;
            let _ = adapter.lora_b.grad().f_addmm_(&d_scaled.f_tr()?, &low_rank)?;
            let d_low_rank = d_scaled.f_mm(&adapter.lora_b)?;
            let _ = adapter.lora_a.grad().f_addmm_(&d_low_rank.f_tr()?, input)?;
        }
        Ok(())
    }
}
