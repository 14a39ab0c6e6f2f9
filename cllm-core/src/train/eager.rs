//! The training pass with libtorch's operations: autograd computes the backward, in several parts
//! if layers are checkpointed.

use tch::{Kind, Tensor};

use super::packed_batch::PackedBatch;
use crate::Result;
use crate::cuda::block_mask::AttentionRanges;
use crate::cuda::libtorch;
use crate::model::{Attention, Transformer, attention_bias, scaled_dot_product_attention};

pub(super) struct EagerBatch {
    /// int64 `[1, tokens]`.
    tokens: Tensor,
    /// int64 `[1, tokens]`.
    positions: Tensor,
    sequences: Vec<Sequence>,
}

struct Sequence {
    /// Index of its first token in the batch.
    start: i64,
    length: i64,
    /// Bias of its attention scores, `[1, 1, length, length]`.
    bias: Tensor,
}

impl EagerBatch {
    pub(super) fn new(batch: &PackedBatch, model: &Transformer) -> Self {
        let device = model.device();
        let to_device = |ids: &[i32]| Tensor::from_slice(ids).to_device(device).to_kind(Kind::Int64).unsqueeze(0);
        let mut start = 0;
        let sequences = batch.sequence_ends.iter().map(|&end| {
            let mask = attention_mask(&batch.attention_ranges[start..end], start as i32).to_device(device);
            let bias = attention_bias(&mask, model.kind());
            let sequence = Sequence { start: start as i64, length: (end - start) as i64, bias };
            start = end;
            sequence
        });
        let sequences = sequences.collect();
        EagerBatch { tokens: to_device(&batch.tokens), positions: to_device(&batch.positions), sequences }
    }

    /// Final hidden states `[tokens, hidden]`.
    pub(super) fn forward<'p>(&'p self, model: &'p Transformer, checkpointed_layers: usize) -> (Tensor, EagerPass<'p>) {
        let rotation = model.rope.rotation(&self.positions, model.kind());
        let mut attention = PackedAttention(&self.sequences);
        let embedded = model.embed(&self.tokens);
        let mut x = embedded.detach();
        let mut checkpoints = Vec::new();
        for index in 0..checkpointed_layers.min(model.layers.len()) {
            let output = tch::no_grad(|| model.layer_forward(index, &x, &rotation, &mut attention));
            checkpoints.push(std::mem::replace(&mut x, output));
        }
        let graph_input = x.set_requires_grad(true);
        let mut x = graph_input.shallow_clone();
        for index in checkpoints.len()..model.layers.len() {
            x = model.layer_forward(index, &x, &rotation, &mut attention);
        }
        let hidden = model.rms_norm(&x, &model.norm).flatten(0, 1);
        (hidden, EagerPass { model, batch: self, embedded, checkpoints, graph_input })
    }
}

/// Attention within each sequence of a packed batch.
struct PackedAttention<'b>(&'b [Sequence]);

impl Attention for PackedAttention<'_> {
    fn attend(&mut self, _layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        let attend = |sequence: &Sequence| {
            let narrow = |x: &Tensor| x.narrow(2, sequence.start, sequence.length);
            scaled_dot_product_attention(&narrow(q), &narrow(k), &narrow(v), Some(&sequence.bias))
        };
        Tensor::cat(&self.0.iter().map(attend).collect::<Vec<_>>(), 2)
    }
}

/// Which tokens of one sequence see each other, bool `[1, 1, length, length]`. `base`: index of its
/// first token in the batch.
fn attention_mask(ranges: &[AttentionRanges], base: i32) -> Tensor {
    let length = ranges.len();
    let mut mask = vec![false; length * length];
    for (ranges, row) in ranges.iter().zip(mask.chunks_mut(length)) {
        for &(start, end) in ranges.iter().filter(|(start, end)| start < end) {
            row[(start - base) as usize..(end - base) as usize].fill(true);
        }
    }
    Tensor::from_slice(&mask).view([1, 1, length as i64, length as i64])
}

/// State for the backward: the ends of autograd's graph, and the inputs of the layers that have no
/// graph yet.
pub(super) struct EagerPass<'p> {
    model: &'p Transformer,
    batch: &'p EagerBatch,
    /// Output of the embedding.
    embedded: Tensor,
    /// Inputs of the checkpointed layers.
    checkpoints: Vec<Tensor>,
    /// Input of the first layer that is not checkpointed, where the graph of the hidden states
    /// begins.
    graph_input: Tensor,
}

impl EagerPass<'_> {
    pub(super) fn backward(self, hidden: Tensor, d_hidden: &Tensor) -> Result<()> {
        let EagerPass { model, batch, embedded, mut checkpoints, graph_input } = self;
        libtorch::backward(&hidden, d_hidden)?;
        drop(hidden);
        let mut d_x = graph_input.grad();
        let rotation = model.rope.rotation(&batch.positions, model.kind());
        while let Some(checkpoint) = checkpoints.pop() {
            let input = checkpoint.set_requires_grad(true);
            let layer = checkpoints.len();
            let output = model.layer_forward(layer, &input, &rotation, &mut PackedAttention(&batch.sequences));
            libtorch::backward(&output, &d_x)?;
            d_x = input.grad();
        }
        // The embedding is frozen if adapters are trained.
        if embedded.requires_grad() { libtorch::backward(&embedded, &d_x) } else { Ok(()) }
    }
}
