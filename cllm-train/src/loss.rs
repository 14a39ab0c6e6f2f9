//! The losses of one forward.

use cllm_core::model::Transformer;
use tch::{Kind, Tensor};

use crate::packing::Batch;
use crate::settings::{Consistency, Divergence};

/// Sums over tokens, float32 scalars with gradients.
pub struct Losses {
    /// Cross-entropy of the response tokens.
    pub ar: Tensor,
    /// Divergence of the noisy tokens from the fixed point.
    pub global: Tensor,
    /// Divergence of the noisy tokens from the next state.
    pub local: Tensor,
}

/// Every sum from one forward over the packed sequences. Only the places that a loss needs reach the vocabulary.
pub fn losses(model: &Transformer, batch: &Batch, settings: &Consistency) -> Losses {
    let hidden = model.hidden(&batch.tokens, &batch.positions, Some(&batch.mask)).flatten(0, 1);
    let logits = |places: &Tensor| model.train_logits(&hidden.index_select(0, places));
    let log = |logits: Tensor| logits.log_softmax(-1, Kind::Float);
    let nothing = || Tensor::zeros([], (Kind::Float, hidden.device()));
    let clean = logits(&batch.clean_places);
    let global = if batch.counts.noisy == 0 || settings.weight == 0.0 {
        nothing()
    } else {
        let target = log(clean.detach().index_select(0, &batch.noisy_targets));
        divergence(&target, &log(logits(&batch.noisy_places)), settings.divergence)
    };
    let local = if batch.counts.local == 0 || settings.local_weight == 0.0 {
        nothing()
    } else {
        let target = tch::no_grad(|| log(logits(&batch.local_targets)));
        divergence(&target, &log(logits(&batch.local_places)), settings.divergence)
    };
    let ar = clean.cross_entropy_loss::<&Tensor>(&batch.labels, None, tch::Reduction::Sum, -100, 0.0);
    Losses { ar, global, local }
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
