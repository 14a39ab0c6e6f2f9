//! A training pass with the kernels of a GPU in bfloat16, against libtorch's operations on the CPU
//! in float32.

use cllm_core::cuda::libtorch;
use cllm_core::fingerprint;
use cllm_core::model::{LoraConfig, ParamBuffer, Transformer};
use cllm_testing::gpu;
use cllm_train::data::batch::Batch;
use cllm_train::data::packing::PackedSequence;
use cllm_train::loss::{Backward, batch_losses};
use cllm_train::losses::Losses;
use cllm_train::settings::{BlockContext, ConsistencySettings, Divergence};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

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
        ("heads of 80", with(json!({"model_type": "llama", "head_dim": 80, "num_key_value_heads": 1}))),
        ("qwen3", with(json!({"model_type": "qwen3", "num_key_value_heads": 1}))),
        ("mistral-window", with(json!({"model_type": "mistral", "num_key_value_heads": 3, "sliding_window": 70}))),
        (
            "qwen2-window",
            with(json!({"model_type": "qwen2", "num_key_value_heads": 1, "use_sliding_window": true,
            "sliding_window": 5, "max_window_layers": 1})),
        ),
    ]
}

/// The losses of a batch, and the gradients of all weights.
fn run(
    model: &Transformer,
    gradients: &ParamBuffer,
    teacher: Option<&Transformer>,
    batch: &Batch,
    settings: &ConsistencySettings,
    checkpointed_layers: usize,
) -> (Losses<f64>, Tensor) {
    let _ = gradients.buffer().shallow_clone().zero_();
    let scale = Losses { ar: 0.02, global: 0.01, local: 0.01, anchor: 0.02 };
    let backward = Backward { scale, checkpointed_layers };
    let sums = batch_losses(model, teacher, batch, settings, Some(backward)).unwrap();
    (sums.map(|sum| sum.double_value(&[])), gradients.buffer().to_device(Device::Cpu).to_kind(Kind::Float))
}

/// The norm of the difference over the norm of what was expected.
fn relative_error(actual: &Tensor, expected: &Tensor) -> f64 {
    f64::try_from((actual - expected).norm() / expected.norm()).unwrap()
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn gradients_of_adapters_are_those_of_the_cpu_up_to_rounding() {
    for (name, config) in shapes() {
        let (mut on_gpu, mut on_cpu) = gpu::on_gpu_and_cpu(&config, 3, 4.0);
        let lora = LoraConfig { rank: 8, alpha: 16.0, ..LoraConfig::default() };
        on_gpu.add_adapters(&lora, 5);
        on_cpu.add_adapters(&lora, 5);
        let _no_grad = tch::no_grad_guard();
        for ((_, mut rounded), (_, mut exact)) in
            on_gpu.trainable().tensors().into_iter().zip(on_cpu.trainable().tensors())
        {
            let _ = exact.normal_(0.0, 0.05);
            rounded.copy_(&exact);
            exact.copy_(&rounded.to_device(Device::Cpu));
        }
        drop(_no_grad);
        let gradients_gpu = on_gpu.collect_gradients().unwrap();
        let gradients_cpu = on_cpu.collect_gradients().unwrap();
        let settings = ConsistencySettings::default();
        let packed = [("a", 3, 9), ("b", 70, 90)].map(|(id, prompt, length)| {
            PackedSequence::sample(&example(id, prompt, length), &settings, &mut fingerprint::derive_rng(1, id, 0))
        });
        let batch = Batch::new(&packed, 100, None);
        let (_, gradient) = run(&on_gpu, &gradients_gpu, None, &batch, &settings, 1);
        let (_, expected) = run(&on_cpu, &gradients_cpu, None, &batch, &settings, 0);
        let error = relative_error(&gradient, &expected);
        eprintln!("{name}: gradients of adapters differ by {error:.4} of their norm");
        assert!(error < 0.03, "{name}: {error}");
    }
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn losses_and_gradients_are_those_of_the_cpu_up_to_rounding() {
    for (name, config) in shapes() {
        let (on_gpu, on_cpu) = gpu::on_gpu_and_cpu(&config, 3, 4.0);
        let (teacher_gpu, teacher_cpu) = gpu::on_gpu_and_cpu(&config, 4, 4.0);
        let gradients_gpu = on_gpu.collect_gradients().unwrap();
        let gradients_cpu = on_cpu.collect_gradients().unwrap();
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
            let (losses, gradient) = run(&on_gpu, &gradients_gpu, Some(&teacher_gpu), &batch, &settings, 0);
            let (expected_losses, expected) = run(&on_cpu, &gradients_cpu, Some(&teacher_cpu), &batch, &settings, 0);
            for (loss, expected) in losses.zip(expected_losses).into_array() {
                assert!(expected > 0.0 && (loss - expected).abs() < 0.02 * expected, "{name}: {loss} {expected}");
            }
            for ((weight, gradient), (_, expected)) in gradients_gpu.tensors().iter().zip(gradients_cpu.tensors()) {
                let error = relative_error(&gradient.to_device(Device::Cpu).to_kind(Kind::Float), &expected);
                assert!(error < 0.06, "{name}, {divergence:?}: the gradient of {weight} is off by {error}");
            }
            let error = relative_error(&gradient, &expected);
            eprintln!("{name}, {context:?}, {divergence:?}: gradients differ by {error:.4} of their norm");
            assert!(error < 0.03, "{name}: {error}");
            // Every run gives the same numbers, whichever layers are checkpointed.
            for checkpointed_layers in [0, 2, 99] {
                let again = run(&on_gpu, &gradients_gpu, Some(&teacher_gpu), &batch, &settings, checkpointed_layers);
                assert_eq!(again, (losses, gradient.shallow_clone()), "{name}: {checkpointed_layers}");
            }
        }
    }
    assert!(libtorch::gpu_memory(Device::Cuda(0)).is_some());
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn attention_of_every_width_and_group_is_that_of_the_cpu_over_long_sequences() {
    for (heads, kv_heads, head_dim) in
        [(3, 1, 64), (7, 1, 64), (8, 1, 80), (4, 2, 96), (5, 5, 112), (8, 2, 128), (6, 1, 128), (2, 1, 256)]
    {
        let config = json!({
            "model_type": "llama", "vocab_size": 512, "hidden_size": 192, "intermediate_size": 320,
            "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": head_dim, "max_position_embeddings": 2048,
        });
        let (on_gpu, on_cpu) = gpu::on_gpu_and_cpu(&config, 3, 4.0);
        let (gradients_gpu, gradients_cpu) = (on_gpu.collect_gradients().unwrap(), on_cpu.collect_gradients().unwrap());
        let settings = ConsistencySettings {
            context: BlockContext::NoisyWindow,
            window_blocks: 9,
            local_weight: 1.0,
            ..ConsistencySettings::default()
        };
        // The next tiles of keys that a tile needs are often far apart.
        let packed = [("a", 150, 410), ("b", 3, 5), ("c", 700, 60), ("d", 90, 300)].map(|(id, prompt, length)| {
            PackedSequence::sample(&example(id, prompt, length), &settings, &mut fingerprint::derive_rng(1, id, 0))
        });
        let batch = Batch::new(&packed, 4096, None);
        let (losses, gradient) = run(&on_gpu, &gradients_gpu, None, &batch, &settings, 0);
        let (_, expected) = run(&on_cpu, &gradients_cpu, None, &batch, &settings, 0);
        let error = relative_error(&gradient, &expected);
        eprintln!("{heads} and {kv_heads} heads of {head_dim}: gradients differ by {error:.4} of their norm");
        assert!(error < 0.03, "{heads} and {kv_heads} heads of {head_dim}: {error}");
        assert_eq!(
            run(&on_gpu, &gradients_gpu, None, &batch, &settings, 1),
            (losses, gradient),
            "every run is the same"
        );
    }
}
