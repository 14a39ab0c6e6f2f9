//! How long a step takes on a GPU that is not here: the operations of matrix products and attention
//! at the share of the peak that was measured, and the bytes that pass through its memory at a share
//! of the bandwidth.
//!
//! Counted per token and layer, with h the hidden width, q that of the queries, s that of queries,
//! keys and values together, f that of the feed-forward layer. A forward is 1 product with each
//! weight, a backward 2 (1 with frozen weights), and a checkpointed layer has 1 more forward.

use cllm_core::gpus::GpuModel;
use cllm_core::model::{BaseDtype, ModelConfig};

use crate::data::dataset::Example;
use crate::memory::LayerWidths;
use crate::settings::{ConsistencySettings, Settings, StateDtype};

/// Share of the peak that large matrix products reach.
const PRODUCT_SHARE: f64 = 0.60;
/// Share of the peak that attention reaches.
const ATTENTION_SHARE: f64 = 0.26;
/// Share of the bandwidth that kernels reach whose time is that of reading and writing.
const BANDWIDTH_SHARE: f64 = 0.80;
/// Relative error of the estimate on the shapes that it was compared with.
pub const RELATIVE_ERROR: f64 = 0.2;
/// Bytes per second and GPU of collectives, over NVLink.
const EXCHANGE_BANDWIDTH: f64 = 150e9;

/// The mean work of a step on each process.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepWork {
    /// Floating-point operations of matrix products.
    products: f64,
    /// Floating-point operations of attention, over the pairs of tokens that are not masked.
    attention: f64,
    /// Bytes that are read and written.
    bytes: f64,
    /// Bytes that each process sends to the others.
    exchanged: f64,
}

impl StepWork {
    /// Counts the work of steps on these batches, indices of examples.
    pub fn new(
        settings: &Settings,
        config: &ModelConfig,
        examples: &[Example],
        batches: &[Vec<usize>],
        world_size: usize,
    ) -> Self {
        let num_steps = batches.len().div_ceil(settings.accumulation) as f64;
        let per_process = 1.0 / num_steps / world_size as f64;
        let mean = |count: &dyn Fn(&Example) -> f64| {
            batches.iter().flatten().map(|&index| count(&examples[index])).sum::<f64>() * per_process
        };
        let consistency = &settings.consistency;
        let packed = Forward {
            num_layers: config.num_layers as f64,
            num_batches: batches.len() as f64 * per_process,
            num_tokens: mean(&|example| example.max_packed_tokens(consistency) as f64),
            num_pairs: mean(&|example| attended_pairs(config, example, consistency)),
        };
        let num_unadapted = settings.lora.as_ref().map_or(0, |lora| lora.first_layer);
        let share = num_unadapted as f64 / config.num_layers as f64;
        let mut work = layers_work(settings, config, &packed.in_share_of_layers(1.0 - share))
            .plus(frozen_layers_work(config, &packed.in_share_of_layers(share)))
            .plus(update_work(settings, config, world_size))
            .plus(head_work(settings, config, mean(&|example| trained_rows(settings, example))))
            .plus(frozen_head_work(config, mean(&|example| frozen_rows(settings, example))));
        if settings.is_anchored() {
            let clean = Forward {
                num_tokens: mean(&|example| example.num_clean_tokens() as f64),
                num_pairs: mean(&|example| clean_pairs(config, example)),
                ..packed
            };
            work = work.plus(frozen_layers_work(config, &clean));
        }
        work
    }

    fn plus(self, other: Self) -> Self {
        StepWork {
            products: self.products + other.products,
            attention: self.attention + other.attention,
            bytes: self.bytes + other.bytes,
            exchanged: self.exchanged + other.exchanged,
        }
    }

    /// Estimated seconds of a step.
    pub fn seconds(&self, gpu: &GpuModel) -> f64 {
        self.products / (PRODUCT_SHARE * gpu.bf16_flops)
            + self.attention / (ATTENTION_SHARE * gpu.bf16_flops)
            + self.bytes / (BANDWIDTH_SHARE * gpu.bandwidth)
            + self.exchanged / EXCHANGE_BANDWIDTH
    }
}

/// The mean size of the forwards of a step on each process.
struct Forward {
    num_layers: f64,
    num_batches: f64,
    num_tokens: f64,
    /// Pairs of tokens that attend to each other, summed over the layers.
    num_pairs: f64,
}

impl Forward {
    /// The part of it that some of its layers are.
    fn in_share_of_layers(&self, share: f64) -> Self {
        Forward { num_layers: share * self.num_layers, num_pairs: share * self.num_pairs, ..*self }
    }
}

/// Rows of a packed example whose logits have gradients: of the response, of prompts in the anchor
/// loss, and of noisy tokens once for each of the two losses on them.
fn trained_rows(settings: &Settings, example: &Example) -> f64 {
    let consistency = &settings.consistency;
    let num_noisy_losses = [consistency.global_weight, consistency.local_weight].iter().filter(|&&w| w > 0.0).count();
    let clean =
        if settings.is_anchored() { anchored_rows(settings, example) } else { example.response_ids.len() as f64 };
    clean + (num_noisy_losses * example.max_noisy_tokens(consistency)) as f64
}

/// Rows whose logits have none: those of the anchor, and of the next states in the local loss.
fn frozen_rows(settings: &Settings, example: &Example) -> f64 {
    let consistency = &settings.consistency;
    let anchored = if settings.is_anchored() { anchored_rows(settings, example) } else { 0.0 };
    let next = if consistency.local_weight > 0.0 { example.max_noisy_tokens(consistency) } else { 0 };
    anchored + next as f64
}

fn anchored_rows(settings: &Settings, example: &Example) -> f64 {
    settings.consistency.anchor_prompt_fraction * example.prompt_ids.len() as f64 + example.response_ids.len() as f64
}

/// Pairs of tokens of the prompt and the response alone, summed over the layers.
fn clean_pairs(config: &ModelConfig, example: &Example) -> f64 {
    let of_layer = |window: &Option<i32>| {
        causal_pairs(0.0, example.num_clean_tokens() as f64, window.map_or(f64::INFINITY, f64::from))
    };
    config.sliding_windows.iter().map(of_layer).sum()
}

/// Pairs of tokens of a packed example that attend to each other, summed over the layers: those of
/// prompt and response, and for each noisy block those with what is before it and with its own.
fn attended_pairs(config: &ModelConfig, example: &Example, consistency: &ConsistencySettings) -> f64 {
    let candidates = example.candidate_blocks(consistency);
    let chosen = consistency.max_blocks.map_or(1.0, |max| (max as f64 / candidates.len().max(1) as f64).min(1.0));
    let streams = if consistency.local_weight > 0.0 { 2.0 } else { 1.0 };
    let of_block = |index: usize, window: f64| {
        let block = &example.blocks[index];
        let num_draws = example.num_draws(index, consistency) as f64;
        num_draws * causal_pairs((example.prompt_ids.len() + block.start) as f64, block.states[0].len() as f64, window)
    };
    let of_layer = |window: &Option<i32>| {
        let window = window.map_or(f64::INFINITY, f64::from);
        candidates.iter().map(|&index| of_block(index, window)).sum::<f64>()
    };
    let noisy: f64 = config.sliding_windows.iter().map(of_layer).sum();
    clean_pairs(config, example) + chosen * streams * noisy
}

/// Pairs of `length` tokens after `before` others with themselves and what a window shows of the
/// tokens before them.
fn causal_pairs(before: f64, length: f64, window: f64) -> f64 {
    // The leading tokens see everything before them.
    let all = (window - before).clamp(0.0, length);
    let seen = all * before + all * (all + 1.0) / 2.0;
    if all < length { seen + (length - all) * window } else { seen }
}

/// Forward and backward of the last layers: of all, or of those with adapters.
fn layers_work(settings: &Settings, config: &ModelConfig, forward: &Forward) -> StepWork {
    let Forward { num_layers, num_batches, num_tokens, num_pairs } = *forward;
    let LayerWidths { hidden: h, queries: q, qkv: s, ffn: f, .. } = LayerWidths::new(config);
    let num_others = config.num_layers as f64 - num_layers;
    let recomputed = (settings.checkpointed_layers as f64 - num_others).clamp(0.0, num_layers) / num_layers;
    let weights = h * s + q * h + 3.0 * h * f;
    let adapters = settings.lora.as_ref().map_or(0.0, |lora| lora.num_parameters(config) as f64 / num_layers);
    // Passes over the weights; the gradient of a frozen weight is not computed.
    let passes = if settings.lora.is_some() { 2.0 } else { 3.0 } + recomputed;
    // A product reads its input and writes its output: qkv, the output of the attention onto the
    // residual stream, gate and up, and the last onto the residual stream.
    let product_bytes = 2.0 * passes * (6.0 * h + s + q + 3.0 * f);
    // Every pass of a batch reads the weights, and one adds to their gradients.
    // Quantized weights are read as int8, and written and read as their copy.
    let weight_bytes = weights
        * match &settings.lora {
            None => 2.0 * passes + 4.0,
            Some(lora) if lora.base_dtype == BaseDtype::Int8 => 5.0 * passes,
            Some(_) => 2.0 * passes,
        };
    // Adapters read the inputs of the products again and write to their outputs before them; in the
    // backward they read inputs and both gradients again, and write to that of the input.
    let (inputs, outputs) = (2.0 * h + q + f, s + 2.0 * h + 2.0 * f);
    let adapter_bytes = match settings.lora {
        Some(_) => 2.0 * (4.0 * inputs + 4.0 * outputs + recomputed * 2.0 * (outputs - h)),
        None => 0.0,
    };
    // Norms, RoPE and SwiGLU, forward and backward.
    let elementwise = (24.0 * h + 8.0 * s + 18.0 * f) + recomputed * (8.0 * h + 4.0 * s + 6.0 * f);
    StepWork {
        products: num_layers * num_tokens * (2.0 * passes * weights + 2.0 * (3.0 + recomputed) * adapters),
        // Two products of the forward and five of the backward.
        attention: num_pairs * q * (4.0 * (1.0 + recomputed) + 10.0),
        bytes: num_layers * (num_tokens * (product_bytes + elementwise + adapter_bytes) + num_batches * weight_bytes),
        exchanged: 0.0,
    }
}

/// A forward through layers without gradients: those of the anchor, or those below the adapters.
fn frozen_layers_work(config: &ModelConfig, forward: &Forward) -> StepWork {
    let Forward { num_layers, num_batches, num_tokens, num_pairs } = *forward;
    let LayerWidths { hidden: h, queries: q, qkv: s, ffn: f, .. } = LayerWidths::new(config);
    let weights = h * s + q * h + 3.0 * h * f;
    // The same inputs and outputs of products and elementwise operations as in a recomputed layer.
    let token_bytes = 2.0 * (6.0 * h + s + q + 3.0 * f) + 8.0 * h + 4.0 * s + 6.0 * f;
    StepWork {
        products: 2.0 * num_layers * num_tokens * weights,
        attention: 4.0 * num_pairs * q,
        bytes: num_layers * (num_tokens * token_bytes + 2.0 * num_batches * weights),
        exchanged: 0.0,
    }
}

/// Logits, losses and their gradients.
fn head_work(settings: &Settings, config: &ModelConfig, num_rows: f64) -> StepWork {
    let (hidden, vocab) = (config.hidden_size as f64, config.vocab_size as f64);
    let passes = if settings.lora.is_some() { 2.0 } else { 3.0 };
    StepWork {
        products: 2.0 * passes * num_rows * hidden * vocab,
        bytes: 12.0 * num_rows * vocab,
        ..Default::default()
    }
}

/// Logits that need no gradients: they are written, and read twice.
fn frozen_head_work(config: &ModelConfig, num_rows: f64) -> StepWork {
    let (hidden, vocab) = (config.hidden_size as f64, config.vocab_size as f64);
    StepWork { products: 2.0 * num_rows * hidden * vocab, bytes: 6.0 * num_rows * vocab, ..Default::default() }
}

/// The update of this process's shard, and the exchange of gradients and weights.
fn update_work(settings: &Settings, config: &ModelConfig, world_size: usize) -> StepWork {
    let trained = settings.trained_parameters(config) as f64;
    // Gradients are read for their norm and for the update, and cleared; two moments and the weights
    // that are updated are read and written, and master weights written once more, rounded.
    let dtype = settings.optimizer.state_dtype;
    let rounded = if dtype == StateDtype::Float32 { 2.0 } else { 0.0 };
    let state = 2.0 * 3.0 * dtype.num_bytes() as f64 + rounded;
    let average = if settings.optimizer.ema_decay.is_some() { 10.0 } else { 0.0 };
    let others = (world_size - 1) as f64 / world_size as f64;
    StepWork {
        bytes: (6.0 + state + average) * trained / world_size as f64,
        exchanged: 2.0 * 2.0 * trained * others,
        ..Default::default()
    }
}

/// Stands in for a device of unknown speed where only ratios count.
pub fn typical_gpu() -> &'static GpuModel {
    GpuModel::find("h100-80gb").expect("it is in the list")
}

#[cfg(test)]
mod tests {
    use cllm_core::model::ModelShape;

    use super::*;
    use crate::data::dataset::Block;

    #[test]
    fn pairs_of_causal_attention_are_counted_within_the_window() {
        let counted = |before: usize, length: usize, window: usize| {
            (before..before + length).map(|position| (position + 1).min(window)).sum::<usize>() as f64
        };
        for (before, length, window) in [(0, 10, 100), (0, 10, 4), (7, 5, 9), (7, 5, 3), (3, 1, 4), (0, 1, 1)] {
            let pairs = causal_pairs(before as f64, length as f64, window as f64);
            assert_eq!(pairs, counted(before, length, window), "{before} {length} {window}");
        }
        assert_eq!(causal_pairs(2.0, 3.0, f64::INFINITY), 12.0);
    }

    #[test]
    fn the_anchor_and_the_local_loss_take_time() {
        let config = ModelConfig::from_json(&ModelShape::Qwen3_8B.json()).unwrap();
        let block = |start: usize| Block { start, states: vec![vec![3; 16], vec![2; 16]], augmented: Vec::new() };
        let example = Example {
            blocks: (0..20).map(|index| block(16 * index)).collect(),
            ..Example::labelled("a".to_owned(), vec![1; 320], vec![2; 320])
        };
        let seconds = |change: &dyn Fn(&mut Settings)| {
            let mut settings = Settings { accumulation: 1, ..Settings::plain() };
            change(&mut settings);
            let work = StepWork::new(&settings, &config, &vec![example.clone(); 8], &[(0..8).collect()], 1);
            work.seconds(typical_gpu())
        };
        let plain = seconds(&|_| ());
        // One forward of two thirds of the tokens beside three passes over all of them.
        let anchored = seconds(&|settings| settings.consistency.anchor_weight = 0.5) / plain;
        assert!((1.15..1.3).contains(&anchored), "{anchored}");
        let with_prompts = |fraction| {
            seconds(&|settings| {
                settings.consistency.anchor_weight = 0.5;
                settings.consistency.anchor_prompt_fraction = fraction;
            })
        };
        assert!(with_prompts(1.0) > 1.01 * with_prompts(0.0));
        // A third more tokens, and twice as many noisy rows beside those of the next states.
        let local = seconds(&|settings| settings.consistency.local_weight = 0.5) / plain;
        assert!((1.25..1.5).contains(&local), "{local}");
    }
}
