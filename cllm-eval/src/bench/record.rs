//! What `bench` writes.

use std::collections::{BTreeMap, BTreeSet};

use cllm_core::bench_results::{BenchRecord, BenchResults};
use cllm_core::decode::Strategy;
use cllm_core::model::LoraTarget;
use serde::{Deserialize, Serialize};

use super::settings::{BenchSettings, every_projection};

/// The output file: one record per model.
pub type DecodeBenchResults = BenchResults<DecodeBench>;

/// Measurements of a model. Times are medians; a step is one forward with everything around it,
/// including the host's work.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DecodeBench {
    pub name: String,
    /// Number of weights.
    pub parameters: i64,
    /// Autoregressive decoding at batch 1, excluding prefill.
    pub ar_tokens_per_second: f64,
    /// The same with `transformers`, from the baseline file.
    pub transformers_ar_tokens_per_second: Option<f64>,
    /// The same with `transformers`, a static cache and torch.compile, from the baseline file.
    #[serde(default)]
    pub transformers_compiled_ar_tokens_per_second: Option<f64>,
    /// Milliseconds of a step at batch 1, by its number of tokens.
    pub step_ms: BTreeMap<usize, f64>,
    /// `step_ms` divided by that of a step of one token.
    pub relative_step_time: BTreeMap<usize, f64>,
    /// Milliseconds of the attention of all layers in such a step, timed by itself: with the rotation
    /// of queries and keys, and a context as long as that of `step_ms` in the mean. Empty where our
    /// kernels do not decode the model.
    #[serde(default)]
    pub attention_ms: BTreeMap<usize, f64>,
    /// Milliseconds of the prefill of `num_prompt_tokens` tokens at batch 1.
    pub prefill_ms: f64,
    /// Autoregressive tokens per second of the whole batch, by batch size.
    pub batch_tokens_per_second: BTreeMap<usize, f64>,
    /// Milliseconds of a step, by batch size and by the number of tokens that each row has in it.
    #[serde(default)]
    pub batch_step_ms: BTreeMap<usize, BTreeMap<usize, f64>>,
    /// Steps with adapters for draft tokens, if the settings ask for them.
    #[serde(default)]
    pub gated: Option<GatedBench>,
    pub memory_floor: MemoryFloor,
    /// Peak GPU memory while steps were timed, excluding what was in use before the model was
    /// loaded; null on the CPU.
    pub peak_memory_bytes: Option<u64>,
    /// Measured on the prompts; the first is autoregressive. Empty without prompts.
    pub strategies: Vec<StrategyBench>,
    /// One for each of `collect_batch_sizes`.
    pub collections: Vec<CollectionBench>,
    pub settings: BenchSettings,
}

impl BenchRecord for DecodeBench {
    fn name(&self) -> &str {
        &self.name
    }
}

/// Steps of strategy `gated` at batch 1, with random adapters for draft tokens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GatedBench {
    /// Rank of the adapters.
    pub rank: i64,
    /// The projections that have one.
    #[serde(default = "every_projection")]
    pub targets: BTreeSet<LoraTarget>,
    /// The first layer with adapters.
    #[serde(default)]
    pub first_layer: usize,
    /// Milliseconds of a step, by n: it has 2 n tokens, half of them drafts.
    pub gated_step_ms: BTreeMap<usize, f64>,
    /// `gated_step_ms` divided by the time of a step of one token.
    pub relative_step_time: BTreeMap<usize, f64>,
    /// Peak GPU memory of model, adapters and cache while these steps were timed, divided by that while
    /// steps of one token were; null on the CPU.
    pub memory_over_ar: Option<f64>,
}

/// The shortest time in which the memory can deliver what a step of one token reads.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct MemoryFloor {
    /// Weights, keys and values that the step reads.
    pub bytes: u64,
    /// Bandwidth of a large copy on the device, counting bytes read and bytes written; measured in
    /// the same run.
    pub bandwidth_bytes_per_second: f64,
    /// `bytes` at that bandwidth, in milliseconds.
    pub ms: f64,
    /// `ms` divided by the measured time of the step.
    pub fraction_of_step: f64,
}

/// A strategy on the prompts at batch 1.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StrategyBench {
    pub strategy: Strategy,
    /// Number of answers.
    pub examples: usize,
    /// Answers that reached the length limit.
    pub unfinished: usize,
    pub tokens_per_forward: f64,
    /// Tokens of a forward, draft tokens included; null in results of earlier versions.
    pub mean_window_tokens: Option<f64>,
    /// Excluding prefill.
    pub tokens_per_second: f64,
    /// Tokens per second, divided by those of autoregressive decoding.
    pub speedup_vs_ar: f64,
    /// Fraction of the answers that equal the autoregressive ones, token for token.
    pub exact_match_vs_ar: f64,
    /// Peak GPU memory, excluding what was in use before the model was loaded; null on the CPU.
    pub peak_memory_bytes: Option<u64>,
}

/// A collection: trajectories are recorded but not written.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct CollectionBench {
    /// Number of responses decoded at once.
    pub batch_size: usize,
    /// Tokens per block.
    pub n: usize,
    /// Number of responses.
    pub responses: usize,
    pub tokens_per_forward: f64,
    /// Tokens of a forward, draft tokens included; null in results of earlier versions.
    pub mean_window_tokens: Option<f64>,
    /// Response tokens per second, including prefill.
    pub tokens_per_second: f64,
    /// The time in which the memory can deliver the weights to every step, and the keys and values to
    /// every sequence, divided by the time that was measured; null in results of earlier versions.
    pub fraction_of_bandwidth: Option<f64>,
    /// The time in which the device can compute the matrix products of prompts and windows, divided by
    /// the time that was measured; null for devices whose peak is not known, too.
    pub fraction_of_peak_flops: Option<f64>,
}
