//! The memory of what happens between training steps: validation and checkpoints.

use cllm_core::decode::{MAX_LOGITS, MAX_PIECE_TOKENS, MAX_PROMPT_TOKENS, has_kernels};
use cllm_core::model::{BaseDtype, ModelConfig};
use tch::Kind;

use super::{LayerWidths, Workload, base_dtype, masters_are_copies, trained_kind, trained_products};
use crate::settings::Settings;
use crate::validation::ProbeSize;

/// What validation adds. The losses on trajectories need less than a training step on a batch of
/// the same size; the prompts need their KV cache, and the adapters in another form: a copy of the
/// weights with them merged, or one of those that act on drafts alone.
pub(super) fn validation_bytes(workload: &Workload<'_>) -> f64 {
    let validates = workload.probe.is_some() || workload.settings.validation.trajectories.is_some();
    let average = if validates { own_weights(workload) } else { 0.0 };
    let Some(probe) = workload.probe else { return average };
    let Workload { config, kind, settings, .. } = *workload;
    let element = kind.elt_size_in_bytes() as f64;
    let cached = (probe.num_prompts * probe.slots) as f64;
    let cache = 2.0 * element * cached * (config.num_layers * config.num_kv_heads * config.head_dim) as f64;
    let decoding = match decodes_with_kernels(workload) {
        true => draft_adapter_copies(config, settings) + kernel_forward_bytes(config, settings, probe),
        false => eager_forward_bytes(workload, probe),
    };
    average + merged_weights(workload) + merging_bytes(workload).max(cache + decoding)
}

/// Whether our kernels decode the model. Below adapters for drafts it stays in int8, which they do
/// not know.
fn decodes_with_kernels(workload: &Workload<'_>) -> bool {
    has_kernels(workload.config, workload.kind) && !decodes_int8(workload.settings)
}

fn decodes_int8(settings: &Settings) -> bool {
    settings.adapts_drafts() && base_dtype(settings) == BaseDtype::Int8
}

/// The largest forward of our kernels, in bfloat16.
fn kernel_forward_bytes(config: &ModelConfig, settings: &Settings, probe: ProbeSize) -> f64 {
    let num_window_tokens = probe.num_prompts * settings.probe_strategy().max_forwarded_tokens();
    let forward_bytes = |num_tokens: usize| 2.0 * forward_width(config, true) * num_tokens as f64;
    // The logits of a slice of the vocabulary, in float32.
    let logits = 4.0 * (num_window_tokens * config.vocab_size as usize).min(MAX_LOGITS) as f64;
    let prefill = forward_bytes(probe.num_prompt_tokens.min(MAX_PROMPT_TOKENS));
    prefill.max(forward_bytes(num_window_tokens) + logits)
}

/// The largest forward of libtorch's operations, or of what comes before and after it.
fn eager_forward_bytes(workload: &Workload<'_>, probe: ProbeSize) -> f64 {
    let Workload { config, kind, settings, .. } = *workload;
    let element = kind.elt_size_in_bytes() as f64;
    let num_window_tokens = probe.num_prompts * settings.probe_strategy().max_forwarded_tokens();
    // Attention has a bias of each pair of tokens, twice and as a mask while it is made.
    let group = (config.num_heads / config.num_kv_heads) as usize;
    let (rows, width) = match probe.max_prompt_tokens {
        max_tokens @ ..=MAX_PIECE_TOKENS => (probe.num_prompts, max_tokens),
        _ => (1, MAX_PIECE_TOKENS),
    };
    let prompt = (rows * group * width * probe.max_prompt_tokens) as f64;
    let windows = (num_window_tokens * group * probe.slots) as f64;
    let weight = if decodes_int8(settings) { largest_weight(config) } else { 0.0 };
    let width_of = |width: f64, num_tokens: usize| element * (width * num_tokens as f64 + weight);
    let num_prompt_tokens = probe.num_prompt_tokens.min(rows * width);
    let prefill = width_of(forward_width(config, false), num_prompt_tokens) + element * prompt;
    let decoding = width_of(window_width(config, settings), num_window_tokens) + element * windows;
    // In the model's type, and in float32 if that is another.
    let num_logits = num_window_tokens * config.vocab_size as usize;
    let logits = num_logits as f64 * if kind == Kind::Float { 4.0 } else { element + 4.0 };
    let making = 2.0 * element + 1.0;
    // Of a tree, which a gated window is, the mask is made of int64 numbers.
    let making_tree = if settings.adapts_drafts() { 2.0 * 8.0 + 1.0 } else { 0.0 };
    let making = (making * prompt).max(making.max(making_tree) * windows);
    prefill.max(decoding).max(logits).max(making)
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

/// Whether the adapters are merged into weights. Those that act on drafts alone never are.
fn merges_adapters(settings: &Settings) -> bool {
    settings.lora.is_some() && !settings.adapts_drafts()
}

/// The float32 temporary tensors of the largest projection while its adapter is merged: the change,
/// the scaled change, the weight and their sum.
fn merging_bytes(workload: &Workload<'_>) -> f64 {
    let LayerWidths { hidden, queries, ffn, .. } = LayerWidths::new(workload.config);
    if merges_adapters(workload.settings) { 4.0 * 4.0 * hidden * queries.max(ffn) } else { 0.0 }
}

/// A copy of all weights with adapters merged.
fn merged_weights(workload: &Workload<'_>) -> f64 {
    let Workload { config, kind, settings, .. } = *workload;
    if merges_adapters(settings) { kind.elt_size_in_bytes() as f64 * config.num_parameters() as f64 } else { 0.0 }
}

/// The adapters for drafts as our kernels multiply with them, in bfloat16: those of a product as one.
fn draft_adapter_copies(config: &ModelConfig, settings: &Settings) -> f64 {
    let Some(lora) = settings.lora.as_ref().filter(|_| settings.adapts_drafts()) else { return 0.0 };
    let num_layers = (config.num_layers as usize - lora.first_layer) as f64;
    let products = trained_products(config, settings);
    2.0 * num_layers * products.iter().map(|one| one.rank * (one.inputs + one.outputs)).sum::<f64>()
}

/// Elements of the largest weight of a layer, which is dequantized for a product.
fn largest_weight(config: &ModelConfig) -> f64 {
    let LayerWidths { hidden, qkv, ffn, .. } = LayerWidths::new(config);
    hidden * qkv.max(2.0 * ffn)
}

/// The width of the temporary tensors of a layer when the most are in memory: the residual stream, the
/// output of the attention, the normalized input, gate, up and their product; libtorch's operations
/// also have the activated gate.
fn forward_width(config: &ModelConfig, has_kernels: bool) -> f64 {
    let LayerWidths { hidden, queries, ffn, .. } = LayerWidths::new(config);
    let activated = if has_kernels { ffn } else { 2.0 * ffn };
    2.0 * hidden + queries + 2.0 * ffn + activated
}

/// The same of libtorch's operations on windows. Adapters for drafts change a copy of half of the rows
/// of a product, which then go into a copy of the whole.
fn window_width(config: &ModelConfig, settings: &Settings) -> f64 {
    let adapted = trained_products(config, settings).into_iter().filter(|_| settings.adapts_drafts());
    let largest_product = adapted.map(|one| one.outputs).fold(0.0, f64::max);
    forward_width(config, false).max(3.0 * config.hidden_size as f64 + 2.5 * largest_product)
}

#[cfg(test)]
mod tests {
    use cllm_core::cuda::libtorch::with_peak_cpu_memory;
    use cllm_core::decode::{DecodeOptions, Request, StopConditions, decode, required_slots};
    use cllm_core::model::{AdaptedTokens, LoraConfig, ParamBuffer};
    use serde_json::{Value, json};
    use tch::Device;

    use super::*;
    use crate::models::Models;

    /// The estimate over the bytes that libtorch allocated for a decoding of prompts with adapters
    /// merged, or for drafts.
    fn planned_over_measured(more: Value, num_prompts: usize, prompt_tokens: usize, lora: Option<LoraConfig>) -> f64 {
        tch::set_num_threads(1);
        let mut json = json!({
            "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 176,
            "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": true,
            "max_position_embeddings": 2048,
        });
        json.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let config = ModelConfig::from_json(&json).unwrap();
        let settings = Settings { lora, ..Settings::plain() };
        let n = settings.validation.n;
        let stop = StopConditions::new(2 * n, Vec::new());
        let strategy = settings.probe_strategy();
        let probe = ProbeSize {
            num_prompts,
            num_prompt_tokens: num_prompts * prompt_tokens,
            max_prompt_tokens: prompt_tokens,
            slots: required_slots(prompt_tokens, &stop, strategy),
        };
        let planned = validation_bytes(&Workload {
            config: &config,
            kind: Kind::Float,
            is_eager: true,
            settings: &settings,
            examples: &[],
            batches: &[],
            probe: Some(probe),
            world_size: 1,
        });
        let request = |index: usize| Request { sample_id: index.to_string(), prompt_ids: vec![1; prompt_tokens] };
        let requests: Vec<Request> = (0..num_prompts).map(request).collect();
        let models = Models::random(config.clone(), &settings, Device::Cpu).unwrap();
        let (_, measured) = with_peak_cpu_memory(|| {
            let merged = models.student.to_merged().unwrap();
            decode(merged.as_ref().unwrap_or(&models.student), &requests, &stop, DecodeOptions::greedy(strategy, 0))
                .unwrap()
        })
        .unwrap();
        let parameters = config.num_parameters();
        let padding =
            if merges_adapters(&settings) { 4 * (ParamBuffer::padded_len(parameters) - parameters) } else { 0 };
        (planned + padding as f64) / measured as f64
    }

    #[test]
    fn prompts_need_what_is_planned() {
        let adapters = || Some(LoraConfig { rank: 4, ..LoraConfig::default() });
        let on_drafts = || Some(LoraConfig { on: AdaptedTokens::Drafts, ..adapters().unwrap() });
        for (name, more, num_prompts, prompt_tokens, lora) in [
            ("long prompts", json!({}), 8, 300, None),
            ("many prompts", json!({}), 64, 20, None),
            ("wide vocabulary", json!({"vocab_size": 20000}), 32, 40, None),
            ("a long cache", json!({"num_hidden_layers": 16, "num_key_value_heads": 4}), 8, 1500, None),
            ("adapters", json!({"vocab_size": 20000}), 8, 40, adapters()),
            ("adapters on drafts", json!({"vocab_size": 20000}), 8, 40, on_drafts()),
            ("adapters on drafts, wide ffn", json!({"intermediate_size": 704}), 64, 20, on_drafts()),
            ("adapters on drafts, windows of trees", json!({}), 64, 100, on_drafts()),
            ("adapters on drafts, long prompts", json!({}), 8, 300, on_drafts()),
        ] {
            let ratio = planned_over_measured(more, num_prompts, prompt_tokens, lora);
            assert!((0.95..1.05).contains(&ratio), "{name}: planned {ratio:.3} of what was measured");
        }
    }

    #[test]
    fn what_the_kernels_do_not_decode_needs_what_libtorch_does() {
        let planned = |lora: Option<&LoraConfig>, head_dim: i64, vocab_size: i64| {
            let config = ModelConfig::from_json(&json!({
                "model_type": "llama", "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 192,
                "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": head_dim, "tie_word_embeddings": true,
            }));
            validation_bytes(&Workload {
                config: &config.unwrap(),
                kind: Kind::BFloat16,
                is_eager: false,
                settings: &Settings { lora: lora.cloned(), ..Settings::plain() },
                examples: &[],
                batches: &[],
                probe: Some(ProbeSize { num_prompts: 256, num_prompt_tokens: 2560, max_prompt_tokens: 10, slots: 64 }),
                world_size: 1,
            })
        };
        let of_logits = |lora, head_dim| planned(lora, head_dim, 40_000) - planned(lora, head_dim, 20_000);
        let on_drafts = LoraConfig { on: AdaptedTokens::Drafts, ..LoraConfig::default() };
        let on_int8 = LoraConfig { base_dtype: BaseDtype::Int8, ..on_drafts.clone() };
        for lora in [None, Some(&on_drafts)] {
            assert_eq!(of_logits(lora, 32), 0.0, "the kernels hold a slice");
        }
        // In bfloat16 and in float32.
        let num_window_tokens = (256 * Settings::plain().validation.n) as f64;
        assert_eq!(of_logits(None, 40), 6.0 * num_window_tokens * 20_000.0);
        assert_eq!(of_logits(Some(&on_int8), 32), 6.0 * 2.0 * num_window_tokens * 20_000.0, "each token twice");
    }
}
