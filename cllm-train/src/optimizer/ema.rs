//! The exponential moving average of the weights. The averaged model decodes slightly slower than
//! the last one and keeps more of the teacher's answers.

use cllm_core::Result;
use tch::{Kind, Tensor};

pub struct Ema {
    /// Float32 `[elements]`.
    pub average: Tensor,
    decay: f64,
}

impl Ema {
    /// Creates an average of weights `[elements]` that starts with the first update and excludes
    /// the initial weights.
    pub fn new(weights: &Tensor, decay: f64) -> Self {
        Ema { average: weights.to_kind(Kind::Float).copy(), decay }
    }

    /// Adds the weights after step `number` (from 1) to the average. The weights of step i count
    /// decay^(number - i), divided by the sum of these over all steps. Weights that are not float32
    /// are converted at most `max_elements` at a time.
    ///
    /// # Errors
    /// [`cllm_core::Error::Torch`], for example when memory runs out.
    pub fn update(&self, weights: &Tensor, number: usize, max_elements: i64) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let weight = (1.0 - self.decay) / (1.0 - self.decay.powf(number as f64));
        let num_elements = self.average.size()[0];
        for start in (0..num_elements).step_by(max_elements as usize) {
            let chunk = |x: &Tensor| x.narrow(0, start, max_elements.min(num_elements - start));
            let _ = chunk(&self.average).f_lerp_(&chunk(weights).to_kind(Kind::Float), weight)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_weighs_each_step_by_its_age_and_excludes_the_initial_weights() {
        let weights = |value: f64| Tensor::full([6], value, (Kind::Float, tch::Device::Cpu));
        let ema = Ema::new(&weights(100.0), 0.5);
        for (index, value) in [4.0, 8.0, 2.0].into_iter().enumerate() {
            ema.update(&weights(value), index + 1, 4).unwrap();
        }
        let expected = (4.0 * 0.25 + 8.0 * 0.5 + 2.0) / 1.75;
        for index in 0..6 {
            let average = ema.average.double_value(&[index]);
            assert!((average - expected).abs() < 1e-6, "{average}, expected {expected}");
        }
    }
}
