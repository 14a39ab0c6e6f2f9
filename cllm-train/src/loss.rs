//! The losses of one forward.

use cllm_core::model::Transformer;
use tch::{Kind, Tensor};

use crate::packing::{Batch, NO_LABEL};
use crate::settings::{Consistency, Divergence};

/// Sums over tokens, float32 scalars with gradients.
pub struct Losses {
    /// Cross-entropy of the labels.
    pub ar: Tensor,
    /// Divergence of the noisy tokens from the fixed point.
    pub global: Tensor,
    /// Divergence of the noisy tokens from the next state.
    pub local: Tensor,
    /// KL of the response tokens from the frozen teacher.
    pub anchor: Tensor,
}

/// Every sum from one forward over the packed sequences, and one of the frozen teacher over their clean part where there is
/// one. Only the places that a loss needs reach the vocabulary.
pub fn losses(model: &Transformer, teacher: Option<&Transformer>, batch: &Batch, settings: &Consistency) -> Losses {
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
    let anchor = match teacher {
        None => nothing(),
        Some(teacher) => {
            divergence(&clean_distributions(teacher, batch), &log(clean.shallow_clone()), Divergence::Forward)
        }
    };
    let ar = clean.cross_entropy_loss::<&Tensor>(&batch.labels, None, tch::Reduction::Sum, NO_LABEL, 0.0);
    Losses { ar, global, local, anchor }
}

/// Log-probabilities `[clean, vocab]` for the response tokens, without gradients. Noisy blocks stand behind the clean part,
/// so that plain causal attention over the leading tokens is all it takes.
fn clean_distributions(model: &Transformer, batch: &Batch) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let (width, clean_width) = (batch.tokens.size()[1], batch.clean_width);
    let leading = |x: &Tensor| x.narrow(1, 0, clean_width);
    let hidden = model.hidden(&leading(&batch.tokens), &leading(&batch.positions), None).flatten(0, 1);
    let rows = batch.clean_places.divide_scalar_mode(width, "floor");
    let places = rows * clean_width + batch.clean_places.remainder(width);
    model.train_logits(&hidden.index_select(0, &places)).log_softmax(-1, Kind::Float)
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
