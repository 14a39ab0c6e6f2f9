//! How long a step takes on a GPU that is not here: the operations of matrix products and attention
//! at the share of the peak that was measured, and the bytes that pass through its memory at a share
//! of the bandwidth; but at least the time that the host takes to launch the kernels.
//!
//! Counted per token and layer, with h the hidden width, q that of the queries, s that of queries,
//! keys and values together, f that of the feed-forward layer. A forward is 1 product with each
//! weight, a backward 2 (1 with frozen weights), and a checkpointed layer has 1 more forward. With
//! adapters that act on drafts alone, only drafts have a backward.

use cllm_core::gpus::GpuModel;
use cllm_core::model::{BaseDtype, ModelConfig};

use crate::data::dataset::Example;
use crate::memory::{LayerWidths, TrainedProduct, trained_products};
use crate::settings::{ConsistencySettings, Settings, StateDtype};

/// Share of the peak that large matrix products reach.
const PRODUCT_SHARE: f64 = 0.60;
/// Share of the peak that attention reaches.
const ATTENTION_SHARE: f64 = 0.26;
/// Share of the bandwidth that kernels reach whose time is that of reading and writing.
const BANDWIDTH_SHARE: f64 = 0.80;
/// Seconds that the host takes to launch the kernels of a layer, forward and backward: steps of
/// SmolLM2-135M with adapters in half of the layers took 36 ms with 12,288 tokens and 39 ms with
/// 24,576 (docs/results/training-speed-h200.json).
const LAUNCH_SECONDS: f64 = 1.2e-3;
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
    /// Layers of all forwards, which the host launches.
    num_launched_layers: f64,
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
        let clean = Forward {
            num_layers: config.num_layers as f64,
            num_batches: batches.len() as f64 * per_process,
            num_tokens: mean(&|example| example.num_clean_tokens() as f64),
            num_pairs: mean(&|example| clean_pairs(config, example)),
        };
        let noisy = Forward {
            num_tokens: mean(&|example| example.max_packed_tokens(consistency) as f64) - clean.num_tokens,
            num_pairs: mean(&|example| noisy_pairs(config, example, consistency)),
            ..clean
        };
        let packed = Forward {
            num_tokens: clean.num_tokens + noisy.num_tokens,
            num_pairs: clean.num_pairs + noisy.num_pairs,
            ..clean
        };
        let launches = StepWork { num_launched_layers: clean.num_layers * clean.num_batches, ..Default::default() };
        let mut work = layers_work(settings, config, &packed, &noisy)
            .plus(launches)
            .plus(update_work(settings, config, world_size))
            .plus(head_work(settings, config, mean(&|example| trained_rows(settings, example))))
            .plus(frozen_head_work(config, mean(&|example| frozen_rows(settings, example))));
        if settings.is_anchored() {
            let bytes = if settings.has_second_model() { 2.0 } else { weight_bytes(settings) };
            work = work.plus(forward_work(config, bytes, &clean));
        }
        work
    }

    fn plus(self, other: Self) -> Self {
        StepWork {
            products: self.products + other.products,
            attention: self.attention + other.attention,
            bytes: self.bytes + other.bytes,
            exchanged: self.exchanged + other.exchanged,
            num_launched_layers: self.num_launched_layers + other.num_launched_layers,
        }
    }

    /// Estimated seconds of a step: those of the GPU, which small steps of small models spend waiting
    /// for the host.
    pub fn seconds(&self, gpu: &GpuModel) -> f64 {
        self.gpu_seconds(gpu).max(LAUNCH_SECONDS * self.num_launched_layers)
    }

    fn gpu_seconds(&self, gpu: &GpuModel) -> f64 {
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

/// Pairs of noisy tokens of a packed example with those that they attend to, summed over the layers:
/// for each noisy block those with what is before it and with its own.
fn noisy_pairs(config: &ModelConfig, example: &Example, consistency: &ConsistencySettings) -> f64 {
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
    chosen * streams * config.sliding_windows.iter().map(of_layer).sum::<f64>()
}

/// Pairs of `length` tokens after `before` others with themselves and what a window shows of the
/// tokens before them.
fn causal_pairs(before: f64, length: f64, window: f64) -> f64 {
    // The leading tokens see everything before them.
    let all = (window - before).clamp(0.0, length);
    let seen = all * before + all * (all + 1.0) / 2.0;
    if all < length { seen + (length - all) * window } else { seen }
}

/// Forward and backward of all layers. Layers before the first one with adapters have no backward, and
/// neither have clean tokens if adapters act on drafts alone.
fn layers_work(settings: &Settings, config: &ModelConfig, packed: &Forward, noisy: &Forward) -> StepWork {
    let num_unadapted = settings.lora.as_ref().map_or(0, |lora| lora.first_layer);
    let share = 1.0 - num_unadapted as f64 / config.num_layers as f64;
    let last = packed.in_share_of_layers(share);
    let trained = if settings.adapts_drafts() { noisy } else { packed }.in_share_of_layers(share);
    let recomputed = last.in_share_of_layers(recomputed_share(settings, config, last.num_layers));
    let mut work = forward_work(config, weight_bytes(settings), packed)
        .plus(forward_work(config, weight_bytes(settings), &recomputed))
        .plus(backward_work(settings, config, &trained));
    if settings.lora.is_some() {
        work = work.plus(adapters_work(settings, config, &trained));
    }
    if settings.adapts_drafts() {
        work = work.plus(draft_rows_work(settings, config, &last, &trained));
    }
    work
}

/// Bytes of a weight that a product reads. Quantized weights are read as int8, and written and read as
/// their copy.
fn weight_bytes(settings: &Settings) -> f64 {
    let is_int8 = settings.lora.as_ref().is_some_and(|lora| lora.base_dtype == BaseDtype::Int8);
    if is_int8 { 5.0 } else { 2.0 }
}

/// The share of the last `num_layers` layers that are checkpointed.
fn recomputed_share(settings: &Settings, config: &ModelConfig, num_layers: f64) -> f64 {
    let num_others = config.num_layers as f64 - num_layers;
    (settings.checkpointed_layers as f64 - num_others).clamp(0.0, num_layers) / num_layers
}

fn num_weights(config: &ModelConfig) -> f64 {
    let LayerWidths { hidden: h, queries: q, qkv: s, ffn: f, .. } = LayerWidths::new(config);
    h * s + q * h + 3.0 * h * f
}

/// Bytes of a token in the products of a layer. Each reads its input and writes its output: qkv, the
/// output of the attention onto the residual stream, gate and up, and the last onto the residual
/// stream.
fn product_bytes(config: &ModelConfig) -> f64 {
    let LayerWidths { hidden: h, queries: q, qkv: s, ffn: f, .. } = LayerWidths::new(config);
    2.0 * (6.0 * h + s + q + 3.0 * f)
}

/// A forward through layers, without what adapters add.
fn forward_work(config: &ModelConfig, weight_bytes: f64, forward: &Forward) -> StepWork {
    let Forward { num_layers, num_batches, num_tokens, num_pairs } = *forward;
    let LayerWidths { hidden: h, queries: q, qkv: s, ffn: f, .. } = LayerWidths::new(config);
    // Norms, RoPE and SwiGLU.
    let token_bytes = product_bytes(config) + 8.0 * h + 4.0 * s + 6.0 * f;
    StepWork {
        products: 2.0 * num_layers * num_tokens * num_weights(config),
        // Two products.
        attention: 4.0 * num_pairs * q,
        bytes: num_layers * (num_tokens * token_bytes + num_batches * weight_bytes * num_weights(config)),
        ..Default::default()
    }
}

/// The backward of the tokens with gradients through the last layers: all, or those with adapters.
fn backward_work(settings: &Settings, config: &ModelConfig, trained: &Forward) -> StepWork {
    let Forward { num_layers, num_batches, num_tokens, num_pairs } = *trained;
    let LayerWidths { hidden: h, queries: q, qkv: s, ffn: f, .. } = LayerWidths::new(config);
    // The gradient of a frozen weight is not computed; otherwise one pass adds to it.
    let (passes, gradient_bytes) = if settings.lora.is_some() { (1.0, 0.0) } else { (2.0, 4.0) };
    let token_bytes = passes * product_bytes(config) + 16.0 * h + 4.0 * s + 12.0 * f;
    let weight_bytes = passes * weight_bytes(settings) + gradient_bytes;
    // Two of the five products of attention are for keys and values, and those of clean tokens have no
    // gradient below drafts.
    let attention = if settings.adapts_drafts() { 6.0 } else { 10.0 };
    StepWork {
        products: 2.0 * passes * num_layers * num_tokens * num_weights(config),
        attention: attention * num_pairs * q,
        bytes: num_layers * (num_tokens * token_bytes + num_batches * weight_bytes * num_weights(config)),
        ..Default::default()
    }
}

/// What adapters add to the forward and the backward of the tokens that they act on.
fn adapters_work(settings: &Settings, config: &ModelConfig, trained: &Forward) -> StepWork {
    let Forward { num_layers, num_tokens, .. } = *trained;
    let recomputed = recomputed_share(settings, config, num_layers);
    let products = trained_products(config, settings);
    let inputs: f64 = products.iter().map(|one| one.inputs).sum();
    let outputs: f64 = products.iter().map(|one| one.outputs).sum();
    // They read the inputs of the products again and write to their outputs before them; in the
    // backward they read inputs and both gradients again, and write to that of the input.
    let token_bytes = 2.0 * (4.0 * inputs + 4.0 * outputs + recomputed * 2.0 * outputs);
    StepWork {
        products: 2.0 * (3.0 + recomputed) * num_tokens * settings.trained_parameters(config) as f64,
        bytes: num_layers * num_tokens * token_bytes,
        ..Default::default()
    }
}

/// What adapters that act on drafts alone add to that: rows of the drafts are copied from among all
/// tokens, and added to them.
fn draft_rows_work(settings: &Settings, config: &ModelConfig, all: &Forward, drafts: &Forward) -> StepWork {
    let LayerWidths { hidden: h, queries: q, qkv: s, ffn: f, normed, .. } = LayerWidths::new(config);
    let recomputed = recomputed_share(settings, config, drafts.num_layers);
    let products = trained_products(config, settings);
    // Copies read and write a row. Sums read two and write one, also when they are recomputed.
    let in_products = |one: &TrainedProduct| 2.0 * one.inputs + 3.0 * (1.0 + recomputed) * one.outputs;
    let saved = 2.0 * (4.0 * h + normed + 2.0 * f);
    // The attention's output, and its gradient among those of all tokens; and the gradient of qkv.
    let in_attention = 2.0 * (2.0 * q + s);
    let row = products.iter().map(in_products).sum::<f64>() + saved + in_attention;
    // Both gradients are of all tokens.
    let bytes = 2.0 * drafts.num_layers * drafts.num_tokens * row + 2.0 * all.num_layers * all.num_tokens * (q + s);
    StepWork { bytes, ..Default::default() }
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
    use cllm_core::model::{AdaptedTokens, LoraConfig, LoraTarget, ModelShape};

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
    /// Adapters of rank 32 that act on drafts alone, with so many noisy states of each block.
    fn on_drafts(first_layer: usize, states_per_block: usize) -> Settings {
        let lora = LoraConfig { rank: 32, first_layer, on: AdaptedTokens::Drafts, ..LoraConfig::default() };
        let mut settings = Settings { accumulation: 1, lora: Some(lora), ..Settings::plain() };
        settings.consistency.ar_weight = 0.0;
        settings.consistency.states_per_block = states_per_block;
        settings
    }

    /// A step of SmolLM2-135M, and its packed tokens: examples of so many tokens of prompt and response,
    /// as many as fit into a batch.
    fn smollm2_step(settings: &Settings, (prompt, response): (usize, usize), max_tokens: usize) -> (StepWork, f64) {
        let config = ModelConfig::from_json(&ModelShape::SmolLm2_135M.json());
        let block = |start: usize| Block { start, states: vec![vec![3; 16]; 4], augmented: Vec::new() };
        let example = Example {
            blocks: (0..response / 16).map(|index| block(16 * index)).collect(),
            ..Example::labelled("a".to_owned(), vec![1; prompt], vec![2; response])
        };
        let example_tokens = example.max_packed_tokens(&settings.consistency);
        let batch: Vec<usize> = (0..max_tokens / example_tokens).collect();
        let num_tokens = (batch.len() * example_tokens) as f64;
        let work = StepWork::new(settings, &config.unwrap(), &vec![example; batch.len()], &[batch], 1);
        (work, num_tokens)
    }

    fn h200() -> &'static GpuModel {
        GpuModel::find("h200").unwrap()
    }

    /// Runs of docs/results.md, with lengths that give the share of noisy tokens that they had. The host
    /// bounds those on Spider.
    #[test]
    fn smollm2_trains_as_fast_as_it_did() {
        let mut adapters = on_drafts(15, 2);
        adapters.lora.as_mut().unwrap().targets.remove(&LoraTarget::DownProj);
        let mut of_three_states = adapters.clone();
        of_three_states.consistency.states_per_block = 3;
        let mut student = Settings { accumulation: 1, ..Settings::plain() };
        student.consistency.anchor_weight = 0.5;
        for (name, settings, lengths, max_tokens, measured) in [
            ("adapters on Spider", &of_three_states, (164, 32), 24_576, 599_637.0),
            ("adapters on Spider in small batches", &of_three_states, (164, 32), 12_288, 325_603.0),
            ("adapters on GSM8K", &adapters, (80, 96), 24_576, 602_667.0),
            ("adapters on chat", &adapters, (60, 160), 24_576, 561_253.0),
            ("adapters on code", &adapters, (60, 128), 24_576, 582_545.0),
            ("a student of all weights", &student, (80, 96), 12_288, 330_555.0),
        ] {
            let (work, num_tokens) = smollm2_step(settings, lengths, max_tokens);
            let ratio = num_tokens / work.seconds(h200()) / measured;
            assert!((ratio - 1.0).abs() < RELATIVE_ERROR, "{name}: planned {ratio:.2} of {measured} tokens/s");
        }
    }

    #[test]
    fn clean_tokens_have_no_backward_below_adapters_for_drafts() {
        let seconds_of_prompt = |on: AdaptedTokens, first_layer: usize| {
            let mut settings = on_drafts(first_layer, 1);
            settings.lora.as_mut().unwrap().on = on;
            let seconds = |prompt: usize| smollm2_step(&settings, (prompt, 160), 320 + prompt).0.gpu_seconds(h200());
            seconds(480) - seconds(160)
        };
        let of_drafts = |first_layer: usize| seconds_of_prompt(AdaptedTokens::Drafts, first_layer);
        let ratio = of_drafts(0) / seconds_of_prompt(AdaptedTokens::All, 0);
        assert!((0.25..0.45).contains(&ratio), "{ratio}");
        let ratio = of_drafts(15) / of_drafts(0);
        assert!((0.9..1.0).contains(&ratio), "{ratio}: a forward in either case");
    }
}
