//! The memory of a forward and its backward at the moments when it can be largest:
//! - in the forward of the last layer, before its tensors of tokens without gradients are dropped;
//! - while the losses of a chunk become gradients, when the forward has saved everything;
//! - in the backward of the last layer that is not checkpointed;
//! - when the last checkpointed layer is computed once more, and in its backward;
//! - in the backward of the embedding, whose gradient is a tensor of its own.

use cllm_core::model::{BaseDtype, LoraTarget, ModelConfig};
use cllm_core::train;

use super::{LayerWidths, base_dtype, trained_products};
use crate::data::dataset::Example;
use crate::settings::{Divergence, Settings};

/// Workspaces of cuBLAS on a GPU.
const WORKSPACE_BYTES: f64 = 33_554_432.0;
/// Of the block masks, for each token: most tiles of queries attend to a part of two tiles of keys,
/// and 64 bits for each of their tokens say which, once by queries and once by keys.
const MASK_BYTES: f64 = 2.0 * 2.0 * 8.0;

/// The sizes of a batch that determine its activations.
#[derive(Debug, Clone, Copy)]
pub struct BatchSize {
    num_tokens: f64,
    /// Those that have gradients: all, or the drafts that adapters act on alone.
    num_trained: f64,
    /// Elements of the biases of libtorch's attention.
    num_bias_elements: f64,
    /// Rows of logits in memory at a time, of the autoregressive and consistency losses.
    num_logit_rows: f64,
    /// Those of noisy tokens among them.
    num_noisy_rows: f64,
}

impl BatchSize {
    /// That of a batch, indices of examples, with at most `max_rows` rows of logits at a time.
    pub fn new(
        config: &ModelConfig,
        settings: &Settings,
        batch: &[usize],
        examples: &[Example],
        max_rows: f64,
    ) -> Self {
        let consistency = &settings.consistency;
        let sum =
            |size: &dyn Fn(&Example) -> usize| batch.iter().map(|&index| size(&examples[index])).sum::<usize>() as f64;
        let num_noisy = sum(&|example| example.max_noisy_tokens(consistency));
        let of_prompts = if settings.is_anchored() { consistency.anchor_prompt_fraction } else { 0.0 };
        let num_rows = num_noisy
            + sum(&|example| example.response_ids.len())
            + of_prompts * sum(&|example| example.prompt_ids.len());
        let num_logit_rows = num_rows.min(max_rows);
        let num_tokens = sum(&|example| example.max_packed_tokens(consistency));
        let num_clean = sum(&|example| example.num_clean_tokens());
        BatchSize {
            num_tokens,
            num_trained: if settings.adapts_drafts() { num_tokens - num_clean } else { num_tokens },
            num_bias_elements: sum(&|example| {
                train::max_bias_elements(config, example.num_clean_tokens(), example.max_packed_tokens(consistency))
            }),
            num_logit_rows,
            num_noisy_rows: num_logit_rows * num_noisy / num_rows.max(1.0),
        }
    }
}

/// What one layer has, in bytes.
struct LayerBytes {
    /// Saved for the backward.
    saved: f64,
    /// Saved if it is checkpointed: its input, which is one of the saved tensors.
    input: f64,
    /// All that its forward may save, before the tensors of tokens without gradients are dropped.
    computed: f64,
    /// The copies for the tokens with gradients, if not all have some.
    selected: f64,
    /// What the forward has beside that when it is largest.
    output: f64,
    /// The temporary tensors of its backward when they are largest.
    backward: f64,
}

/// Bytes of the copies of a layer's quantized weights.
#[derive(Default)]
struct WeightCopies {
    /// Kept from the forward to the backward.
    kept: f64,
    /// In memory while the layer computes.
    temporary: f64,
}

/// The largest of the moments.
fn largest_moment(settings: &Settings, num_layers: f64, layer: &LayerBytes, copies: &WeightCopies, ends: &Ends) -> f64 {
    // Layers before the first one with adapters save nothing.
    let num_unadapted = settings.lora.as_ref().map_or(0.0, |lora| lora.first_layer as f64);
    let num_checkpointed = (num_layers.min(settings.checkpointed_layers as f64) - num_unadapted).max(0.0);
    let num_layers = num_layers - num_unadapted;
    let forward = (num_layers - num_checkpointed) * layer.saved + num_checkpointed * layer.input;
    let kept = (num_layers - num_checkpointed) * copies.kept;
    let last_layer = match num_checkpointed < num_layers {
        true => layer.computed + layer.selected - layer.saved,
        false => layer.computed - layer.input,
    };
    let in_forward = forward + last_layer + layer.output + kept + copies.temporary;
    let in_losses = forward + kept + ends.losses;
    let in_last_layer = forward + layer.backward + kept + copies.temporary;
    // Of the checkpointed layer itself, the input is one of the saved tensors.
    let recomputed = (layer.computed + layer.selected).max(layer.saved + layer.backward);
    let recomputed = (num_checkpointed - 1.0) * layer.input + recomputed + copies.kept + copies.temporary;
    let in_recomputed = if num_checkpointed > 0.0 { recomputed } else { 0.0 };
    let after_forward = [in_losses, in_last_layer, in_recomputed, ends.embedding].into_iter().fold(0.0, f64::max);
    ends.tables + in_forward.max(ends.around + after_forward)
}

/// What is there beside the layers, in bytes.
struct Ends {
    /// At all moments.
    tables: f64,
    /// At all moments after the forward.
    around: f64,
    losses: f64,
    embedding: f64,
}

/// Our CUDA kernels, in bfloat16. For each token a layer saves the inputs and outputs of two norms,
/// queries, keys and values (queries and keys twice if they have norms), the attention output with a
/// float32 logsumexp per head, gate and up; and with adapters the products of its inputs with every
/// A, also if it is checkpointed. Its largest temporary tensor is the gradient of their
/// product, or later, when what the feed-forward layer had is freed, the gradients of the
/// attention's output and of queries, keys and values. Attention pads heads to a multiple of 8 numbers,
/// in copies of what it reads and writes.
///
/// If drafts alone have gradients, everything else is of them, but the attention and its gradients,
/// and the input of a checkpointed layer, are of all tokens. A layer computes all tokens first and
/// then copies the rows of the drafts.
///
/// After the forward there are always three of the last layer's output, the hidden states, their
/// gradient and that of the residual stream; and at all moments the tables of the batch: ids, block
/// masks, cosines and sines.
pub fn cuda_activations(config: &ModelConfig, settings: &Settings, batch: BatchSize) -> f64 {
    let BatchSize { num_tokens: all, num_trained: trained, .. } = batch;
    let LayerWidths { hidden, queries, qkv, heads, ffn, normed } = LayerWidths::new(config);
    let vocab = config.vocab_size as f64;
    let in_attention = all * (2.0 * (qkv + queries) + 4.0 * heads);
    let of_tokens = 8.0 * hidden + 2.0 * normed + 4.0 * ffn;
    let low_ranks = trained * 2.0 * trained_products(config, settings).iter().map(|one| one.rank).sum::<f64>();
    let layer = LayerBytes {
        saved: in_attention + trained * of_tokens + low_ranks,
        input: all * 2.0 * hidden + low_ranks,
        computed: in_attention + all * of_tokens + low_ranks,
        selected: if trained < all { trained * of_tokens } else { 0.0 },
        // The product of gate and up, and the output.
        output: all * 2.0 * (ffn + hidden),
        backward: (trained * 2.0 * ffn).max(cuda_attention_backward(config, batch)),
    };
    // One weight at a time is dequantized.
    let copies = match base_dtype(settings) {
        BaseDtype::Model => WeightCopies::default(),
        BaseDtype::Int8 => WeightCopies { kept: 0.0, temporary: 2.0 * hidden * (2.0 * ffn).max(qkv) },
    };
    let num_logits = if settings.is_anchored() || settings.consistency.local_weight > 0.0 { 2.0 } else { 1.0 };
    let ends = Ends {
        tables: all * (8.0 + MASK_BYTES + 4.0 * config.head_dim as f64),
        around: all * 4.0 * hidden + trained * 2.0 * hidden,
        losses: batch.num_logit_rows * (num_logits * 2.0 * vocab + 4.0 * hidden),
        embedding: if settings.lora.is_some() { 0.0 } else { 2.0 * vocab * hidden },
    };
    WORKSPACE_BYTES + largest_moment(settings, config.num_layers as f64, &layer, &copies, &ends)
}

/// The temporary tensors of the backward of our attention, without what is freed by then.
fn cuda_attention_backward(config: &ModelConfig, batch: BatchSize) -> f64 {
    let BatchSize { num_tokens: all, num_trained: trained, .. } = batch;
    let LayerWidths { hidden, queries, qkv, heads, ffn, .. } = LayerWidths::new(config);
    let padded = match config.head_dim % 8 {
        0 => 0.0,
        rest => 2.0 * (2.0 * queries + 2.0 * qkv) * (1.0 + (8 - rest) as f64 / config.head_dim as f64),
    };
    let in_kernels = all * (4.0 * heads + padded);
    let of_all = all * 2.0 * (queries + qkv);
    let freed = trained * (4.0 * ffn + 4.0 * hidden);
    match trained < all {
        false => of_all + in_kernels - freed,
        // The gradients of the drafts are copied among those of all tokens, and back.
        true => of_all + trained * 2.0 * queries + in_kernels.max(trained * 2.0 * qkv) - freed,
    }
}

/// libtorch's operations, with b bytes per element. For each token a layer saves
/// - for each of two norms, the input in float32 and the normalized input (unless weights are frozen):
///   4 + b over the hidden size;
/// - queries, keys and values (expanded to all query heads) and the attention output per sequence: 4b
///   over all heads, and a float32 logsumexp per head;
/// - with norms of queries and keys, their input in float32, which is a part of the product for values
///   too, and the normalized input (unless weights are frozen);
/// - gate, its activation and up: 3b over the feed-forward width;
/// - for each product that is trained, its input and the low-rank output of its adapters. Of adapters
///   that act on drafts alone, these are copies of the drafts' rows, and there are those of the
///   product's output too.
///
/// Its backward has the gradients of gate and up and of their product when that is freed.
///
/// At all moments there are the tensors of the last norm, the hidden states, their gradient, the
/// cosines and sines, and the biases of the attention of noisy tokens and of sliding windows.
pub fn eager_activations(config: &ModelConfig, element: f64, settings: &Settings, batch: BatchSize) -> f64 {
    let BatchSize { num_tokens: all, num_trained: trained, .. } = batch;
    let LayerWidths { hidden, queries, qkv, heads, ffn, normed } = LayerWidths::new(config);
    let is_frozen = settings.lora.is_some();
    let normalized = if is_frozen { 0.0 } else { element };
    let norm = (4.0 + normalized) * hidden;
    let qk_norm = if normed > 0.0 { 4.0 * qkv + normalized * normed } else { 0.0 };
    let outputs = if settings.adapts_drafts() { 1.0 } else { 0.0 };
    let products = trained_products(config, settings);
    let in_products: f64 = products.iter().map(|one| one.inputs + one.rank + outputs * one.outputs).sum();
    let of_tokens = element * (4.0 * queries + 3.0 * ffn) + 2.0 * norm + qk_norm + 4.0 * heads;
    let is_down_trained = settings.lora.as_ref().is_none_or(|lora| lora.targets.contains(&LoraTarget::DownProj));
    let freed = if is_down_trained { trained * ffn } else { 0.0 };
    let layer = LayerBytes {
        saved: all * of_tokens + trained * element * in_products,
        input: all * element * hidden,
        // Its forward is never the largest.
        computed: 0.0,
        selected: 0.0,
        output: 0.0,
        backward: element * (all * (3.0 * ffn + 2.0 * hidden) - freed),
    };
    // Autograd keeps the dequantized weights.
    let copies = match base_dtype(settings) {
        BaseDtype::Model => WeightCopies::default(),
        BaseDtype::Int8 => WeightCopies { kept: element * hidden * (qkv + queries + 3.0 * ffn), temporary: 0.0 },
    };
    let gradient_of_vocabulary = if is_frozen { 0.0 } else { element * config.vocab_size as f64 * hidden };
    let ends = Ends {
        tables: all * element * 2.0 * config.head_dim as f64 + element * batch.num_bias_elements,
        around: all * (norm + element * 2.0 * hidden),
        losses: eager_losses(config, settings, batch) + gradient_of_vocabulary,
        embedding: gradient_of_vocabulary,
    };
    largest_moment(settings, config.num_layers as f64, &layer, &copies, &ends)
}

/// Float32 tensors `[rows, vocab]` in memory at a time. In the forward: logits and log-probabilities;
/// for each divergence the target, an exponential, the difference and their product, for that of
/// Jensen and Shannon also the middle and its exponential, for the hybrid also the exponential of the
/// smaller of both, for the acceptance alone only that, the smaller and the target. Before them come the
/// log-probabilities of the anchor, which stay until its own divergence. In the backward: log-probabilities, the gradient of the noisy part of them in full size,
/// that of the other part as it is and in full size, and the gradient of the logits.
fn eager_losses(config: &ModelConfig, settings: &Settings, batch: BatchSize) -> f64 {
    let BatchSize { num_logit_rows: rows, num_noisy_rows: noisy, .. } = batch;
    let divergence = match settings.consistency.divergence {
        Divergence::Nla => 3.0,
        Divergence::Forward | Divergence::Reverse => 4.0,
        Divergence::LkHybrid => 5.0,
        Divergence::Jsd => 6.0,
    };
    let anchor = if settings.is_anchored() { rows - noisy } else { 0.0 };
    let forward = 2.0 * rows + anchor + (divergence * noisy).max(noisy + 3.0 * anchor);
    let backward = 4.0 * rows - noisy + anchor;
    4.0 * config.vocab_size as f64 * forward.max(backward)
}
