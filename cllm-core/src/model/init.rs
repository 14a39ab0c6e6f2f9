//! Random weights. They depend only on the seed: the same seed gives the same bytes on every device
//! and machine.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

use super::config::ModelConfig;
use super::params::ParamBuffer;

/// Standard deviation of the weights of projections and embeddings, as in Llama.
const STANDARD_DEVIATION: f64 = 0.02;

/// Weights for training from scratch: normal matrices, norms of 1, biases of 0. Drawn on the CPU in
/// float32, whatever the device and the type.
pub(super) fn random_params(config: &ModelConfig, seed: u64, device: Device, kind: Kind) -> ParamBuffer {
    let _no_grad = tch::no_grad_guard();
    let draw = |index: usize, name: &str, shape: &[i64]| {
        let options = (Kind::Float, Device::Cpu);
        if name.ends_with("norm.weight") {
            Tensor::ones(shape, options)
        } else if name.ends_with(".bias") {
            Tensor::zeros(shape, options)
        } else {
            // Not libtorch's generator, which all threads of the process share.
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(index as u64);
            let count = shape.iter().product::<i64>() as usize;
            Tensor::from_slice(&draw_normals(&mut rng, count, STANDARD_DEVIATION)).view(shape)
        }
    };
    let params = ParamBuffer::zeros(config.parameter_shapes(), device, kind);
    for (index, (name, mut weight)) in params.tensors().into_iter().enumerate() {
        weight.copy_(&draw(index, &name, &weight.size()));
    }
    params
}

/// Weights for speed measurements only, drawn on the device: on the CPU, those of a large model
/// would take minutes.
pub(super) fn random_params_on_device(config: &ModelConfig, device: Device, kind: Kind) -> ParamBuffer {
    let _no_grad = tch::no_grad_guard();
    let params = ParamBuffer::zeros(config.parameter_shapes(), device, kind);
    let _ = params.buffer().shallow_clone().normal_(0.0, STANDARD_DEVIATION);
    params
}

/// Normal numbers by the Box-Muller transform. `rand_distr` draws them with the ziggurat algorithm,
/// which would give other weights for the seeds of runs that exist.
fn draw_normals(rng: &mut ChaCha8Rng, count: usize, standard_deviation: f64) -> Vec<f32> {
    let mut draw_uniform = || ((rng.next_u32() as f64) + 0.5) / 2f64.powi(32);
    let mut normals = Vec::with_capacity(count + 1);
    while normals.len() < count {
        let radius = standard_deviation * (-2.0 * draw_uniform().ln()).sqrt();
        let (sine, cosine) = (std::f64::consts::TAU * draw_uniform()).sin_cos();
        normals.extend([(radius * cosine) as f32, (radius * sine) as f32]);
    }
    normals.truncate(count);
    normals
}
