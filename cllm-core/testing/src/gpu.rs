//! Models for tests that compare a GPU with the CPU.

use cllm_core::model::{ModelConfig, Transformer};
use serde_json::Value;
use tch::{Cuda, Device, Kind};

use crate::families::waves;

/// The first GPU. Fails without one.
pub fn gpu() -> Device {
    assert!(Cuda::is_available(), "this test needs an NVIDIA GPU, and libtorch finds none");
    Device::Cuda(0)
}

/// A random model twice, with equal weights: in bfloat16 on the GPU, and in float32 on the CPU.
/// `scale` multiplies the matrices, so that the logits are as far apart as those of a trained
/// model.
pub fn on_gpu_and_cpu(config: &Value, seed: u64, scale: f64) -> (Transformer, Transformer) {
    let exact = exact(config, seed, scale);
    let rounded = Transformer::random(exact.config().clone(), seed, gpu(), Kind::BFloat16);
    for ((_, mut rounded), (_, exact)) in rounded.named_parameters().into_iter().zip(exact.named_parameters()) {
        tch::no_grad(|| rounded.copy_(&exact));
    }
    (rounded, exact)
}

/// Width of the models whose weights are scaled as the caller says; those of wider ones are smaller.
const BASE_WIDTH: f64 = 96.0;

/// The model in float32, whose weights bfloat16 can represent.
fn exact(config: &Value, seed: u64, scale: f64) -> Transformer {
    let model = Transformer::random(ModelConfig::from_json(config).unwrap(), seed, Device::Cpu, Kind::Float);
    let _no_grad = tch::no_grad_guard();
    for (name, mut weight) in model.named_parameters() {
        let exact = match name.as_str() {
            bias if bias.ends_with("bias") => waves(&name, &weight, seed) * 0.4,
            norm if norm.ends_with("norm.weight") => waves(&name, &weight, seed) * 0.5 + 1.0,
            // Logits of wide models, too, are sums of about the same size.
            _ => &weight * scale * (BASE_WIDTH / model.config().hidden_size as f64).sqrt(),
        };
        weight.copy_(&exact.to_kind(Kind::BFloat16));
    }
    model
}
