//! Random weights.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tch::{Device, Kind, Tensor};

use super::{ModelConfig, ParamBuffer, Transformer};

impl Transformer {
    /// Random weights (normal, 0.02; norms 1, biases 0), drawn on the CPU: the same for the same seed on every device.
    pub fn random(config: ModelConfig, seed: u64, device: Device, kind: Kind) -> Self {
        let weights = random_params(&config, seed, device, kind);
        Self::assemble(config, weights)
    }

    /// Noise drawn on the device: a shape to measure speed with, where drawing on the CPU would take minutes.
    pub fn random_on_device(config: ModelConfig, device: Device, kind: Kind) -> Self {
        let _no_grad = tch::no_grad_guard();
        let weights = ParamBuffer::zeros(config.parameter_shapes(), device, kind);
        let _ = weights.buffer().shallow_clone().normal_(0.0, 0.02);
        Self::assemble(config, weights)
    }
}

/// Random weights, drawn on the CPU in float32 whatever the device.
fn random_params(config: &ModelConfig, seed: u64, device: Device, kind: Kind) -> ParamBuffer {
    let _no_grad = tch::no_grad_guard();
    let draw = |index: usize, name: &str, shape: &[i64]| {
        let options = (Kind::Float, Device::Cpu);
        if name.ends_with("norm.weight") {
            Tensor::ones(shape, options)
        } else if name.ends_with(".bias") {
            Tensor::zeros(shape, options)
        } else {
            // Not libtorch's generator: it is shared by all threads of the process.
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(index as u64);
            let count = shape.iter().product::<i64>() as usize;
            Tensor::from_slice(&normals(&mut random, count, 0.02)).view(shape)
        }
    };
    let weights = ParamBuffer::zeros(config.parameter_shapes(), device, kind);
    for (index, (name, mut weight)) in weights.tensors().into_iter().enumerate() {
        weight.copy_(&draw(index, &name, &weight.size()));
    }
    weights
}

/// Normal numbers by Box and Muller's method.
fn normals(random: &mut ChaCha8Rng, count: usize, deviation: f64) -> Vec<f32> {
    let mut unit = || ((random.next_u32() as f64) + 0.5) / 2f64.powi(32);
    let mut numbers = Vec::with_capacity(count + 1);
    while numbers.len() < count {
        let radius = deviation * (-2.0 * unit().ln()).sqrt();
        let (sine, cosine) = (std::f64::consts::TAU * unit()).sin_cos();
        numbers.extend([(radius * cosine) as f32, (radius * sine) as f32]);
    }
    numbers.truncate(count);
    numbers
}
