//! The losses with our CUDA kernels, which turn the student's logits into their own gradient in
//! place.

use cllm_core::Result;
use cllm_core::cuda::train::{self as kernels, Labels, Logits, TargetRows, TrainKernels};
use cllm_core::train::project_backward;
use tch::{Kind, Tensor};

use crate::data::batch::Chunk;
use crate::loss::block_weights::BlockWeights;
use crate::loss::head::{ChunkLosses, FrozenRows, LossHead};
use crate::losses::Losses;
use crate::settings::Divergence;

/// As `eager::chunk_losses`.
pub fn chunk_losses(
    head: &LossHead<'_>,
    kernels: &TrainKernels,
    hidden: &Tensor,
    anchor: Option<&FrozenRows<'_>>,
    chunk: &Chunk,
    weights: Option<&BlockWeights>,
) -> Result<ChunkLosses> {
    let _no_grad = tch::no_grad_guard();
    let (num_rows, num_all_rows) = (chunk.rows.len(), hidden.size()[0] as usize);
    let scale = head.scale.unwrap_or_default();
    let labels = Labels::new(&chunk.labels, head.model.config().vocab_size as usize, hidden.device())?;
    let targets = TargetRows::new(&chunk.noisy_targets, num_rows, hidden.device())?;
    let logits = kernels.logits(hidden, &head.model.padded_lm_head()?)?;
    let frozen = anchor.map(|rows| kernels.logits(&rows.hidden, &rows.model.padded_lm_head()?)).transpose()?;
    let (frozen_targets, anchor) =
        if head.has_frozen_targets { (frozen.as_ref(), None) } else { (None, frozen.as_ref()) };
    let mut sums = Losses::default();
    // The global loss comes first: its targets are clean rows, which the cross-entropy turns into
    // their gradients.
    if num_all_rows > num_rows {
        let (student, target) = ((&logits, num_rows), (frozen_targets.unwrap_or(&logits), &targets));
        let noisy = |rows: &Tensor| rows.narrow(0, num_rows as i64, (num_all_rows - num_rows) as i64);
        let weights = weights.map(|weights| weights.of_rows(&noisy(&logits.values()), &noisy(logits.logsumexps())));
        let divergence = head.divergence.into();
        let per_row = kernels.divergence(student, target, divergence, scale.global, weights.as_ref())?;
        sums.global =
            Some(weights.map_or_else(|| per_row.shallow_clone(), |weights| weights * &per_row).sum(Kind::Float));
    }
    let anchor = anchor.map(|logits| (logits, scale.anchor));
    let (ar, anchor) = kernels.cross_entropy(&logits, &labels, scale.ar, anchor)?;
    sums.ar = Some(ar.sum(Kind::Float));
    sums.anchor = anchor.map(|per_row| per_row.sum(Kind::Float));
    Ok(ChunkLosses { sums, d_rows: d_rows(head, hidden, &logits)? })
}

/// As `eager::local_losses`.
pub fn local_losses(
    head: &LossHead<'_>,
    kernels: &TrainKernels,
    hidden: &Tensor,
    next_rows: &FrozenRows<'_>,
) -> Result<ChunkLosses> {
    let _no_grad = tch::no_grad_guard();
    let scale = head.scale.unwrap_or_default();
    let logits = kernels.logits(hidden, &head.model.padded_lm_head()?)?;
    let next_logits = kernels.logits(&next_rows.hidden, &next_rows.model.padded_lm_head()?)?;
    let targets = TargetRows::identity(hidden.size()[0] as usize, hidden.device())?;
    let (student, target) = ((&logits, 0), (&next_logits, &targets));
    let per_row = kernels.divergence(student, target, head.divergence.into(), scale.local, None)?;
    let sums = Losses { local: Some(per_row.sum(Kind::Float)), ..Losses::default() };
    Ok(ChunkLosses { sums, d_rows: d_rows(head, hidden, &logits)? })
}

/// Returns the gradient of hidden states, given logits that have become their own gradient. Adds
/// the gradient of the vocabulary projection to the model's gradients.
fn d_rows(head: &LossHead<'_>, hidden: &Tensor, d_logits: &Logits) -> Result<Option<Tensor>> {
    head.scale.map(|_| project_backward(head.model, hidden, d_logits)).transpose()
}

impl From<Divergence> for kernels::Divergence {
    fn from(divergence: Divergence) -> Self {
        match divergence {
            Divergence::Forward => kernels::Divergence::ForwardKl,
            Divergence::Reverse => kernels::Divergence::ReverseKl,
            Divergence::Jsd => kernels::Divergence::JensenShannon,
            Divergence::Nla => kernels::Divergence::NegLogAcceptance,
            Divergence::LkHybrid => kernels::Divergence::LkHybrid,
        }
    }
}
