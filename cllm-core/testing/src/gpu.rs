//! Models for tests that compare a GPU with the CPU.

use cllm_core::model::{ModelConfig, Transformer};
use serde_json::Value;
use tch::{Cuda, Device, Kind};

/// The first GPU. Fails without one.
pub fn gpu() -> Device {
    assert!(Cuda::is_available(), "this test needs an NVIDIA GPU, and libtorch finds none");
    Device::Cuda(0)
}

/// A random model twice, with equal weights: in bfloat16 on the GPU, and in float32 on the CPU.
/// `scale` multiplies the matrices, so that the logits are as far apart as those of a trained
/// model.
pub fn on_gpu_and_cpu(config: &Value, seed: u64, scale: f64) -> (Transformer, Transformer) {
    let config = ModelConfig::from_json(config).unwrap();
    let on_gpu = Transformer::random(config.clone(), seed, gpu(), Kind::BFloat16);
    let on_cpu = Transformer::random(config, seed, Device::Cpu, Kind::Float);
    let _no_grad = tch::no_grad_guard();
    for ((name, mut rounded), (_, mut exact)) in on_gpu.named_parameters().into_iter().zip(on_cpu.named_parameters()) {
        if name.ends_with("bias") {
            let _ = exact.normal_(0.0, 0.3);
        } else if name.ends_with("norm.weight") {
            let _ = exact.uniform_(0.5, 1.5);
        } else {
            exact *= scale;
        }
        rounded.copy_(&exact);
        exact.copy_(&rounded.to_device(Device::Cpu));
    }
    (on_gpu, on_cpu)
}
