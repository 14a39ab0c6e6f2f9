//! Computes the losses of a batch and their gradients.
//!
//! One forward over the packed batch gives the hidden states of all tokens. The vocabulary
//! projection is then applied chunk by chunk: each chunk's logits become losses and, right away,
//! the gradient of its hidden states. The gradients of all chunks together go through the model in
//! one backward.
//!
//! `eager` defines the losses in libtorch's operations and differentiates them by autograd; `cuda`
//! computes the same with kernels that turn logits into their own gradients in place.

mod block_weights;
mod cuda;
mod eager;
mod head;

use cllm_core::Result;
use cllm_core::device::upload;
use cllm_core::model::Transformer;
use cllm_core::train::{self, DeviceBatch, GradientSink, ModelPart, PackedBatch};
use tch::{Kind, Tensor};

use crate::data::batch::{Batch, LocalChunk};
use crate::losses::Losses;
use crate::settings::ConsistencySettings;
use block_weights::BlockWeights;
pub use eager::divergence;
use head::{ChunkLosses, FrozenRows, LossHead};

/// How to compute gradients.
#[derive(Clone, Copy)]
pub struct Backward<'g> {
    /// Where gradients add up.
    pub gradients: &'g dyn GradientSink,
    /// Factor of each loss in the gradient.
    pub scale: Losses<f64>,
    pub checkpointed_layers: usize,
}

/// The sum of each loss over the tokens of a batch, as float32 scalars on the device. The anchor
/// loss needs the frozen model `anchor`, and so do frozen targets of the global loss. With `backward`,
/// gradients are added to those of the model.
///
/// # Errors
/// [`cllm_core::Error::Torch`], for example when memory runs out.
pub fn batch_losses(
    model: &Transformer,
    anchor: Option<&Transformer>,
    batch: &Batch,
    settings: &ConsistencySettings,
    backward: Option<Backward<'_>>,
) -> Result<Losses<Tensor>> {
    let _no_grad = backward.is_none().then(tch::no_grad_guard);
    let device_batch = DeviceBatch::new(&batch.packed, model)?;
    let pass =
        backward.map(|backward| train::forward(model, &device_batch, backward.checkpointed_layers)).transpose()?;
    let hidden = match &pass {
        Some(pass) => pass.hidden.detach(),
        None => train::hidden_states(model, &device_batch)?,
    };
    let anchor = anchor.map(|model| AnchorPass::new(model, &batch.clean)).transpose()?;
    let head = LossHead {
        model,
        divergence: settings.divergence,
        has_frozen_targets: anchor.is_some() && settings.has_frozen_targets(),
        scale: backward.map(|backward| backward.scale),
    };
    let mut totals = Totals::new(&hidden, backward.is_some());
    backward.map_or(Ok(()), |backward| backward.gradients.begin(ModelPart::LmHead))?;
    for chunk in &batch.chunks {
        let noisy_rows = if settings.global_weight > 0.0 { chunk.noisy_rows.as_slice() } else { &[] };
        let rows = totals.rows(&[chunk.rows.as_slice(), noisy_rows].concat())?;
        let anchor_rows = anchor.as_ref().map(|anchor| anchor.rows(&chunk.clean_rows)).transpose()?;
        let weights = BlockWeights::new(settings, chunk, hidden.device())?;
        let (anchor_rows, weights) = (anchor_rows.as_ref(), weights.as_ref());
        let losses = match device_batch.kernels() {
            Some(kernels) => cuda::chunk_losses(&head, kernels, &rows.hidden, anchor_rows, chunk, weights)?,
            None => eager::chunk_losses(&head, &rows.hidden, anchor_rows, chunk, weights),
        };
        totals.add(&rows, losses);
    }
    if settings.local_weight > 0.0 {
        for LocalChunk { rows, next_rows } in &batch.local_chunks {
            let rows = totals.rows(rows)?;
            let next_rows = frozen_rows(model, &hidden, next_rows)?;
            let losses = match device_batch.kernels() {
                Some(kernels) => cuda::local_losses(&head, kernels, &rows.hidden, &next_rows)?,
                None => eager::local_losses(&head, &rows.hidden, &next_rows),
            };
            totals.add(&rows, losses);
        }
    }
    let Totals { d_hidden, sums, .. } = totals;
    if let (Some(d_hidden), Some(pass), Some(Backward { gradients, .. })) = (d_hidden, pass, backward) {
        gradients.complete(ModelPart::LmHead)?;
        pass.backward(&d_hidden, gradients)?;
    }
    Ok(sums)
}

/// Some rows of the hidden states.
struct Rows {
    /// int64 `[rows]`.
    indices: Tensor,
    /// `[rows, hidden]`.
    hidden: Tensor,
}

/// Sums over all chunks so far, and the gradient of all hidden states.
struct Totals<'h> {
    hidden: &'h Tensor,
    d_hidden: Option<Tensor>,
    sums: Losses<Tensor>,
}

impl<'h> Totals<'h> {
    fn new(hidden: &'h Tensor, has_backward: bool) -> Self {
        let zero = || Tensor::zeros([], (Kind::Float, hidden.device()));
        let sums = Losses { ar: zero(), global: zero(), local: zero(), anchor: zero() };
        Totals { hidden, d_hidden: has_backward.then(|| hidden.zeros_like()), sums }
    }

    fn rows(&self, indices: &[i64]) -> Result<Rows> {
        let indices = upload(indices, self.hidden.device())?;
        Ok(Rows { hidden: self.hidden.f_index_select(0, &indices)?, indices })
    }

    /// Adds a chunk. Its rows are distinct, unless the prompt is empty: then the first two response
    /// tokens have the same row.
    fn add(&mut self, rows: &Rows, chunk: ChunkLosses) {
        for (total, sum) in self.sums.as_mut().zip(chunk.sums).into_array() {
            if let Some(sum) = sum {
                *total += sum.detach();
            }
        }
        if let (Some(d_rows), Some(d_hidden)) = (chunk.d_rows, &mut self.d_hidden) {
            let _ = d_hidden.index_add_(0, &rows.indices, &d_rows);
        }
    }
}

/// The frozen model's view of the clean part of a batch.
struct AnchorPass<'m> {
    model: &'m Transformer,
    hidden: Tensor,
}

impl<'m> AnchorPass<'m> {
    fn new(model: &'m Transformer, clean: &PackedBatch) -> Result<Self> {
        Ok(AnchorPass { model, hidden: train::hidden_states(model, &DeviceBatch::new(clean, model)?)? })
    }

    fn rows(&self, rows: &[i64]) -> Result<FrozenRows<'m>> {
        frozen_rows(self.model, &self.hidden, rows)
    }
}

fn frozen_rows<'m>(model: &'m Transformer, hidden: &Tensor, rows: &[i64]) -> Result<FrozenRows<'m>> {
    Ok(FrozenRows { model, hidden: hidden.f_index_select(0, &upload(rows, hidden.device())?)? })
}
