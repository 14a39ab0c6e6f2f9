//! The forward and backward of a projection by hand, for the CUDA pass. Rows are tokens:
//! `[tokens, in]` to `[tokens, out]`.
//!
//! What adapters add costs little arithmetic, so passes over `[tokens, out]` would take most of its
//! time. Their products therefore come first and write to the memory of the result, and the large
//! product adds to them.

use tch::{Kind, Tensor};

use crate::Result;
use crate::cuda::libtorch;
use crate::model::{JoinedAdapters, Linear};

impl Linear {
    /// The projection of `input`. With adapters, `low_rank` is what they need of the input, its
    /// products with every A: `[tokens, adapters x rank]`. It is computed if it is missing. If the
    /// adapters act on draft tokens alone, it has these tokens alone, which are the rows
    /// `draft_rows` of the input.
    pub(super) fn project(
        &self,
        input: &Tensor,
        draft_rows: Option<&Tensor>,
        low_rank: &mut Option<Tensor>,
    ) -> Result<Tensor> {
        let weight = self.dequantized(input.kind())?;
        let Some(adapters) = &self.adapters else { return Ok(input.f_linear(&weight, self.bias.as_ref())?) };
        let num_outputs = self.weight.size()[0];
        let low_rank = match low_rank {
            Some(low_rank) => low_rank,
            None => low_rank.insert(adapters.low_rank(&select(input, draft_rows)?)?),
        };
        let Some(draft_rows) = draft_rows else {
            let mut sum = adapters.products(low_rank, self.bias.as_ref(), num_outputs)?;
            let _ = sum.f_addmm_(input, &weight.f_tr()?)?;
            return Ok(sum);
        };
        let mut sum = input.f_linear(&weight, self.bias.as_ref())?;
        let _ = sum.f_index_add_(0, draft_rows, &adapters.products(low_rank, None, num_outputs)?)?;
        Ok(sum)
    }

    /// The gradient of the input and, with adapters, that of its products with their A.
    pub(super) fn backward_input(&self, d_output: &Tensor) -> Result<(Tensor, Option<Tensor>)> {
        let weight = self.dequantized(d_output.kind())?;
        let Some(adapters) = &self.adapters else { return Ok((d_output.f_mm(&weight)?, None)) };
        let d_low_rank = adapters.d_low_rank(d_output)?;
        let mut d_input = d_low_rank.f_mm(&adapters.rounded()?.scaled_a)?;
        let _ = d_input.f_addmm_(d_output, &weight)?;
        Ok((d_input, Some(d_low_rank)))
    }

    /// Adds to the gradients of the weight, the bias and the adapters, if they collect gradients.
    /// `low_ranks`: the input's products with every A, and their gradient.
    pub(super) fn backward_weights(
        &self,
        input: &Tensor,
        d_output: &Tensor,
        low_ranks: Option<(Tensor, Tensor)>,
    ) -> Result<()> {
        if self.weight.requires_grad() {
            let _ = self.weight.grad().f_addmm_(&d_output.f_tr()?, input)?;
        }
        if let Some(bias) = self.bias.as_ref().filter(|bias| bias.requires_grad()) {
            let _ = bias.grad().f_add_(&d_output.f_sum_dim_intlist(0, false, Kind::Float)?)?;
        }
        match self.adapters.as_ref().zip(low_ranks) {
            Some((adapters, low_ranks)) if adapters.lora_a.requires_grad() => {
                adapters.backward(input, d_output, &low_ranks)
            }
            _ => Ok(()),
        }
    }
}

/// Some rows of `x [tokens, ..]`: those of the draft tokens, or all.
pub(super) fn select(x: &Tensor, draft_rows: Option<&Tensor>) -> Result<Tensor> {
    match draft_rows {
        Some(rows) => Ok(x.f_index_select(0, rows)?),
        None => Ok(x.shallow_clone()),
    }
}

/// Products of bfloat16 copies of the adapters, which are float32 themselves.
impl JoinedAdapters {
    /// The products of `input` with every scaled A.
    fn low_rank(&self, input: &Tensor) -> Result<Tensor> {
        Ok(input.f_mm(&self.rounded()?.scaled_a.f_tr()?)?)
    }

    /// What the adapters add to a product with `num_outputs` outputs, plus its bias.
    fn products(&self, low_rank: &Tensor, bias: Option<&Tensor>, num_outputs: i64) -> Result<Tensor> {
        let mut sum = Tensor::f_empty([low_rank.size()[0], num_outputs], (low_rank.kind(), low_rank.device()))?;
        let is_overwritten = bias.is_none() && self.cover(num_outputs);
        match bias {
            Some(bias) => sum.f_copy_(bias)?,
            None if is_overwritten => {}
            None => drop(sum.f_zero_()?),
        }
        for (index, lora_b) in self.rounded()?.lora_b.iter().enumerate() {
            let (mut outputs, low_rank) = (self.outputs_of(&sum, index), self.low_rank_of(low_rank, index));
            let lora_b = lora_b.f_tr()?;
            let _ = match is_overwritten {
                true => low_rank.f_mm_out(&outputs, &lora_b)?,
                false => outputs.f_addmm_(&low_rank, &lora_b)?,
            };
        }
        Ok(sum)
    }

    /// The gradient of [`Self::low_rank`].
    fn d_low_rank(&self, d_output: &Tensor) -> Result<Tensor> {
        let rank = self.lora_a.size()[0];
        let d_low_rank = Tensor::f_empty([d_output.size()[0], rank], (d_output.kind(), d_output.device()))?;
        for (index, lora_b) in self.rounded()?.lora_b.iter().enumerate() {
            let _ = self.outputs_of(d_output, index).f_mm_out(&self.low_rank_of(&d_low_rank, index), lora_b)?;
        }
        Ok(d_low_rank)
    }

    /// Adds to the gradients of the adapters.
    fn backward(&self, input: &Tensor, d_output: &Tensor, (low_rank, d_low_rank): &(Tensor, Tensor)) -> Result<()> {
        for (index, lora_b) in self.lora_b.iter().enumerate() {
            let (d_outputs, low_rank) = (self.outputs_of(d_output, index), self.low_rank_of(low_rank, index));
            let _ = lora_b.grad().f_add_(&libtorch::mm_float32(&d_outputs.f_tr()?, &low_rank)?)?;
        }
        // The copy of A is scaled, and so is `low_rank`; the gradient of A itself has to be, too.
        let d_scaled_a = libtorch::mm_float32(&d_low_rank.f_tr()?, input)?;
        let _ = self.lora_a.grad().f_add_(&(d_scaled_a * self.scale))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;
    use tch::Device;

    use super::*;
    use crate::model::{BaseDtype, Layer, LoraConfig, LoraTarget, ModelConfig, ParamBuffer, Transformer};

    /// A model with biases and adapters in bfloat16, and the same numbers in float32, with the
    /// gradients that they collect.
    fn models(targets: BTreeSet<LoraTarget>, base_dtype: BaseDtype) -> [(Transformer, ParamBuffer); 2] {
        let config = ModelConfig::from_json(&json!({
            "model_type": "llama", "vocab_size": 32, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1,
            "num_attention_heads": 3, "num_key_value_heads": 1, "attention_bias": true,
        }))
        .unwrap();
        let lora = LoraConfig { rank: 4, alpha: 6.0, targets, ..LoraConfig::default() };
        tch::manual_seed(3);
        let mut models =
            [Kind::BFloat16, Kind::Float].map(|kind| Transformer::random(config.clone(), 1, Device::Cpu, kind));
        tch::no_grad(|| {
            let [rounded, exact] = models.each_ref().map(Transformer::named_parameters);
            for ((_, mut rounded), (_, mut exact)) in rounded.into_iter().zip(exact) {
                exact.copy_(&rounded.normal_(0.0, 0.3));
            }
        });
        if base_dtype == BaseDtype::Int8 {
            models = models.map(|model| model.to_quantized().unwrap());
        }
        models.iter_mut().for_each(|model| model.add_adapters(&lora, 2));
        let _no_grad = tch::no_grad_guard();
        let [rounded, exact] = &models;
        for ((_, mut rounded), (_, mut exact)) in
            rounded.trainable().tensors().into_iter().zip(exact.trainable().tensors())
        {
            exact.copy_(&rounded.normal_(0.0, 0.3));
        }
        rounded.adapters().unwrap().round().unwrap();
        models.map(|model| {
            let gradients = model.collect_gradients().unwrap();
            (model, gradients)
        })
    }

    fn assert_close(actual: &Tensor, expected: &Tensor, what: &str) {
        let error = (actual.to_kind(Kind::Float) - expected).norm() / expected.norm();
        let error = error.double_value(&[]);
        assert!(error < 0.02, "{what} is off by {error}");
    }

    #[test]
    fn products_with_adapters_by_hand_are_those_of_autograd_up_to_rounding() {
        type Select = fn(&Layer) -> &Linear;
        let linears: [(&str, Select); 4] = [
            ("qkv", |layer| &layer.qkv_proj),
            ("o", |layer| &layer.o_proj),
            ("gate_up", |layer| &layer.gate_up_proj),
            ("down", |layer| &layer.down_proj),
        ];
        let some = BTreeSet::from([LoraTarget::QProj, LoraTarget::VProj, LoraTarget::UpProj]);
        let all = BTreeSet::from(LoraTarget::ALL);
        for (targets, base_dtype) in [(all.clone(), BaseDtype::Model), (some, BaseDtype::Model), (all, BaseDtype::Int8)]
        {
            let [(model, gradients), (exact, expected_gradients)] = models(targets, base_dtype);
            for (name, linear) in linears {
                let (by_hand, autograd) = (linear(&model.layers[0]), linear(&exact.layers[0]));
                let size = |dimension: usize| by_hand.weight.size()[dimension];
                let random = |width| Tensor::randn([7, width], (Kind::Float, Device::Cpu)).to_kind(Kind::BFloat16);
                let (input, d_output) = (random(size(1)), random(size(0)));
                let input_32 = input.to_kind(Kind::Float).set_requires_grad(true);
                let expected = autograd.forward(&input_32, None);
                libtorch::backward(&expected, &d_output.to_kind(Kind::Float)).unwrap();

                let _no_grad = tch::no_grad_guard();
                let mut low_rank = None;
                for _ in ["computes", "reuses"] {
                    assert_close(&by_hand.project(&input, None, &mut low_rank).unwrap(), &expected, name);
                }
                let (d_input, d_low_rank) = by_hand.backward_input(&d_output).unwrap();
                assert_close(&d_input, &input_32.grad(), &format!("the gradient of the input of {name}"));
                by_hand.backward_weights(&input, &d_output, low_rank.zip(d_low_rank)).unwrap();
            }
            assert!(gradients.tensors().iter().all(|(_, tensor)| tensor.kind() == Kind::Float));
            for ((name, actual), (_, expected)) in gradients.tensors().iter().zip(expected_gradients.tensors()) {
                assert_close(actual, &expected, &format!("the gradient of {name}"));
            }
        }
    }
}
