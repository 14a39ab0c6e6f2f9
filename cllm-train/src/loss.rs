//! The losses of one forward.

use cllm_core::model::Transformer;
use tch::{Kind, Tensor};

use crate::packing::Batch;
use crate::settings::{Consistency, Divergence};

/// Sums over tokens, float32 scalars with gradients.
pub struct Losses {
    /// Cross-entropy of the response tokens.
    pub ar: Tensor,
    /// Divergence at the noisy tokens.
    pub consistency: Tensor,
}

/// Both sums from one forward over the packed sequences.
pub fn losses(model: &Transformer, batch: &Batch, settings: &Consistency) -> Losses {
    let hidden = model.hidden(&batch.tokens, &batch.positions, Some(&batch.mask));
    let hidden = hidden.flatten(0, 1);
    let clean = model.train_logits(&hidden.index_select(0, &batch.clean_places));
    let ar = clean.cross_entropy_loss::<&Tensor>(&batch.labels, None, tch::Reduction::Sum, -100, 0.0);
    let consistency = if batch.counts.noisy == 0 || settings.weight == 0.0 {
        Tensor::zeros([], (Kind::Float, hidden.device()))
    } else {
        let noisy = model.train_logits(&hidden.index_select(0, &batch.noisy_places)).log_softmax(-1, Kind::Float);
        let target = clean.detach().index_select(0, &batch.noisy_targets).log_softmax(-1, Kind::Float);
        divergence(&target, &noisy, settings.divergence)
    };
    Losses { ar, consistency }
}

/// Sum over rows of the divergence between two log-distributions `[rows, vocab]`.
pub fn divergence(target: &Tensor, student: &Tensor, kind: Divergence) -> Tensor {
    let kl = |p: &Tensor, q: &Tensor| (p.exp() * (p - q)).sum(Kind::Float);
    match kind {
        Divergence::Forward => kl(target, student),
        Divergence::Reverse => kl(student, target),
        Divergence::Jsd => {
            let middle = target.logaddexp(student) - std::f64::consts::LN_2;
            (kl(target, &middle) + kl(student, &middle)) * 0.5
        }
    }
}
