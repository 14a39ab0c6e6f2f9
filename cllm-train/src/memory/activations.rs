//! The memory of a forward and its backward at the three moments when it can be largest:
//! - while the losses of a chunk become gradients, when the forward has saved everything;
//! - in the backward of the last layer that is not checkpointed;
//! - in the backward of the last checkpointed layer, which was recomputed by then;
//! - in the backward of the embedding, whose gradient is a tensor of its own.

use cllm_core::model::{BaseDtype, ModelConfig};
use cllm_core::train;

use super::{LayerWidths, base_dtype};
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
        BatchSize {
            num_tokens: sum(&|example| example.max_packed_tokens(consistency)),
            num_bias_elements: sum(&|example| {
                train::max_bias_elements(config, example.num_clean_tokens(), example.max_packed_tokens(consistency))
            }),
            num_logit_rows,
            num_noisy_rows: num_logit_rows * num_noisy / num_rows.max(1.0),
        }
    }
}

/// What one layer has for each token, in bytes.
struct LayerBytes {
    /// Saved for the backward.
    saved: f64,
    /// Saved if it is checkpointed: its input, which is one of the saved tensors.
    input: f64,
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

/// The largest of the moments. `around` are bytes for each token that are there at all of them,
/// `losses` and `embedding` those of the two ends.
fn largest_moment(
    settings: &Settings,
    num_layers: f64,
    num_tokens: f64,
    layer: &LayerBytes,
    copies: &WeightCopies,
    ends: &Ends,
) -> f64 {
    // Layers before the first one with adapters save nothing.
    let num_unadapted = settings.lora.as_ref().map_or(0.0, |lora| lora.first_layer as f64);
    let num_checkpointed = (num_layers.min(settings.checkpointed_layers as f64) - num_unadapted).max(0.0);
    let num_layers = num_layers - num_unadapted;
    let forward = (num_layers - num_checkpointed) * layer.saved + num_checkpointed * layer.input;
    let kept = (num_layers - num_checkpointed) * copies.kept;
    let in_losses = num_tokens * forward + kept + ends.losses;
    let in_last_layer = num_tokens * (forward + layer.backward) + kept + copies.temporary;
    // Of the checkpointed layer itself, the input is one of the saved tensors.
    let recomputed = (num_checkpointed - 1.0) * layer.input + layer.saved + layer.backward;
    let recomputed = num_tokens * recomputed + copies.kept + copies.temporary;
    let in_recomputed = if num_checkpointed > 0.0 { recomputed } else { 0.0 };
    let moments = [in_losses, in_last_layer, in_recomputed, ends.embedding];
    num_tokens * ends.around + moments.into_iter().fold(0.0, f64::max)
}

/// What comes before and after the layers of a backward, in bytes.
struct Ends {
    /// For each token, at every moment.
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
/// At all moments there are three of the last layer's output, the hidden states, their gradient and
/// that of the residual stream, and the tables of the batch: ids, block masks, cosines and sines.
pub fn cuda_activations(config: &ModelConfig, settings: &Settings, batch: BatchSize) -> f64 {
    let LayerWidths { hidden, queries, qkv, heads, ffn, normed } = LayerWidths::new(config);
    let vocab = config.vocab_size as f64;
    let padded = match config.head_dim % 8 {
        0 => 0.0,
        rest => 2.0 * (2.0 * queries + 2.0 * qkv) * (1.0 + (8 - rest) as f64 / config.head_dim as f64),
    };
    let in_attention = 2.0 * (queries + qkv) + 4.0 * heads + padded - (4.0 * ffn + 4.0 * hidden);
    let low_ranks = 2.0 * low_rank_width(settings);
    let layer = LayerBytes {
        saved: 8.0 * hidden + 2.0 * (qkv + queries + normed) + 4.0 * heads + 4.0 * ffn + low_ranks,
        input: 2.0 * hidden + low_ranks,
        backward: (2.0 * ffn).max(in_attention),
    };
    // One weight at a time is dequantized.
    let copies = match base_dtype(settings) {
        BaseDtype::Model => WeightCopies::default(),
        BaseDtype::Int8 => WeightCopies { kept: 0.0, temporary: 2.0 * hidden * (2.0 * ffn).max(qkv) },
    };
    let num_logits = if settings.is_anchored() || settings.consistency.local_weight > 0.0 { 2.0 } else { 1.0 };
    let ends = Ends {
        around: 6.0 * hidden + 8.0 + MASK_BYTES + 4.0 * config.head_dim as f64,
        losses: batch.num_logit_rows * (num_logits * 2.0 * vocab + 4.0 * hidden),
        embedding: if settings.lora.is_some() { 0.0 } else { 2.0 * vocab * hidden },
    };
    WORKSPACE_BYTES + largest_moment(settings, config.num_layers as f64, batch.num_tokens, &layer, &copies, &ends)
}

/// Rank of all adapters of a layer together.
fn low_rank_width(settings: &Settings) -> f64 {
    settings.lora.as_ref().map_or(0.0, |lora| lora.rank as f64 * lora.targets.len() as f64)
}

/// libtorch's operations, with b bytes per element. For each token a layer saves
/// - for each of two norms, the input in float32, the normalized input (unless weights are frozen) and
///   the output: 4 + 2b over the hidden size;
/// - queries, keys and values (expanded to all query heads) and the attention output, per sequence
///   and joined: 5b over all heads, and a float32 logsumexp per head;
/// - with norms of queries and keys, their input in float32 and the normalized input;
/// - gate, its activation, up and their product: 4b over the feed-forward width;
/// - the low-rank output of each adapter: b over the rank.
///
/// Its backward has the gradients of gate and up, apart and joined, when the product and the
/// activation are freed.
///
/// At all moments there are the tensors of the last norm, the hidden states, their gradient, the
/// cosines and sines, and the biases of the attention of noisy tokens and of sliding windows.
pub fn eager_activations(config: &ModelConfig, element: f64, settings: &Settings, batch: BatchSize) -> f64 {
    let LayerWidths { hidden, queries, qkv, heads, ffn, normed } = LayerWidths::new(config);
    let is_frozen = settings.lora.is_some();
    let norm = (4.0 + element + if is_frozen { 0.0 } else { element }) * hidden;
    let adapters = low_rank_width(settings);
    let layer = LayerBytes {
        saved: element * (adapters + 5.0 * queries + 4.0 * ffn) + 2.0 * norm + (4.0 + element) * normed + 4.0 * heads,
        input: element * hidden,
        backward: element * (2.0 * ffn + 2.0 * hidden),
    };
    // Autograd keeps the dequantized weights.
    let copies = match base_dtype(settings) {
        BaseDtype::Model => WeightCopies::default(),
        BaseDtype::Int8 => WeightCopies { kept: element * hidden * (qkv + queries + 3.0 * ffn), temporary: 0.0 },
    };
    let gradient_of_vocabulary = if is_frozen { 0.0 } else { element * config.vocab_size as f64 * hidden };
    let ends = Ends {
        around: norm + element * (hidden + 2.0 * config.head_dim as f64),
        losses: eager_losses(config, settings, batch) + gradient_of_vocabulary,
        embedding: gradient_of_vocabulary,
    };
    element * batch.num_bias_elements
        + largest_moment(settings, config.num_layers as f64, batch.num_tokens, &layer, &copies, &ends)
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
