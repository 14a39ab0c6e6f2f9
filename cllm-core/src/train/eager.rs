//! The training pass with libtorch's operations: autograd computes the backward, in several parts
//! if layers are checkpointed.

use std::ops::Range;

use tch::{Kind, Tensor};

use super::gradients::{GradientSink, ModelPart, complete_without_gradients};
use super::packed_batch::PackedBatch;
use crate::Result;
use crate::cuda::block_mask::AttentionRanges;
use crate::cuda::libtorch;
use crate::model::{
    Attention, ModelConfig, PerWindow, Rotation, Transformer, attention_bias, repeat_heads,
    scaled_dot_product_attention,
};

/// Queries of an [`AttentionPart`] with a bias.
const MAX_PART_QUERIES: usize = 256;

pub(super) struct EagerBatch {
    /// int64 `[1, tokens]`.
    tokens: Tensor,
    /// int64 `[1, tokens]`.
    positions: Tensor,
    /// The parts of each layer's attention, which cover the tokens in order.
    parts: PerWindow<Vec<AttentionPart>>,
    /// Indices of the draft tokens, int64 `[drafts]`, if there are any.
    draft_rows: Option<Tensor>,
}

/// Consecutive queries of one sequence, and the keys that they attend to.
struct AttentionPart {
    queries: Range<usize>,
    keys: Range<usize>,
    /// Bias of the scores, `[1, 1, queries, keys]`. Without one, queries and keys are the same tokens
    /// and attention is causal.
    bias: Option<Tensor>,
}

impl EagerBatch {
    pub(super) fn new(batch: &PackedBatch, model: &Transformer) -> Self {
        let device = model.device();
        let to_device = |ids: &[i32]| Tensor::from_slice(ids).to_device(device).to_kind(Kind::Int64).unsqueeze(0);
        let parts = PerWindow::new(model.config(), |window| {
            let ranges = batch.ranges_within(window);
            let starts = std::iter::once(0).chain(batch.sequence_ends.iter().copied());
            let sequences = starts.zip(&batch.sequence_ends).map(|(start, &end)| start..end);
            sequences.flat_map(|sequence| attention_parts(&ranges, sequence, model)).collect()
        });
        let rows = &batch.draft_rows;
        let draft_rows = (!rows.is_empty()).then(|| Tensor::from_slice(rows).to_device(device));
        EagerBatch { tokens: to_device(&batch.tokens), positions: to_device(&batch.positions), parts, draft_rows }
    }

    /// Final hidden states `[tokens, hidden]`.
    pub(super) fn forward<'p>(&'p self, model: &'p Transformer, checkpointed_layers: usize) -> (Tensor, EagerPass<'p>) {
        let rotation = model.rope.rotation(&self.positions, model.kind());
        let embedded = model.embed(&self.tokens);
        let mut x = embedded.detach();
        let mut checkpoints = Vec::new();
        let first_layer = model.first_adapted_layer();
        let first_saved = checkpointed_layers.clamp(first_layer, model.layers.len());
        for index in 0..first_saved {
            let output = tch::no_grad(|| self.layer_forward(model, index, &x, &rotation));
            let input = std::mem::replace(&mut x, output);
            if index >= first_layer {
                checkpoints.push(input);
            }
        }
        let graph_input = x.set_requires_grad(true);
        let mut x = graph_input.shallow_clone();
        for index in first_saved..model.layers.len() {
            x = self.layer_forward(model, index, &x, &rotation);
        }
        let hidden = model.rms_norm(&x, &model.norm).flatten(0, 1);
        (hidden, EagerPass { model, batch: self, embedded, first_layer, checkpoints, graph_input })
    }

    fn layer_forward(&self, model: &Transformer, index: usize, x: &Tensor, rotation: &Rotation) -> Tensor {
        model.layer_forward(index, x, rotation, &mut PackedAttention(self), self.draft_rows.as_ref())
    }
}

/// The parts of one sequence. Its leading tokens, as far as they attend to all tokens before them,
/// need no bias: that of a long response would fill the memory.
fn attention_parts(ranges: &[AttentionRanges], sequence: Range<usize>, model: &Transformer) -> Vec<AttentionPart> {
    let is_causal = |&index: &usize| {
        let mut attended = ranges[index].iter().filter(|(start, end)| start < end);
        attended.next() == Some(&(sequence.start as i32, index as i32 + 1)) && attended.next().is_none()
    };
    let first_other = sequence.clone().find(|index| !is_causal(index)).unwrap_or(sequence.end);
    let causal = sequence.start..first_other;
    let causal = (!causal.is_empty()).then(|| AttentionPart { queries: causal.clone(), keys: causal, bias: None });
    let others = (first_other..sequence.end).step_by(MAX_PART_QUERIES).map(|start| {
        let queries = start..(start + MAX_PART_QUERIES).min(sequence.end);
        let attended = || ranges[queries.clone()].iter().flatten().filter(|(start, end)| start < end);
        let first_key = attended().map(|&(start, _)| start as usize).min().unwrap_or(start);
        let last_key = attended().map(|&(_, end)| end as usize).max().unwrap_or(start);
        let mask = attention_mask(&ranges[queries.clone()], first_key..last_key).to_device(model.device());
        AttentionPart { queries, keys: first_key..last_key, bias: Some(attention_bias(&mask, model.kind())) }
    });
    causal.into_iter().chain(others).collect()
}

/// Maximum number of elements of all biases of a sequence, of whose tokens the leading ones are
/// clean.
pub fn max_bias_elements(config: &ModelConfig, num_clean_tokens: usize, num_tokens: usize) -> usize {
    let of_noisy_tokens = (num_tokens - num_clean_tokens) * num_tokens;
    let of_clean_tokens = |window: i32| num_clean_tokens * num_tokens.min(window as usize + MAX_PART_QUERIES);
    let mut elements = 0;
    PerWindow::new(config, |window| elements += of_noisy_tokens + window.map_or(0, of_clean_tokens));
    elements
}

/// Which keys each query attends to, bool `[1, 1, queries, keys]`.
fn attention_mask(queries: &[AttentionRanges], keys: Range<usize>) -> Tensor {
    let mut mask = vec![false; queries.len() * keys.len()];
    for (ranges, row) in queries.iter().zip(mask.chunks_mut(keys.len())) {
        for &(start, end) in ranges.iter().filter(|(start, end)| start < end) {
            row[start as usize - keys.start..end as usize - keys.start].fill(true);
        }
    }
    Tensor::from_slice(&mask).view([1, 1, queries.len() as i64, keys.len() as i64])
}

/// Attention within each sequence of a packed batch.
struct PackedAttention<'b>(&'b EagerBatch);

impl Attention for PackedAttention<'_> {
    fn attend(&mut self, _layer: usize, window: Option<i32>, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let group = q.size()[1] / k.size()[1];
        let (k, v) = (repeat_heads(k, group), repeat_heads(v, group));
        let attend = |part: &AttentionPart| {
            let narrow = |x: &Tensor, tokens: &Range<usize>| x.narrow(2, tokens.start as i64, tokens.len() as i64);
            let (q, k, v) = (narrow(q, &part.queries), narrow(&k, &part.keys), narrow(&v, &part.keys));
            scaled_dot_product_attention(&q, &k, &v, part.bias.as_ref())
        };
        Tensor::cat(&self.0.parts.get(window).iter().map(attend).collect::<Vec<_>>(), 2)
    }
}

/// State for the backward: the ends of autograd's graph, and the inputs of the layers that have no
/// graph yet.
pub(super) struct EagerPass<'p> {
    model: &'p Transformer,
    batch: &'p EagerBatch,
    /// Output of the embedding.
    embedded: Tensor,
    /// The first layer that has gradients.
    first_layer: usize,
    /// Inputs of the checkpointed layers from there on.
    checkpoints: Vec<Tensor>,
    /// Input of the first layer that is not checkpointed, where the graph of the hidden states
    /// begins.
    graph_input: Tensor,
}

impl EagerPass<'_> {
    pub(super) fn backward(self, hidden: Tensor, d_hidden: &Tensor, gradients: &dyn GradientSink) -> Result<()> {
        let EagerPass { model, batch, embedded, first_layer, mut checkpoints, graph_input } = self;
        // Autograd runs through all of these layers at once.
        let layers = (first_layer + checkpoints.len()..model.layers.len()).rev().map(ModelPart::Layer);
        layers.clone().try_for_each(|layer| gradients.begin(layer))?;
        libtorch::backward(&hidden, d_hidden)?;
        drop(hidden);
        layers.into_iter().try_for_each(|layer| gradients.complete(layer))?;
        let mut d_x = graph_input.grad();
        let rotation = model.rope.rotation(&batch.positions, model.kind());
        while let Some(checkpoint) = checkpoints.pop() {
            let input = checkpoint.set_requires_grad(true);
            let layer = first_layer + checkpoints.len();
            let output = batch.layer_forward(model, layer, &input, &rotation);
            gradients.begin(ModelPart::Layer(layer))?;
            libtorch::backward(&output, &d_x)?;
            gradients.complete(ModelPart::Layer(layer))?;
            d_x = input.grad();
        }
        complete_without_gradients(0..first_layer, gradients)?;
        // The embedding is frozen if adapters are trained.
        if embedded.requires_grad() {
            gradients.begin(ModelPart::Embedding)?;
            libtorch::backward(&embedded, &d_x)?;
            gradients.complete(ModelPart::Embedding)?;
        }
        Ok(())
    }
}
