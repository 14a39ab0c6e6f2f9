//! The memory of what happens between training steps: validation and checkpoints.

use cllm_core::decode::MAX_LOGITS;
use cllm_core::model::ModelConfig;
use tch::Kind;

use super::{LayerWidths, Workload, masters_are_copies, trained_kind};

/// A forward that caches prompts has at most this many tokens.
const MAX_PROMPT_TOKENS: usize = 4096;

/// What validation adds. The losses on trajectories need less than a training step on a batch of
/// the same size; the prompts need a copy of the weights with adapters merged and their KV cache.
pub(super) fn validation_bytes(workload: &Workload<'_>) -> f64 {
    let validates = workload.probe.is_some() || workload.settings.validation.trajectories.is_some();
    let average = if validates { own_weights(workload) } else { 0.0 };
    let Some(probe) = workload.probe else { return average };
    let Workload { config, kind, settings, .. } = *workload;
    let element = kind.elt_size_in_bytes() as f64;
    let cached = (probe.num_prompts * probe.slots) as f64;
    let cache = 2.0 * element * cached * (config.num_layers * config.num_kv_heads * config.head_dim) as f64;
    let num_window_tokens = probe.num_prompts * settings.validation.n;
    let num_prompt_tokens = probe.num_prompt_tokens.min(MAX_PROMPT_TOKENS);
    let forward = forward_bytes(config, element, num_window_tokens.max(num_prompt_tokens) as f64)
        .max(forward_bytes(config, element, num_window_tokens as f64) + logits_bytes(config, kind, num_window_tokens));
    average + merged_weights(workload) + merging_bytes(workload).max(cache + forward)
}

/// What writing a checkpoint adds: the weights while the model has their average, and one weight at
/// a time with its adapter merged.
pub(super) fn saving_bytes(workload: &Workload<'_>) -> f64 {
    own_weights(workload) + merging_bytes(workload)
}

/// A copy of this process's weights while the model has their average, unless the master weights
/// are such a copy.
fn own_weights(workload: &Workload<'_>) -> f64 {
    let Workload { config, kind, settings, world_size, .. } = *workload;
    let shard = settings.trained_parameters(config) as f64 / world_size as f64;
    let has_copy = masters_are_copies(settings, kind);
    let element = trained_kind(settings, kind).elt_size_in_bytes() as f64;
    if settings.optimizer.ema_decay.is_none() || has_copy { 0.0 } else { element * shard }
}

/// The float32 temporary tensors of the largest projection while its adapter is merged: the change,
/// the scaled change, the weight and their sum.
fn merging_bytes(workload: &Workload<'_>) -> f64 {
    let LayerWidths { hidden, queries, ffn, .. } = LayerWidths::new(workload.config);
    if workload.settings.lora.is_some() { 4.0 * 4.0 * hidden * queries.max(ffn) } else { 0.0 }
}

/// A copy of all weights with adapters merged.
fn merged_weights(workload: &Workload<'_>) -> f64 {
    let Workload { config, kind, settings, .. } = *workload;
    if settings.lora.is_some() { kind.elt_size_in_bytes() as f64 * config.num_parameters() as f64 } else { 0.0 }
}

/// The temporary tensors of a layer when the most are in memory: the residual stream, the output of
/// the attention, the normalized input, gate, up and their product.
fn forward_bytes(config: &ModelConfig, element: f64, num_tokens: f64) -> f64 {
    let LayerWidths { hidden, queries, ffn, .. } = LayerWidths::new(config);
    element * num_tokens * (2.0 * hidden + queries + 3.0 * ffn)
}

/// Logits in float32. The kernels, which compute in bfloat16, hold those of a slice of the vocabulary.
fn logits_bytes(config: &ModelConfig, kind: Kind, num_tokens: usize) -> f64 {
    let num_logits = num_tokens as f64 * config.vocab_size as f64;
    4.0 * if kind == Kind::BFloat16 { num_logits.min(MAX_LOGITS as f64) } else { num_logits }
}
