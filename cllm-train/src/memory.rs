//! What a step takes of memory, estimated from shapes: the tensors alone, without what an allocator keeps beside them.

use cllm_core::model::{Family, ModelConfig};
use cllm_core::train;
use serde::Serialize;
use tch::Kind;

use crate::data::dataset::Example;
use crate::data::loader as prefetch;
use crate::optimizer;
use crate::settings::{ConsistencySettings, Divergence, Objective, Settings, StateDtype};

/// Bytes, at the largest batch.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Memory {
    /// The model and its adapters; with an anchor, also the one that the run starts from, unless that lies below adapters.
    pub weights: u64,
    /// One for each number that is trained, in its type.
    pub gradients: u64,
    /// Both moments; of bf16 weights also the float32 masters, unless the state is bf16; the moving average where there is
    /// one.
    pub optimizer: u64,
    /// What the forward keeps for the backward, and the largest temporaries beside it.
    pub activations: u64,
    /// All of it together, at the moment that takes most.
    pub peak: u64,
}

/// Sizes of a batch.
#[derive(Debug, Clone, Copy)]
struct Shape {
    tokens: f64,
    /// Sum of the squares of the sequences' lengths.
    squares: f64,
    /// Rows of logits that exist at once: of the autoregressive loss and the divergence.
    rows: f64,
}

impl Memory {
    /// The estimate for the batch that takes most of those given, on each of so many processes.
    pub fn of(
        config: &ModelConfig,
        kind: Kind,
        settings: &Settings,
        examples: &[Example],
        batches: &[Vec<usize>],
        processes: usize,
    ) -> Self {
        let (parameters, trained) = (config.num_parameters() as f64, settings.trained_parameters(config) as f64);
        let bytes = kind.elt_size_in_bytes() as f64;
        let state = match (settings.optimizer.state_dtype, kind) {
            (StateDtype::Bfloat16, _) => 4.0,
            (StateDtype::Float32, Kind::Float) => 8.0,
            (StateDtype::Float32, _) => 12.0,
        };
        let most_rows = prefetch::rows_at_once(config) as f64;
        let activations = batches
            .iter()
            .map(|batch| Shape::of(batch, examples, &settings.consistency, most_rows))
            .map(|shape| match kind {
                Kind::BFloat16 if train::has_kernels(config) => fused(config, settings, shape),
                _ => eager(config, bytes, settings, shape),
            })
            .fold(0.0, f64::max);
        let share = trained / processes as f64;
        // The update makes float32 copies of some gradients, when the activations are gone; a bf16 state, of all it touches.
        let copies = if settings.optimizer.state_dtype == StateDtype::Bfloat16 { 8.0 } else { 1.0 };
        let update = match kind {
            Kind::Float => 0.0,
            _ => copies * 4.0 * share.min(optimizer::PIECE as f64),
        };
        let average = if settings.optimizer.ema_decay.is_some() { 4.0 } else { 0.0 };
        // What the other processes' gradients are added up to.
        let summed = if processes > 1 { bytes * share } else { 0.0 };
        // Below adapters lies the model that the run starts from, which then is the anchor unless another is named.
        let own = if settings.lora.is_some() { parameters + trained } else { parameters };
        let another = settings.lora.is_none() || settings.consistency.anchor.is_some();
        let held = own + if settings.is_anchored() && another { parameters } else { 0.0 };
        let (weights, gradients, optimizer) = (bytes * held, bytes * trained, (state + average) * share);
        Memory {
            weights: weights as u64,
            gradients: gradients as u64,
            optimizer: optimizer as u64,
            activations: activations as u64,
            peak: (weights + gradients + optimizer + activations.max(update + summed)) as u64,
        }
    }
}

impl Shape {
    fn of(batch: &[usize], examples: &[Example], consistency: &ConsistencySettings, most_rows: f64) -> Self {
        let rows = || batch.iter().map(|&index| &examples[index]);
        let sum = |size: &dyn Fn(&Example) -> usize| rows().map(size).sum::<usize>() as f64;
        Shape {
            tokens: sum(&|example| example.packed_len(consistency)),
            squares: sum(&|example| example.packed_len(consistency).pow(2)),
            rows: (sum(&|example| example.response.len() + example.noisy_len(consistency))
                + consistency.anchor_prompt_fraction * sum(&|example| example.prompt.len()))
            .min(most_rows),
        }
    }
}

/// Elements that a layer's parts have for a token.
struct Sizes {
    hidden: f64,
    queries: f64,
    qkv: f64,
    heads: f64,
    ffn: f64,
}

impl Sizes {
    fn of(config: &ModelConfig) -> Self {
        let size = |size: i64| size as f64;
        Sizes {
            hidden: size(config.hidden_size),
            queries: size(config.num_heads * config.head_dim),
            qkv: size((config.num_heads + 2 * config.num_kv_heads) * config.head_dim),
            heads: size(config.num_heads),
            ffn: size(config.intermediate_size),
        }
    }
}

/// With kernels of our own, in bf16, a token of a layer keeps two inputs of norms and what they give, queries, keys and values,
/// the mixed values with a float32 log-sum a head, gate and up. A layer that is computed again keeps its input, and one of them
/// at a time all the rest. Beside them there are, in turn: the output of the feed-forward's first half; the last hidden states,
/// their gradient and the logits of a chunk; two gradients of a layer.
fn fused(config: &ModelConfig, settings: &Settings, shape: Shape) -> f64 {
    let Sizes { hidden, queries, qkv, heads, ffn } = Sizes::of(config);
    let kept = 8.0 * hidden + 2.0 * (qkv + queries) + 4.0 * heads + 4.0 * ffn;
    let layers = config.num_layers as f64;
    let again = layers.min(settings.checkpointed_layers as f64);
    let once = if again > 0.0 { kept } else { 0.0 };
    let all = (layers - again) * kept + again * 2.0 * hidden + once;
    let in_losses = shape.rows * (2.0 * config.vocab_size as f64 + 4.0 * hidden);
    let in_layer = shape.tokens * 2.0 * ffn.max(qkv + queries);
    let targets = if settings.is_anchored() || settings.consistency.local_weight > 0.0 { 2.0 } else { 1.0 };
    shape.tokens * (all + 6.0 * hidden) + (targets * in_losses).max(in_layer)
}

/// With libtorch's operations and b bytes an element, a token of a layer has
/// - two norms over the hidden size: their input in float32, the normed input and the output: 4 + 2b each;
/// - queries, keys and values (laid out for every query head) and the mixed values, once by sequence and once together: 5b over
///   all heads, and a float32 log-sum a head;
/// - with norms of queries and keys: their float32 input and the normed one;
/// - gate, its activation, up and their product: 4b over the feed-forward width;
/// - what each adapter makes of it on the way: b times the rank.
///
/// The last norm is one more, and every sequence has a mask, as numbers.
fn eager(config: &ModelConfig, bytes: f64, settings: &Settings, shape: Shape) -> f64 {
    let Sizes { hidden, queries, qkv, heads, ffn } = Sizes::of(config);
    let norm = (4.0 + 2.0 * bytes) * hidden;
    let head_norms = match config.family {
        Family::Qwen3 => (4.0 + bytes) * (queries + (qkv - queries) / 2.0),
        Family::Llama | Family::Mistral | Family::Qwen2 => 0.0,
    };
    let adapters = settings.lora.as_ref().map_or(0.0, |lora| lora.rank as f64 * lora.targets.len() as f64);
    let kept = bytes * adapters + 2.0 * norm + 5.0 * bytes * queries + 4.0 * heads + head_norms + 4.0 * bytes * ffn;
    let layers = config.num_layers as f64;
    let again = layers.min(settings.checkpointed_layers as f64);
    let once = if again > 0.0 { kept } else { 0.0 };
    let all = (layers - again) * kept + again * bytes * hidden + once;
    shape.tokens * (all + norm) + bytes * shape.squares + eager_losses(config, settings, shape)
}

/// Rows of float32 over the vocabulary, at most at once: the logits, their log-probabilities, and what a divergence and the
/// backward make of them.
fn eager_losses(config: &ModelConfig, settings: &Settings, shape: Shape) -> f64 {
    let copies = match (settings.objective, settings.consistency.divergence) {
        (Objective::Sft, _) => 4.0,
        (Objective::Consistency, Divergence::Forward) => 5.0,
        (Objective::Consistency, Divergence::Reverse) => 6.0,
        (Objective::Consistency, Divergence::Jsd) => 9.0,
    };
    let anchor = if settings.is_anchored() { 3.0 } else { 0.0 };
    (copies + anchor) * shape.rows * 4.0 * config.vocab_size as f64
}
