//! AdamW with weights and moments in bfloat16 and no float32 copy of either, in libtorch's
//! operations: what `cllm_core::cuda::optimizer` does in one kernel on a GPU. Updates are computed in
//! float32 and rounded stochastically: up or down at random, in proportion to the distance. So
//! even changes smaller than the spacing of bfloat16 numbers add up over many steps (Gupta et al.,
//! arXiv 1502.02551).

use cllm_core::Result;
use cllm_core::cuda::libtorch::AdamW;
use rand::Rng;
use tch::{Kind, Tensor};

/// One step in place; `gradients` are float32, the other tensors bfloat16, all `[elements]`, on the
/// CPU.
///
/// # Errors
/// [`cllm_core::Error::Torch`], for example when memory runs out.
pub fn step(
    params: &AdamW<'_>,
    mut weights: Tensor,
    gradients: &Tensor,
    mut exp_avg: Tensor,
    mut exp_avg_sq: Tensor,
    noise: &mut impl Rng,
) -> Result<()> {
    let AdamW { lr, beta1, beta2, weight_decay, eps, step, scale, skip } = *params;
    let gradients = gradients / scale;
    let averaged = |old: &Tensor, beta: f64, new: &Tensor| old.to_kind(Kind::Float) * beta + new * (1.0 - beta);
    let mean = averaged(&exp_avg, beta1, &gradients);
    let mean_square = averaged(&exp_avg_sq, beta2, &gradients.square());
    let bias_correction = |beta: f64| 1.0 - beta.powi(step as i32);
    let deviation = (&mean_square / bias_correction(beta2)).sqrt() + eps;
    let updated =
        weights.to_kind(Kind::Float) * (1.0 - lr * weight_decay) - (&mean / deviation) * (lr / bias_correction(beta1));
    let is_skipped = skip.to_kind(Kind::Bool);
    for (tensor, new) in [(&mut exp_avg, mean), (&mut exp_avg_sq, mean_square), (&mut weights, updated)] {
        let rounded = round_stochastically(&new, noise).to_kind(Kind::BFloat16);
        tensor.f_copy_(&tensor.where_self(&is_skipped, &rounded))?;
    }
    Ok(())
}

/// Rounds float32 numbers to ones that bfloat16 can represent, to either neighbour with a
/// probability in proportion to its nearness.
fn round_stochastically(x: &Tensor, noise: &mut impl Rng) -> Tensor {
    // bfloat16 is the upper half of float32: noise in the lower half carries into the upper half as
    // often as it should. It is not libtorch's, whose generator all threads of the process share.
    let noise: Vec<i32> = (0..x.numel()).map(|_| (noise.next_u32() & 0xffff) as i32).collect();
    let noise = Tensor::from_slice(&noise);
    (x.view_dtype(Kind::Int) + noise).bitwise_and(-(1i64 << 16)).view_dtype(Kind::Float)
}
