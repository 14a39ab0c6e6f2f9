//! Training passes: sequences packed one behind another into a stream, each token seeing only what it is allowed to of its
//! own sequence, and a backward that can compute layers again instead of keeping what they need.

use tch::{Kind, Tensor};

use super::cuda::{CudaBatch, FusedPass};
use crate::Result;
pub use crate::cuda::block_mask::AttentionRanges;
use crate::cuda::libtorch;
use crate::cuda::train::TrainKernels;
use crate::model::{Context, Transformer, attend};

/// Sequences one behind another, on the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PackedBatch {
    /// Token ids.
    pub tokens: Vec<i32>,
    /// Position of each token.
    pub positions: Vec<i32>,
    /// What each token sees.
    pub attention_ranges: Vec<AttentionRanges>,
    /// Place after the last token of each sequence.
    pub sequence_ends: Vec<usize>,
}

/// A stream on a device.
pub struct DeviceBatch(On);

enum On {
    /// For kernels of our own.
    Fused(Box<CudaBatch>),
    /// For libtorch's operations.
    Eager(EagerBatch),
}

/// A stream for libtorch's operations.
pub(crate) struct EagerBatch {
    /// int64 `[1, tokens]`.
    tokens: Tensor,
    /// int64 `[1, tokens]`.
    positions: Tensor,
    /// First place and length of each sequence, and what is added to its scores `[1, 1, length, length]`.
    sequences: Vec<(i64, i64, Tensor)>,
}

/// A forward over a stream whose backward is still to come.
pub struct ForwardPass<'p> {
    model: &'p Transformer,
    kept: Kept<'p>,
    /// Final hidden states (after the last norm) `[tokens, hidden]`.
    pub hidden: Tensor,
}

/// What the backward needs.
enum Kept<'p> {
    Fused(&'p CudaBatch, FusedPass),
    Eager {
        stream: &'p EagerBatch,
        embedded: Tensor,
        /// Inputs of the leading layers, which are computed again in the backward.
        inputs: Vec<Tensor>,
        /// Input of the first layer that keeps what its backward needs.
        entry: Tensor,
    },
}

impl PackedBatch {
    /// Appends a sequence: its tokens, their positions, and what they see, counted from the sequence's first place.
    pub fn push(&mut self, tokens: &[i32], positions: &[i32], seen: &[AttentionRanges]) {
        let base = self.tokens.len() as i32;
        self.tokens.extend(tokens);
        self.positions.extend(positions);
        self.attention_ranges.extend(seen.iter().map(|ranges| ranges.map(|(start, end)| (start + base, end + base))));
        self.sequence_ends.push(self.tokens.len());
    }

    /// Appends a sequence of which every token sees what is before it.
    pub fn push_causal(&mut self, tokens: &[i32]) {
        let places = 0..tokens.len() as i32;
        let seen: Vec<AttentionRanges> = places.clone().map(|place| [(0, place + 1), (0, 0), (0, 0)]).collect();
        self.push(tokens, &places.collect::<Vec<_>>(), &seen);
    }
}

impl DeviceBatch {
    /// Brings a stream to where `model` is.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] where kernels do not compile or memory ran out.
    pub fn new(stream: &PackedBatch, model: &Transformer) -> Result<Self> {
        Ok(DeviceBatch(match CudaBatch::new(stream, model)? {
            Some(stream) => On::Fused(Box::new(stream)),
            None => On::Eager(EagerBatch::new(stream, model)),
        }))
    }

    /// The kernels that compute it, where they are our own.
    pub fn kernels(&self) -> Option<&TrainKernels> {
        match &self.0 {
            On::Fused(stream) => Some(stream.kernels()),
            On::Eager(_) => None,
        }
    }
}

impl EagerBatch {
    fn new(stream: &PackedBatch, model: &Transformer) -> Self {
        let device = model.device();
        let whole = |ids: &[i32]| Tensor::from_slice(ids).to_device(device).to_kind(Kind::Int64).unsqueeze(0);
        let mut start = 0;
        let sequences = stream.sequence_ends.iter().map(|&end| {
            let mask = mask(&stream.attention_ranges[start..end], start as i32).to_device(device);
            let sequence = (start as i64, (end - start) as i64, model.bias(&mask));
            start = end;
            sequence
        });
        let sequences = sequences.collect();
        EagerBatch { tokens: whole(&stream.tokens), positions: whole(&stream.positions), sequences }
    }

    /// Attention of queries `[1, heads, tokens, head_dim]` to keys and values `[1, kv_heads, tokens, head_dim]`.
    pub(crate) fn attend(&self, queries: &Tensor, keys: &Tensor, values: &Tensor) -> Tensor {
        let mixed: Vec<Tensor> = self
            .sequences
            .iter()
            .map(|(start, length, bias)| {
                let own = |x: &Tensor| x.narrow(2, *start, *length);
                attend(&own(queries), &own(keys), &own(values), Some(bias))
            })
            .collect();
        Tensor::cat(&mixed, 2)
    }
}

/// Bool `[1, 1, length, length]` of one sequence that starts at place `base`.
fn mask(seen: &[AttentionRanges], base: i32) -> Tensor {
    let width = seen.len();
    let mut mask = vec![false; width * width];
    for (ranges, row) in seen.iter().zip(mask.chunks_mut(width)) {
        for &(start, end) in ranges.iter().filter(|(start, end)| start < end) {
            row[(start - base) as usize..(end - base) as usize].fill(true);
        }
    }
    Tensor::from_slice(&mask).view([1, 1, width as i64, width as i64])
}

/// A forward over a stream. The backward computes the leading `recomputed` layers again, so that all that is kept of
/// them is their input (Chen et al., arXiv 1604.06174).
///
/// # Errors
/// [`crate::Error::Torch`], such as memory that ran out.
pub fn forward<'p>(model: &'p Transformer, stream: &'p DeviceBatch, recomputed: usize) -> Result<ForwardPass<'p>> {
    let (kept, hidden) = match &stream.0 {
        On::Fused(stream) => {
            let (hidden, pass) = stream.forward(model, Some(recomputed))?;
            (Kept::Fused(stream, pass), hidden)
        }
        On::Eager(stream) => eager_pass(model, stream, recomputed),
    };
    Ok(ForwardPass { model, kept, hidden })
}

/// Final hidden states `[tokens, hidden]` of a stream alone: nothing is kept for a backward.
///
/// # Errors
/// [`crate::Error::Torch`], such as memory that ran out.
pub fn hidden_states(model: &Transformer, stream: &DeviceBatch) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    match &stream.0 {
        On::Fused(stream) => Ok(stream.forward(model, None)?.0),
        On::Eager(stream) => Ok(eager_pass(model, stream, 0).1),
    }
}

fn eager_pass<'p>(model: &Transformer, stream: &'p EagerBatch, recomputed: usize) -> (Kept<'p>, Tensor) {
    let rotation = model.rope.rotation(&stream.positions, model.kind());
    let embedded = model.embed(&stream.tokens);
    let mut x = embedded.detach();
    let mut inputs = Vec::new();
    let mut context = Context::Packed(stream);
    for index in 0..recomputed.min(model.layers.len()) {
        let output = tch::no_grad(|| model.layer(index, &x, &rotation, &mut context));
        inputs.push(std::mem::replace(&mut x, output));
    }
    let entry = x.set_requires_grad(true);
    let mut x = entry.shallow_clone();
    for index in inputs.len()..model.layers.len() {
        x = model.layer(index, &x, &rotation, &mut context);
    }
    let hidden = model.rms_norm(&x, &model.norm).flatten(0, 1);
    (Kept::Eager { stream, embedded, inputs, entry }, hidden)
}
impl ForwardPass<'_> {
    /// Adds to the gradients of the weights what follows from the gradient of the hidden states, of the same shape.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], such as memory that ran out.
    pub fn backward(self, gradient: &Tensor) -> Result<()> {
        let ForwardPass { model, kept, hidden } = self;
        let (stream, embedded, mut inputs, entry) = match kept {
            Kept::Fused(stream, pass) => return stream.backward(model, pass, gradient),
            Kept::Eager { stream, embedded, inputs, entry } => (stream, embedded, inputs, entry),
        };
        libtorch::backward(&hidden, gradient)?;
        drop(hidden);
        let mut gradient = entry.grad();
        let rotation = model.rope.rotation(&stream.positions, model.kind());
        while let Some(input) = inputs.pop() {
            let entry = input.set_requires_grad(true);
            let output = model.layer(inputs.len(), &entry, &rotation, &mut Context::Packed(stream));
            libtorch::backward(&output, &gradient)?;
            gradient = entry.grad();
        }
        if embedded.requires_grad() { libtorch::backward(&embedded, &gradient) } else { Ok(()) }
    }
}
