//! AdamW on float32 masters, and its schedule.

use cllm_core::model::Transformer;
use cllm_core::torch_ext::{self, AdamW};
use cllm_core::{Error, Result};
use tch::{Kind, Tensor};

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
        let zeros = || masters.iter().map(Tensor::zeros_like).collect();
        State {
            first: zeros(),
            second: zeros(),
            decays: weights.iter().map(|w| w.dim() > 1).collect(),
            names,
            weights,
            masters,
        }
    }

    /// One step from the gradients that the weights hold, which are cleared. Returns the norm before clipping; a step
    /// whose norm is not finite changes nothing.
    ///
    /// # Errors
    /// libtorch's errors.
    pub fn step(&mut self, settings: &Optimizer, lr: f64, number: usize) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let gradients: Vec<Tensor> = self
            .weights
            .iter()
            .map(|weight| match weight.grad() {
                grad if grad.defined() => grad.to_kind(Kind::Float),
                _ => Tensor::zeros_like(weight).to_kind(Kind::Float),
            })
            .collect();
        let norm = torch_ext::global_norm(&gradients)?.double_value(&[]);
        if norm.is_finite() {
            self.apply(settings, lr, number, norm, &gradients)?;
        }
        // Only now: in float32 the gradients above are the weights' own.
        for weight in &mut self.weights {
            weight.zero_grad();
        }
        Ok(norm)
    }

    fn apply(&mut self, settings: &Optimizer, lr: f64, number: usize, norm: f64, gradients: &[Tensor]) -> Result<()> {
        if settings.clip > 0.0 && norm > settings.clip {
            for mut gradient in gradients.iter().map(Tensor::shallow_clone) {
                let _ = gradient.g_mul_scalar_(settings.clip / norm);
            }
        }
        for decay in [true, false] {
            self.update(settings, lr, number, decay, gradients)?;
        }
        for (weight, master) in self.weights.iter_mut().zip(&self.masters) {
            if weight.kind() != Kind::Float {
                weight.copy_(master);
            }
        }
        Ok(())
    }

    fn update(&self, settings: &Optimizer, lr: f64, number: usize, decay: bool, gradients: &[Tensor]) -> Result<()> {
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

    /// Every tensor of the state under a name, for a checkpoint.
    pub fn tensors(&self) -> Vec<(String, Tensor)> {
        let named = |prefix: &'static str, tensors: &'_ [Tensor]| -> Vec<(String, Tensor)> {
            let pairs = self.names.iter().zip(tensors);
            pairs.map(|(name, tensor)| (format!("{prefix}.{name}"), tensor.shallow_clone())).collect()
        };
        let parts = [named("master", &self.masters), named("first", &self.first), named("second", &self.second)];
        parts.into_iter().flatten().collect()
    }

    /// Takes the state of a checkpoint, the weights included.
    ///
    /// # Errors
    /// [`Error::Usage`] when a tensor is missing or of another shape.
    pub fn restore(&mut self, mut find: impl FnMut(&str, &Tensor) -> Option<Tensor>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for (name, mut tensor) in self.tensors() {
            let saved = find(&name, &tensor)
                .ok_or_else(|| Error::usage(format!("the checkpoint's optimizer state lacks `{name}`")))?;
            tensor.f_copy_(&saved)?;
        }
        for (weight, master) in self.weights.iter_mut().zip(&self.masters) {
            weight.copy_(master);
        }
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
    use super::*;

    #[test]
    fn the_rate_rises_then_falls_to_its_floor() {
        let settings = Optimizer { lr: 1.0, warmup: 0.1, min_lr: 0.1, ..Optimizer::default() };
        let rates: Vec<f64> = (1..=100).map(|number| learning_rate(&settings, number, 100)).collect();
        assert_eq!((rates[0], rates[9]), (0.1, 1.0));
        assert!(rates[10..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!((rates[99] - 0.1).abs() < 1e-9);
    }
}
