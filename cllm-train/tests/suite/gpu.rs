//! A training pass with the kernels of the GPU, in bf16, against libtorch's operations on the CPU
//! in float32. Skipped, and saying so, where there is no GPU.

use cllm_core::cuda::libtorch;
use cllm_core::fingerprint;
use cllm_core::model::{LoraConfig, ModelConfig, ParamBuffer, Transformer};
use cllm_train::data::batch::Batch;
use cllm_train::data::packing::PackedSequence;
use cllm_train::loss::{Backward, batch_losses};
use cllm_train::losses::Losses;
use cllm_train::settings::{BlockContext, ConsistencySettings, Divergence};
use serde_json::{Value, json};
use tch::{Cuda, Device, Kind, Tensor};

use crate::packed::example;

fn shapes() -> Vec<(&'static str, Value)> {
    let with = |extra: Value| {
        let mut config = json!({
            "vocab_size": 512, "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 3,
            "num_attention_heads": 3, "head_dim": 64, "max_position_embeddings": 512,
        });
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        config
    };
    vec![
        ("llama", with(json!({"model_type": "llama", "num_key_value_heads": 1, "tie_word_embeddings": true}))),
        ("mistral", with(json!({"model_type": "mistral", "head_dim": 128, "num_key_value_heads": 3}))),
        ("qwen2", with(json!({"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2}))),
        ("qwen3", with(json!({"model_type": "qwen3", "num_key_value_heads": 1}))),
    ]
}

/// The same weights, as bf16 can hold them, on the GPU in bf16 and on the CPU in float32.
fn models(config: &Value, seed: u64) -> (Transformer, Transformer) {
    let config = ModelConfig::from_json(config).unwrap();
    let on_gpu = Transformer::random(config.clone(), seed, Device::Cuda(0), Kind::BFloat16);
    let on_cpu = Transformer::random(config, seed, Device::Cpu, Kind::Float);
    let _no_grad = tch::no_grad_guard();
    for ((name, mut fast), (_, mut exact)) in on_gpu.named_parameters().into_iter().zip(on_cpu.named_parameters()) {
        if name.ends_with("bias") {
            let _ = exact.normal_(0.0, 0.3);
        } else if name.ends_with("norm.weight") {
            let _ = exact.uniform_(0.5, 1.5);
        } else {
            exact *= 4.0;
        }
        fast.copy_(&exact);
        exact.copy_(&fast.to_device(Device::Cpu));
    }
    (on_gpu, on_cpu)
}

/// Losses, and the gradients of all weights.
fn run(
    model: &Transformer,
    gradients: &ParamBuffer,
    teacher: Option<&Transformer>,
    batch: &Batch,
    settings: &ConsistencySettings,
    recomputed: usize,
) -> (Losses<f64>, Tensor) {
    let _ = gradients.buffer().shallow_clone().zero_();
    let backward = Backward {
        scale: Losses { ar: 0.02, global: 0.01, local: 0.01, anchor: 0.02 },
        checkpointed_layers: recomputed,
    };
    let sums = batch_losses(model, teacher, batch, settings, Some(backward)).unwrap();
    (sums.map(|sum| sum.double_value(&[])), gradients.buffer().to_device(Device::Cpu).to_kind(Kind::Float))
}

#[test]
fn gpu_gradients_of_adapters_are_those_of_the_cpu_but_for_rounding() {
    if !Cuda::is_available() {
        eprintln!("skipped: there is no GPU");
        return;
    }
    for (name, config) in shapes() {
        let (mut on_gpu, mut on_cpu) = models(&config, 3);
        let lora = LoraConfig { rank: 8, alpha: 16.0, ..LoraConfig::default() };
        on_gpu.add_adapters(&lora, 5);
        on_cpu.add_adapters(&lora, 5);
        let _no_grad = tch::no_grad_guard();
        for ((_, mut fast), (_, mut exact)) in
            on_gpu.trainable().tensors().into_iter().zip(on_cpu.trainable().tensors())
        {
            let _ = exact.normal_(0.0, 0.05);
            fast.copy_(&exact);
            exact.copy_(&fast.to_device(Device::Cpu));
        }
        drop(_no_grad);
        let (fast, exact) = (on_gpu.collect_gradients().unwrap(), on_cpu.collect_gradients().unwrap());
        let settings = ConsistencySettings::default();
        let packed = [("a", 3, 9), ("b", 70, 90)].map(|(id, prompt, length)| {
            PackedSequence::sample(&example(id, prompt, length), &settings, &mut fingerprint::derive_rng(1, id, 0))
        });
        let batch = Batch::new(&packed, 100, None);
        let (_, gradient) = run(&on_gpu, &fast, None, &batch, &settings, 1);
        let (_, truth) = run(&on_cpu, &exact, None, &batch, &settings, 0);
        let apart = f64::try_from((&gradient - &truth).norm() / truth.norm()).unwrap();
        eprintln!("{name}: gradients of adapters differ by {apart:.4} of their norm");
        assert!(apart < 0.03, "{name}: {apart}");
    }
}

#[test]
fn gpu_losses_and_gradients_are_those_of_the_cpu_but_for_rounding() {
    if !Cuda::is_available() {
        eprintln!("skipped: there is no GPU");
        return;
    }
    for (name, config) in shapes() {
        let ((on_gpu, on_cpu), (teacher_gpu, teacher_cpu)) = (models(&config, 3), models(&config, 4));
        let (fast, exact) = (on_gpu.collect_gradients().unwrap(), on_cpu.collect_gradients().unwrap());
        for (context, divergence) in [
            (BlockContext::Clean, Divergence::Forward),
            (BlockContext::NoisyWindow, Divergence::Reverse),
            (BlockContext::NoisyWindow, Divergence::Jsd),
        ] {
            let settings = ConsistencySettings {
                context,
                divergence,
                window_blocks: 3,
                local_weight: 1.0,
                ..ConsistencySettings::default()
            };
            let packed: Vec<PackedSequence> = [("a", 3, 9), ("b", 70, 90), ("c", 12, 60), ("d", 1, 1)]
                .map(|(id, prompt, length)| {
                    PackedSequence::sample(
                        &example(id, prompt, length),
                        &settings,
                        &mut fingerprint::derive_rng(1, id, 0),
                    )
                })
                .into();
            let batch = Batch::new(&packed, 100, Some(0.0));
            assert!(batch.chunks.len() > 1);
            let (found, gradient) = run(&on_gpu, &fast, Some(&teacher_gpu), &batch, &settings, 0);
            let (expected, truth) = run(&on_cpu, &exact, Some(&teacher_cpu), &batch, &settings, 0);
            for (found, expected) in found.zip(expected).into_array() {
                assert!(expected > 0.0 && (found - expected).abs() < 0.02 * expected, "{name}: {found} {expected}");
            }
            for ((weight, gradient), (_, truth)) in fast.tensors().iter().zip(exact.tensors()) {
                let gradient = gradient.to_device(Device::Cpu).to_kind(Kind::Float);
                let apart = f64::try_from((&gradient - &truth).norm() / truth.norm()).unwrap();
                assert!(apart < 0.06, "{name}, {divergence:?}: the gradient of {weight} is off by {apart}");
            }
            let apart = f64::try_from((&gradient - &truth).norm() / truth.norm()).unwrap();
            eprintln!("{name}, {context:?}, {divergence:?}: gradients differ by {apart:.4} of their norm");
            assert!(apart < 0.03, "{name}: {apart}");
            // Twice the same, and the same where layers are computed again.
            for recomputed in [0, 2, 99] {
                let again = run(&on_gpu, &fast, Some(&teacher_gpu), &batch, &settings, recomputed);
                assert_eq!((again.0, again.1), (found, gradient.shallow_clone()), "{name}: {recomputed}");
            }
        }
    }
    assert!(libtorch::gpu_memory(Device::Cuda(0)).is_some());
}
