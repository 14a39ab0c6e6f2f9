//! The exponential moving average of the weights: less speed than the last weights, and more of the teacher's answers.

use cllm_core::Result;
use cllm_core::model::Transformer;
use tch::Tensor;

/// The average, in float32 where the weights are.
pub struct Ema {
    decay: f64,
    mean: Vec<Tensor>,
}

impl Ema {
    /// An average of what [`Ema::update`] will be given: of weights like these, float32. None where `decay` is 0.
    pub fn new(decay: f64, weights: &[Tensor]) -> Option<Self> {
        let _no_grad = tch::no_grad_guard();
        (decay > 0.0).then(|| Ema { decay, mean: weights.iter().map(|weight| weight.detach().copy()).collect() })
    }

    /// Takes in the weights after step `number` (from 1). The weights of step i count decay^(number - i), and all of them 1:
    /// the model that a run starts from has no part.
    ///
    /// # Errors
    /// libtorch's errors.
    pub fn update(&mut self, weights: &[Tensor], number: usize) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let share = (1.0 - self.decay) / (1.0 - self.decay.powf(number as f64));
        for (mean, weight) in self.mean.iter_mut().zip(weights) {
            let _ = mean.f_lerp_(weight, share)?;
        }
        Ok(())
    }

    /// The average, tensor by tensor as the weights were given.
    pub fn mean(&self) -> &[Tensor] {
        &self.mean
    }
}

/// Runs `body` while a model has the average, where there is one, for its weights; then it has its own again.
///
/// # Errors
/// The body's own, libtorch's.
pub fn with_average<T>(ema: Option<&Ema>, model: &Transformer, body: impl FnOnce() -> Result<T>) -> Result<T> {
    let Some(ema) = ema else { return body() };
    let mut weights: Vec<Tensor> = model.parameters().into_iter().map(|(_, weight)| weight).collect();
    let own: Vec<Tensor> = tch::no_grad(|| weights.iter().map(|weight| weight.detach().copy()).collect());
    put(&mut weights, &ema.mean)?;
    let result = body();
    put(&mut weights, &own)?;
    result
}

fn put(weights: &mut [Tensor], values: &[Tensor]) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    for (weight, value) in weights.iter_mut().zip(values) {
        weight.f_copy_(value)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_weighs_each_step_by_its_age_and_leaves_the_start_out() {
        let weights = |value: f64| [Tensor::full([2, 3], value, (tch::Kind::Float, tch::Device::Cpu))];
        let mut ema = Ema::new(0.5, &weights(100.0)).unwrap();
        for (index, value) in [4.0, 8.0, 2.0].into_iter().enumerate() {
            ema.update(&weights(value), index + 1).unwrap();
        }
        let expected = (4.0 * 0.25 + 8.0 * 0.5 + 2.0) / 1.75;
        let found = ema.mean()[0].double_value(&[1, 2]);
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        assert!(Ema::new(0.0, &weights(1.0)).is_none());
    }
}
