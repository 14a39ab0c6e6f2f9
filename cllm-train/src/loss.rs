//! Computes the losses of a batch and their gradients.
//!
//! One forward over the packed batch gives the hidden states of all tokens. The vocabulary
//! projection is then applied chunk by chunk: each chunk's logits become losses and, right away,
//! the gradient of its hidden states. The gradients of all chunks together go through the model in
//! one backward. On a GPU the logits are turned into their own gradients in place by kernels;
//! elsewhere autograd does it.

use cllm_core::Result;
use cllm_core::cuda::train::{self as kernels, Labels, Logits, TargetRows, TrainKernels};
use cllm_core::model::Transformer;
use cllm_core::train::{self, DeviceBatch, PackedBatch};
use tch::{Device, Kind, Tensor};

use crate::data::batch::{Batch, Chunk, LocalChunk, NO_LABEL};
use crate::losses::Losses;
use crate::settings::{ConsistencySettings, Divergence};

/// How to compute gradients.
#[derive(Debug, Clone, Copy)]
pub struct Backward {
    /// Factor of each loss in the gradient.
    pub scale: Losses<f64>,
    pub checkpointed_layers: usize,
}

/// The sum of each loss over the tokens of a batch, as float32 scalars on the device. The anchor
/// loss needs the frozen model `anchor`. With `backward`, gradients are added to those of the
/// model.
///
/// # Errors
/// [`cllm_core::Error::Torch`], for example when memory runs out.
pub fn batch_losses(
    model: &Transformer,
    anchor: Option<&Transformer>,
    batch: &Batch,
    settings: &ConsistencySettings,
    backward: Option<Backward>,
) -> Result<Losses<Tensor>> {
    let _no_grad = backward.is_none().then(tch::no_grad_guard);
    let device_batch = DeviceBatch::new(&batch.packed, model)?;
    let pass =
        backward.map(|backward| train::forward(model, &device_batch, backward.checkpointed_layers)).transpose()?;
    let hidden = match &pass {
        Some(pass) => pass.hidden.detach(),
        None => train::hidden_states(model, &device_batch)?,
    };
    let anchor = anchor.map(|model| AnchorLogits::new(model, &batch.clean)).transpose()?;
    let scale = backward.map(|backward| backward.scale);
    let head = LossHead { model, kernels: device_batch.kernels(), settings, scale };
    let mut totals = Totals::new(&hidden, backward.is_some());
    for chunk in &batch.chunks {
        let noisy_rows = if settings.global_weight > 0.0 { chunk.noisy_rows.as_slice() } else { &[] };
        let rows = totals.rows(&[chunk.rows.as_slice(), noisy_rows].concat());
        let anchor_logits = anchor.as_ref().map(|anchor| anchor.logits(&chunk.clean_rows));
        totals.add(&rows, head.chunk(&rows.hidden, anchor_logits, chunk)?);
    }
    if settings.local_weight > 0.0 {
        for LocalChunk { rows, next_rows } in &batch.local_chunks {
            let rows = totals.rows(rows);
            totals.add(&rows, head.local_chunk(&rows.hidden, frozen_logits(model, &hidden, next_rows))?);
        }
    }
    let Totals { d_hidden, sums, .. } = totals;
    if let (Some(d_hidden), Some(pass)) = (d_hidden, pass) {
        pass.backward(&d_hidden)?;
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

/// What a chunk of rows gives.
struct ChunkLosses {
    /// Sums over the rows; `None` for losses without a part in the chunk.
    sums: Losses<Option<Tensor>>,
    /// Gradient of the rows' hidden states, if one was asked for.
    d_rows: Option<Tensor>,
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

    fn rows(&self, indices: &[i64]) -> Rows {
        let indices = to_device(indices, self.hidden.device());
        Rows { hidden: self.hidden.index_select(0, &indices), indices }
    }

    /// Adds a chunk. Its rows are distinct, except that an empty prompt leaves the first two
    /// response tokens the same row.
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

/// The vocabulary projection and the losses after it.
struct LossHead<'v> {
    model: &'v Transformer,
    kernels: Option<&'v TrainKernels>,
    settings: &'v ConsistencySettings,
    /// Factor of each loss in the gradient; `None` without a backward.
    scale: Option<Losses<f64>>,
}

impl LossHead<'_> {
    /// The losses of a chunk, from the hidden states of its rows and then its noisy rows, and the
    /// frozen model's logits.
    fn chunk(&self, hidden: &Tensor, anchor_logits: Option<Tensor>, chunk: &Chunk) -> Result<ChunkLosses> {
        let num_rows = chunk.rows.len() as i64;
        let num_noisy_rows = hidden.size()[0] - num_rows;
        let Some(kernels) = self.kernels else {
            let labels = to_device(&chunk.labels, hidden.device());
            let targets = to_device(&chunk.noisy_targets, hidden.device());
            return Ok(self.with_autograd(hidden, |logits| {
                let log_probs = logits.log_softmax(-1, Kind::Float);
                let clean = log_probs.narrow(0, 0, num_rows);
                let is_labelled = labels.ne(NO_LABEL).unsqueeze(-1);
                let of_labels = clean.gather(1, &labels.clamp_min(0).unsqueeze(-1), false);
                let global = (num_noisy_rows > 0).then(|| {
                    let noisy = log_probs.narrow(0, num_rows, num_noisy_rows);
                    divergence(&clean.detach().index_select(0, &targets), &noisy, self.settings.divergence)
                });
                let anchor = anchor_logits
                    .map(|logits| divergence(&logits.log_softmax(-1, Kind::Float), &clean, Divergence::Forward));
                Losses { ar: Some(-(of_labels * is_labelled).sum(Kind::Float)), global, local: None, anchor }
            }));
        };
        let _no_grad = tch::no_grad_guard();
        let scale = self.scale.unwrap_or_default();
        let labels = Labels::new(&chunk.labels, self.model.config().vocab_size as usize, hidden.device())?;
        let targets = TargetRows::new(&chunk.noisy_targets, hidden.size()[0] as usize, hidden.device())?;
        let logits = kernels.logits(self.model.project(hidden))?;
        let mut sums = Losses::default();
        // This comes first: its targets are clean rows, which the cross-entropy turns into their
        // gradients.
        if num_noisy_rows > 0 {
            let (student, target) = ((&logits, num_rows as usize), (&logits, &targets));
            let per_row = kernels.divergence(student, target, self.settings.divergence.into(), scale.global)?;
            sums.global = Some(per_row.sum(Kind::Float));
        }
        let anchor_logits = anchor_logits.map(|logits| kernels.logits(logits)).transpose()?;
        let anchor = anchor_logits.as_ref().map(|logits| (logits, scale.anchor));
        let (ar, anchor) = kernels.cross_entropy(&logits, &labels, scale.ar, anchor)?;
        sums.ar = Some(ar.sum(Kind::Float));
        sums.anchor = anchor.map(|per_row| per_row.sum(Kind::Float));
        Ok(ChunkLosses { sums, d_rows: self.d_rows(hidden, &logits)? })
    }

    /// The local loss of a chunk, from the hidden states of its rows and the logits of their
    /// counterparts in the next state.
    fn local_chunk(&self, hidden: &Tensor, next_logits: Tensor) -> Result<ChunkLosses> {
        let Some(kernels) = self.kernels else {
            return Ok(self.with_autograd(hidden, |logits| {
                let (log_probs, target) =
                    (logits.log_softmax(-1, Kind::Float), next_logits.log_softmax(-1, Kind::Float));
                let local = divergence(&target, &log_probs, self.settings.divergence);
                Losses { local: Some(local), ..Losses::default() }
            }));
        };
        let _no_grad = tch::no_grad_guard();
        let scale = self.scale.unwrap_or_default();
        let (logits, next_logits) = (kernels.logits(self.model.project(hidden))?, kernels.logits(next_logits)?);
        let targets = TargetRows::identity(hidden.size()[0] as usize, hidden.device())?;
        let (student, target) = ((&logits, 0), (&next_logits, &targets));
        let per_row = kernels.divergence(student, target, self.settings.divergence.into(), scale.local)?;
        let sums = Losses { local: Some(per_row.sum(Kind::Float)), ..Losses::default() };
        Ok(ChunkLosses { sums, d_rows: self.d_rows(hidden, &logits)? })
    }

    /// Losses of logits, differentiated by autograd.
    fn with_autograd(&self, hidden: &Tensor, losses: impl FnOnce(Tensor) -> Losses<Option<Tensor>>) -> ChunkLosses {
        let hidden = hidden.detach().set_requires_grad(self.scale.is_some());
        let sums = losses(self.model.logits_with_grad(&hidden));
        let Some(scale) = self.scale else { return ChunkLosses { sums, d_rows: None } };
        let scaled = |(sum, scale): (&Option<Tensor>, f64)| sum.as_ref().map(|sum| sum * scale);
        sums.as_ref().zip(scale).into_array().into_iter().filter_map(scaled).sum::<Tensor>().backward();
        ChunkLosses { sums, d_rows: Some(hidden.grad()) }
    }

    /// The gradient of hidden states, and of the vocabulary projection, from logits that have
    /// become their own gradient.
    fn d_rows(&self, hidden: &Tensor, d_logits: &Logits) -> Result<Option<Tensor>> {
        self.scale.map(|_| train::project_backward(self.model, hidden, d_logits.values())).transpose()
    }
}

/// The frozen model's view of the clean part of a batch.
struct AnchorLogits<'m> {
    model: &'m Transformer,
    hidden: Tensor,
}

impl<'m> AnchorLogits<'m> {
    fn new(model: &'m Transformer, clean: &PackedBatch) -> Result<Self> {
        Ok(AnchorLogits { model, hidden: train::hidden_states(model, &DeviceBatch::new(clean, model)?)? })
    }

    fn logits(&self, rows: &[i64]) -> Tensor {
        frozen_logits(self.model, &self.hidden, rows)
    }
}

/// Logits `[rows, vocab]` of some rows of the hidden states, without gradients.
fn frozen_logits(model: &Transformer, hidden: &Tensor, rows: &[i64]) -> Tensor {
    tch::no_grad(|| model.project(&hidden.index_select(0, &to_device(rows, hidden.device()))))
}

fn to_device(numbers: &[i64], device: Device) -> Tensor {
    Tensor::from_slice(numbers).to_device(device)
}

impl From<Divergence> for kernels::Divergence {
    fn from(divergence: Divergence) -> Self {
        match divergence {
            Divergence::Forward => kernels::Divergence::ForwardKl,
            Divergence::Reverse => kernels::Divergence::ReverseKl,
            Divergence::Jsd => kernels::Divergence::JensenShannon,
        }
    }
}

/// The divergence of log-probabilities `[rows, vocab]` from their targets, summed over the rows.
pub fn divergence(target: &Tensor, student: &Tensor, divergence: Divergence) -> Tensor {
    let kl = |p: &Tensor, q: &Tensor| (p.exp() * (p - q)).sum(Kind::Float);
    match divergence {
        Divergence::Forward => kl(target, student),
        Divergence::Reverse => kl(student, target),
        Divergence::Jsd => {
            let middle = target.logaddexp(student) - std::f64::consts::LN_2;
            (kl(target, &middle) + kl(student, &middle)) * 0.5
        }
    }
}
