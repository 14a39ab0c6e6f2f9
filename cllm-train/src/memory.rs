//! What a step takes of memory, estimated from shapes: the tensors alone, without what an allocator keeps beside them.

use cllm_core::model::{Family, ModelConfig};
use serde::Serialize;
use tch::Kind;

use crate::examples::Example;
use crate::settings::{Consistency, Divergence, Objective, Settings};

/// Bytes, at the largest batch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Memory {
    /// The model; with an anchor, also the one that the run starts from.
    pub weights: u64,
    /// One for each weight, in its type.
    pub gradients: u64,
    /// Both moments; in bf16 also the float32 masters; the moving average where there is one.
    pub optimizer: u64,
    /// What the forward keeps for the backward, and the largest temporaries beside it.
    pub activations: u64,
    /// All of it together, at the moment that takes most.
    pub peak: u64,
}

/// Sizes of a batch: padding included in the first two.
#[derive(Debug, Clone, Copy)]
struct Shape {
    tokens: f64,
    width: f64,
    /// Rows of logits of the autoregressive loss, and of each divergence.
    clean: f64,
    noisy: f64,
}

impl Memory {
    /// The estimate for the batch that takes most of those given.
    pub fn of(
        config: &ModelConfig,
        kind: Kind,
        settings: &Settings,
        examples: &[Example],
        batches: &[Vec<usize>],
    ) -> Self {
        let parameters = config.parameter_count() as f64;
        let bytes = kind.elt_size_in_bytes() as f64;
        let masters = if kind == Kind::Float { 0.0 } else { 4.0 };
        let activations = batches
            .iter()
            .map(|batch| Shape::of(batch, examples, &settings.consistency))
            .map(|shape| layers(config, bytes, shape) + losses(config, bytes, settings, shape))
            .fold(0.0, f64::max);
        // The update makes float32 copies of bf16 gradients, when the activations are gone.
        let update = masters * parameters;
        let models = if settings.anchored() { 2.0 } else { 1.0 };
        let (weights, gradients) = (models * bytes * parameters, bytes * parameters);
        let average = if settings.optimizer.ema > 0.0 { 4.0 } else { 0.0 };
        let optimizer = (masters + 8.0 + average) * parameters;
        Memory {
            weights: weights as u64,
            gradients: gradients as u64,
            optimizer: optimizer as u64,
            activations: activations as u64,
            peak: (weights + gradients + optimizer + activations.max(update)) as u64,
        }
    }
}

impl Shape {
    fn of(batch: &[usize], examples: &[Example], consistency: &Consistency) -> Self {
        let rows = || batch.iter().map(|&index| &examples[index]);
        let width = rows().map(|example| example.packed_len(consistency)).max().unwrap_or(0);
        Shape {
            tokens: (batch.len() * width) as f64,
            width: width as f64,
            clean: rows().map(|example| example.response.len()).sum::<usize>() as f64,
            noisy: rows().map(|example| example.noisy_len(consistency)).sum::<usize>() as f64,
        }
    }
}

/// What every layer keeps. With b bytes an element, a token of a layer has
/// - two norms over the hidden size: their input in float32, the normed input and the output: 4 + 2b each;
/// - queries, keys and values (laid out for every query head) and the mixed values: 4b over all heads, and a float32
///   log-sum a head;
/// - with norms of queries and keys: their float32 input and the normed one;
/// - gate, its activation, up and their product: 4b over the feed-forward width;
/// - its row of the attention mask, as numbers: b times the width of the batch.
///
/// The last norm is one more.
fn layers(config: &ModelConfig, bytes: f64, shape: Shape) -> f64 {
    let size = |size: i64| size as f64;
    let norm = (4.0 + 2.0 * bytes) * size(config.hidden_size);
    let queries = size(config.num_heads * config.head_dim);
    let head_norms = match config.family {
        Family::Qwen3 => (4.0 + bytes) * (queries + size(config.num_kv_heads * config.head_dim)),
        Family::Llama | Family::Mistral | Family::Qwen2 => 0.0,
    };
    let attention = 4.0 * bytes * queries + 4.0 * size(config.num_heads) + head_norms + bytes * shape.width;
    let layer = 2.0 * norm + attention + 4.0 * bytes * size(config.intermediate_size);
    shape.tokens * (size(config.num_layers) * layer + norm)
}

/// What the losses take, in rows of float32 over the vocabulary. The autoregressive loss keeps its log-probabilities and
/// holds the logits; its backward holds three such. A divergence keeps some rows and has some more while it is computed:
/// forward keeps the student's log-probabilities and the target's probabilities; reverse also a difference; both halves of
/// Jensen-Shannon about as much as two. The anchor is a forward divergence over the response tokens.
fn losses(config: &ModelConfig, bytes: f64, settings: &Settings, shape: Shape) -> f64 {
    let consistency = &settings.consistency;
    let weights = [consistency.weight, consistency.local_weight];
    let divergences = match settings.objective {
        Objective::Sft => 0.0,
        Objective::Consistency => weights.iter().filter(|&&weight| weight > 0.0).count() as f64,
    };
    let (kept, most) = match consistency.divergence {
        Divergence::Forward => (2.0, 5.0),
        Divergence::Reverse => (3.0, 6.0),
        Divergence::Jsd => (7.0, 10.0),
    };
    let anchor = if settings.anchored() { 1.0 } else { 0.0 };
    let before_anchor = if divergences > 0.0 { kept * (divergences - 1.0) + most } else { 0.0 };
    let in_divergence = shape.clean + shape.noisy * before_anchor;
    let in_anchor = 6.0 * anchor * shape.clean + shape.noisy * kept * divergences;
    let in_backward = (3.0 + 2.0 * anchor) * shape.clean + shape.noisy * kept * divergences;
    let hidden = bytes * config.hidden_size as f64 * (shape.clean + shape.noisy * divergences);
    in_divergence.max(in_anchor).max(in_backward) * 4.0 * config.vocab_size as f64 + hidden
}
