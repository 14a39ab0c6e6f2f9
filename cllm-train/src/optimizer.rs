//! AdamW on float32 masters, and its schedule.

use cllm_core::model::Transformer;
use cllm_core::torch_ext::{self, AdamW};
use cllm_core::{Error, Result};
use tch::{Kind, Tensor};

use crate::ema::Ema;
use crate::settings::Optimizer;

/// Optimizer state. In float32 the weights are their own masters.
pub struct State {
    names: Vec<String>,
    weights: Vec<Tensor>,
    masters: Vec<Tensor>,
    first: Vec<Tensor>,
    second: Vec<Tensor>,
    /// Matrices, which decay, and the rest, which do not.
    decays: Vec<bool>,
    /// Skipped steps, counted on the device in float32: in all, and in a row.
    skipped: Tensor,
    skipped_in_a_row: Tensor,
}

impl State {
    /// Fresh state for a model.
    pub fn new(model: &Transformer) -> Self {
        let _no_grad = tch::no_grad_guard();
        let (names, weights): (Vec<_>, Vec<_>) = model.parameters().into_iter().unzip();
        let masters: Vec<Tensor> = match model.kind() {
            Kind::Float => weights.iter().map(|weight| weight.detach()).collect(),
            _ => weights.iter().map(|weight| weight.detach().to_kind(Kind::Float)).collect(),
        };
        let zero = || Tensor::zeros([], (Kind::Float, model.device()));
        let zeros = || masters.iter().map(Tensor::zeros_like).collect();
        State {
            first: zeros(),
            second: zeros(),
            decays: weights.iter().map(|w| w.dim() > 1).collect(),
            skipped: zero(),
            skipped_in_a_row: zero(),
            names,
            weights,
            masters,
        }
    }

    /// One step from the gradients that the weights hold, which are cleared. Returns the norm before clipping, on the
    /// device: nothing here waits for it. A step whose norm is not finite changes nothing, and is counted.
    ///
    /// # Errors
    /// libtorch's errors.
    pub fn step(&mut self, settings: &Optimizer, lr: f64, number: usize) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let gradients: Vec<Tensor> = self
            .weights
            .iter()
            .map(|weight| match weight.grad() {
                grad if grad.defined() => grad.to_kind(Kind::Float),
                _ => Tensor::zeros_like(weight).to_kind(Kind::Float),
            })
            .collect();
        let norm = torch_ext::global_norm(&gradients)?;
        let scale = if settings.clip > 0.0 { (&norm / settings.clip).clamp_min(1.0) } else { Tensor::ones_like(&norm) };
        let skip = norm.isfinite().logical_not().to_kind(Kind::Float);
        for decay in [true, false] {
            self.update(settings, lr, number, decay, &gradients, (&scale, &skip))?;
        }
        for (weight, master) in self.weights.iter_mut().zip(&self.masters) {
            if weight.kind() != Kind::Float {
                weight.copy_(master);
            }
        }
        // Only now: in float32 the gradients above are the weights' own.
        for weight in &mut self.weights {
            weight.zero_grad();
        }
        self.skipped += &skip;
        self.skipped_in_a_row = (&self.skipped_in_a_row + 1.0) * &skip;
        Ok(norm)
    }

    /// Steps that were skipped: in all, and in a row up to the last. Waits for the device.
    pub fn skipped(&self) -> (usize, usize) {
        let read = |count: &Tensor| count.double_value(&[]) as usize;
        (read(&self.skipped), read(&self.skipped_in_a_row))
    }

    /// Whether every weight is a finite number. Waits for the device.
    pub fn is_finite(&self) -> bool {
        let _no_grad = tch::no_grad_guard();
        let finite: Vec<Tensor> = self.weights.iter().map(|weight| weight.isfinite().all()).collect();
        Tensor::stack(&finite, 0).all().int64_value(&[]) != 0
    }

    fn update(
        &self,
        settings: &Optimizer,
        lr: f64,
        number: usize,
        decay: bool,
        gradients: &[Tensor],
        (scale, skip): (&Tensor, &Tensor),
    ) -> Result<()> {
        let chosen = |tensors: &[Tensor]| -> Vec<Tensor> {
            let pairs = tensors.iter().zip(&self.decays);
            pairs.filter(|(_, decays)| **decays == decay).map(|(tensor, _)| tensor.shallow_clone()).collect()
        };
        let masters = chosen(&self.masters);
        if masters.is_empty() {
            return Ok(());
        }
        let count = Tensor::from(number as f32).to_device(masters[0].device());
        let steps: Vec<Tensor> = masters.iter().map(|_| count.shallow_clone()).collect();
        let numbers = AdamW {
            lr,
            beta1: settings.beta1,
            beta2: settings.beta2,
            weight_decay: if decay { settings.weight_decay } else { 0.0 },
            eps: settings.eps,
            scale,
            skip,
        };
        torch_ext::fused_adamw(
            numbers,
            &masters,
            &chosen(gradients),
            &chosen(&self.first),
            &chosen(&self.second),
            &steps,
        )
    }

    /// The weights in float32, in the order of the model's parameters.
    pub fn masters(&self) -> &[Tensor] {
        &self.masters
    }

    /// Every tensor of the state under a name, for a checkpoint; with the moving average of the weights, where there is one.
    pub fn tensors(&self, ema: Option<&Ema>) -> Vec<(String, Tensor)> {
        let named = |prefix: &'static str, tensors: &'_ [Tensor]| -> Vec<(String, Tensor)> {
            let pairs = self.names.iter().zip(tensors);
            pairs.map(|(name, tensor)| (format!("{prefix}.{name}"), tensor.shallow_clone())).collect()
        };
        let mean = ema.map(Ema::mean).unwrap_or_default();
        let parts = [("master", &*self.masters), ("first", &self.first), ("second", &self.second), ("ema", mean)];
        parts.into_iter().flat_map(|(prefix, tensors)| named(prefix, tensors)).collect()
    }

    /// Takes the state of a checkpoint, the weights and their moving average included, and the number of steps skipped before it.
    ///
    /// # Errors
    /// [`Error::Usage`] when a tensor is missing or of another shape.
    pub fn restore(
        &mut self,
        ema: Option<&Ema>,
        skipped: usize,
        mut find: impl FnMut(&str, &Tensor) -> Option<Tensor>,
    ) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for (name, mut tensor) in self.tensors(ema) {
            let saved = find(&name, &tensor)
                .ok_or_else(|| Error::usage(format!("the checkpoint's optimizer state lacks `{name}`")))?;
            tensor.f_copy_(&saved)?;
        }
        for (weight, master) in self.weights.iter_mut().zip(&self.masters) {
            weight.copy_(master);
        }
        let _ = self.skipped.fill_(skipped as f64);
        Ok(())
    }
}

/// The learning rate of step `number` (from 1) of `total`: a linear rise, then half a cosine down.
pub fn learning_rate(settings: &Optimizer, number: usize, total: usize) -> f64 {
    let warmup = (settings.warmup * total as f64).ceil();
    let number = number as f64;
    if number <= warmup {
        return settings.lr * number / warmup;
    }
    let done = ((number - warmup) / (total as f64 - warmup).max(1.0)).min(1.0);
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
    settings.lr * (settings.min_lr + (1.0 - settings.min_lr) * cosine)
}

#[cfg(test)]
mod tests {
    use cllm_core::model::ModelConfig;

    use super::*;

    /// A tiny model after a step whose gradient is `gradient` everywhere.
    fn after_a_step(gradient: f64, clip: f64) -> (State, f64) {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1,
            "num_attention_heads": 1, "tie_word_embeddings": true,
        });
        let config = ModelConfig::from_json(&config).unwrap();
        let model = Transformer::random(config, 1, tch::Device::Cpu, Kind::Float);
        model.set_requires_grad(true);
        for (_, weight) in model.parameters() {
            (weight.sum(Kind::Float) * gradient).backward();
        }
        let mut state = State::new(&model);
        let norm = state.step(&Optimizer { clip, ..Optimizer::default() }, 0.1, 1).unwrap();
        (state, norm.double_value(&[]))
    }

    #[test]
    fn a_gradient_is_clipped_to_the_norm_and_a_short_one_is_left() {
        let moment = |gradient: f64, clip: f64| {
            let (state, norm) = after_a_step(gradient, clip);
            (state.first[0].double_value(&[0, 0]) / 0.1, norm)
        };
        let (plain, norm) = moment(2.0, 0.0);
        assert!((plain - 2.0).abs() < 1e-6 && norm > 4.0, "{plain} {norm}");
        let (clipped, same) = moment(2.0, 1.0);
        assert!((clipped - 2.0 / norm).abs() < 1e-6 && same == norm, "{clipped} {same}");
        assert_eq!(moment(2.0, 1e3).0, plain);
    }

    #[test]
    fn skipped_steps_are_counted_in_all_and_in_a_row() {
        let (mut state, _) = after_a_step(f64::NAN, 1.0);
        assert_eq!(state.skipped(), (1, 1));
        let _ = state.step(&Optimizer::default(), 0.1, 2).unwrap();
        assert_eq!(state.skipped(), (1, 0));
    }

    #[test]
    fn the_rate_rises_then_falls_to_its_floor() {
        let settings = Optimizer { lr: 1.0, warmup: 0.1, min_lr: 0.1, ..Optimizer::default() };
        let rates: Vec<f64> = (1..=100).map(|number| learning_rate(&settings, number, 100)).collect();
        assert_eq!((rates[0], rates[9]), (0.1, 1.0));
        assert!(rates[10..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!((rates[99] - 0.1).abs() < 1e-9);
    }
}
