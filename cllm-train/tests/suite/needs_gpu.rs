//! A training pass and an update with the kernels of a GPU in bfloat16, against libtorch's
//! operations on the CPU in float32.

use cllm_core::cuda::libtorch::{self, AdamW};
use cllm_core::cuda::optimizer::{AdamWKernels, RoundingNoise};
use cllm_core::fingerprint;
use cllm_core::model::{AdaptedTokens, LoraConfig, ParamBuffer, Transformer};
use cllm_testing::gpu;
use cllm_train::data::batch::Batch;
use cllm_train::data::packing::PackedSequence;
use cllm_train::loss::{Backward, batch_losses};
use cllm_train::losses::Losses;
use cllm_train::settings::{BlockContext, ConsistencySettings, Divergence, PositionWeights};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::packed::example;
use crate::setup::plain_consistency;

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
        (
            "qwen3 with biases",
            with(json!({"model_type": "qwen3", "head_dim": 128, "num_key_value_heads": 3, "attention_bias": true})),
        ),
        // Rows that are not aligned to 16 bytes.
        (
            "odd sizes",
            with(
                json!({"model_type": "llama", "num_key_value_heads": 3, "hidden_size": 187, "intermediate_size": 333}),
            ),
        ),
        // Heads that are padded, as in OpenLLaMA-3B.
        ("odd heads", with(json!({"model_type": "qwen3", "head_dim": 100, "num_key_value_heads": 1}))),
        // More than one warp works on a row.
        ("wide", with(json!({"model_type": "qwen3", "hidden_size": 1000, "num_key_value_heads": 3}))),
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
    let backward = Backward { gradients, scale, checkpointed_layers };
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
    let adapters = [(AdaptedTokens::All, 0), (AdaptedTokens::Drafts, 0), (AdaptedTokens::Drafts, 1)];
    for ((name, config), (on, first_layer)) in
        shapes().into_iter().flat_map(|shape| adapters.map(|adapters| (shape.clone(), adapters)))
    {
        let (mut on_gpu, mut on_cpu) = gpu::on_gpu_and_cpu(&config, 3, 4.0);
        let lora = LoraConfig { rank: 8, alpha: 16.0, on, first_layer, ..LoraConfig::default() };
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
        let settings = plain_consistency();
        let packed = [("a", 3, 9), ("b", 70, 90)].map(|(id, prompt, length)| {
            PackedSequence::sample(&example(id, prompt, length), &settings, &mut fingerprint::derive_rng(1, id, 0))
        });
        let batch = Batch::new(&packed, 100, None);
        assert!(!batch.packed.draft_rows.is_empty());
        let (_, gradient) = run(&on_gpu, &gradients_gpu, None, &batch, &settings, 1);
        let (_, expected) = run(&on_cpu, &gradients_cpu, None, &batch, &settings, 0);
        let error = relative_error(&gradient, &expected);
        let case = format!("{name}, {on:?} from layer {first_layer}");
        eprintln!("{case}: gradients of adapters differ by {error:.4} of their norm");
        assert!(error < 0.03, "{case}: {error}");
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
        for (context, divergence, position_weights, after_miss_weight, anchor_weight) in [
            (BlockContext::Clean, Divergence::Forward, PositionWeights::Uniform, 1.0, 1.0),
            (BlockContext::NoisyWindow, Divergence::Reverse, PositionWeights::Acceptance, 1.0, 1.0),
            (BlockContext::NoisyWindow, Divergence::Jsd, PositionWeights::Uniform, 0.25, 1.0),
            (BlockContext::Clean, Divergence::Nla, PositionWeights::Uniform, 1.0, 1.0),
            (BlockContext::Clean, Divergence::LkHybrid, PositionWeights::Acceptance, 0.5, 1.0),
            // The targets are the frozen model's.
            (BlockContext::Clean, Divergence::Forward, PositionWeights::Acceptance, 1.0, 0.0),
        ] {
            let settings = ConsistencySettings {
                context,
                divergence,
                position_weights,
                after_miss_weight,
                ar_weight: 0.0,
                anchor_weight,
                window_blocks: 3,
                local_weight: 1.0,
                ..plain_consistency()
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
                let is_left_out = settings.has_frozen_targets() && expected == 0.0;
                assert!(expected > 0.0 || is_left_out, "{name}: {expected}");
                assert!((loss - expected).abs() <= 0.02 * expected, "{name}: {loss} {expected}");
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
            ..plain_consistency()
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

/// Weights, gradients and moments of `count` elements, float32 on the CPU: numbers that bfloat16 can
/// represent, of the sizes that they have in training.
fn optimizer_state(count: i64) -> [Tensor; 4] {
    tch::manual_seed(7);
    let normal = |scale: f64| Tensor::randn([count], (Kind::Float, Device::Cpu)) * scale;
    let rounded = |x: Tensor| x.to_kind(Kind::BFloat16).to_kind(Kind::Float);
    [normal(0.05), normal(1e-3), normal(1e-3), normal(1e-3).square()].map(rounded)
}

fn adamw<'t>(scale: &'t Tensor, skip: &'t Tensor, weight_decay: f64) -> AdamW<'t> {
    AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.98, weight_decay, eps: 1e-8, step: 3, scale, skip }
}

/// The results of libtorch's float32 AdamW on the CPU. The leading `num_decayed` weights decay.
fn exact_update([weights, gradients, exp_avg, exp_avg_sq]: &[Tensor; 4], num_decayed: i64) -> [Tensor; 3] {
    let (scale, skip) = (Tensor::from(2f32), Tensor::from(0f32));
    // libtorch scales the gradients in place.
    let (updated, gradients) = ([weights, exp_avg, exp_avg_sq].map(Tensor::copy), gradients.copy());
    for (start, length, decay) in [(0, num_decayed, 0.1), (num_decayed, weights.numel() as i64 - num_decayed, 0.0)] {
        let slice = |x: &Tensor| x.narrow(0, start, length);
        let [weights, exp_avg, exp_avg_sq] = updated.each_ref().map(slice);
        let numbers = adamw(&scale, &skip, decay);
        libtorch::fused_adamw(&numbers, &weights, &slice(&gradients), &exp_avg, &exp_avg_sq).unwrap();
    }
    updated
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn an_update_of_float32_state_is_that_of_libtorch() {
    let (device, count, num_decayed) = (gpu::gpu(), 1 << 20, (1 << 19) + 3);
    let kernels = AdamWKernels::new(device).unwrap().unwrap();
    let state = optimizer_state(count);
    let (scale, skip) = (Tensor::from(2f32).to_device(device), Tensor::from(0f32).to_device(device));
    let numbers = adamw(&scale, &skip, 0.1);
    let [master_weights, gradients, exp_avg, exp_avg_sq] = state.each_ref().map(|x| x.to_device(device));
    let (gradients, weights) = (gradients.to_kind(Kind::BFloat16), master_weights.to_kind(Kind::BFloat16));
    let updated = [&master_weights, &exp_avg, &exp_avg_sq];
    kernels.step_float32(&numbers, num_decayed as usize, &gradients, updated, &weights).unwrap();
    for (updated, expected) in updated.iter().zip(exact_update(&state, num_decayed)) {
        let error = relative_error(&updated.to_device(Device::Cpu), &expected);
        assert!(error < 1e-6, "{error}");
    }
    assert_eq!(weights, master_weights.to_kind(Kind::BFloat16));
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn an_update_of_bf16_state_is_rounded_to_either_neighbour_without_bias() {
    let (device, count, num_decayed) = (gpu::gpu(), 1 << 20, (1 << 19) + 3);
    let kernels = AdamWKernels::new(device).unwrap().unwrap();
    let state = optimizer_state(count);
    let scale = Tensor::from(2f32).to_device(device);
    // The elements are updated in as many shards as there are bounds.
    let update = |ends: &[i64], seed: u64, skip: f32| {
        let skip = Tensor::from(skip).to_device(device);
        let numbers = adamw(&scale, &skip, 0.1);
        let tensors = state.each_ref().map(|x| x.to_device(device).to_kind(Kind::BFloat16));
        let mut start = 0;
        for &end in ends {
            let [weights, gradients, exp_avg, exp_avg_sq] = tensors.each_ref().map(|x| x.narrow(0, start, end - start));
            let num_decayed = (num_decayed - start).clamp(0, end - start) as usize;
            let noise = RoundingNoise { seed, first_element: start as usize };
            kernels.step_bf16(&numbers, num_decayed, &gradients, [&weights, &exp_avg, &exp_avg_sq], noise).unwrap();
            start = end;
        }
        let [weights, _, exp_avg, exp_avg_sq] = tensors;
        [weights, exp_avg, exp_avg_sq].map(|x| x.to_device(Device::Cpu).to_kind(Kind::Float))
    };
    let rounded = update(&[count], 5, 0.0);
    for (rounded, exact) in rounded.iter().zip(exact_update(&state, num_decayed)) {
        // Neighbours differ by at most 2^-7 of either.
        let errors = (rounded - &exact) / exact.abs().clamp_min(1e-6);
        let (largest, mean) = (errors.abs().max().double_value(&[]), errors.mean(Kind::Float).double_value(&[]));
        assert!(largest > 0.004 && largest < 0.0079, "{largest}");
        assert!(mean.abs() < 5.0 * 2f64.powi(-8) / (count as f64).sqrt(), "{mean}");
    }
    assert_eq!(update(&[count / 4, count / 2 + 64, count], 5, 0.0), rounded, "shards are rounded alike");
    assert_ne!(update(&[count], 6, 0.0)[0], rounded[0]);
    let [weights, _, exp_avg, exp_avg_sq] = state.each_ref();
    assert_eq!(update(&[count], 5, 1.0).each_ref(), [weights, exp_avg, exp_avg_sq], "a skipped update changes nothing");
}
