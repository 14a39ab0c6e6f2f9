//! The exponential moving average of the weights: less speed than the last weights, and more of the teacher's answers.

use cllm_core::Result;
use tch::Tensor;

use crate::optimizer::PIECE;

/// Takes the weights after step `number` (from 1) into their average, both float32 and of one shape. The weights of step i count
/// decay^(number - i), and all of them 1: the model that a run starts from has no part.
///
/// # Errors
/// libtorch's errors.
pub fn update(average: &Tensor, weights: &Tensor, decay: f64, number: usize) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    let share = (1.0 - decay) / (1.0 - decay.powf(number as f64));
    // In pieces: what is not float32 is copied.
    let count = average.size()[0];
    for start in (0..count).step_by(PIECE as usize) {
        let of = |x: &Tensor| x.narrow(0, start, PIECE.min(count - start));
        let _ = of(average).f_lerp_(&of(weights).to_kind(tch::Kind::Float), share)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_average_weighs_each_step_by_its_age_and_leaves_the_start_out() {
        let weights = |value: f64| Tensor::full([2, 3], value, (tch::Kind::Float, tch::Device::Cpu));
        let average = weights(100.0);
        for (index, value) in [4.0, 8.0, 2.0].into_iter().enumerate() {
            update(&average, &weights(value), 0.5, index + 1).unwrap();
        }
        let expected = (4.0 * 0.25 + 8.0 * 0.5 + 2.0) / 1.75;
        let found = average.double_value(&[1, 2]);
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
}
