//! The losses in libtorch's operations, on any device. Autograd differentiates them.

use tch::{Kind, Tensor};

use crate::data::batch::{Chunk, NO_LABEL};
use crate::loss::block_weights::BlockWeights;
use crate::loss::head::{ChunkLosses, FrozenRows, LossHead};
use crate::losses::Losses;
use crate::settings::Divergence;

/// Keeps logarithms of acceptance rates finite.
const MIN_ACCEPTANCE: f64 = 1e-30;

/// The autoregressive, global and anchor losses of a chunk, from the hidden states of its rows and
/// then its noisy rows, and those of the frozen model.
pub fn chunk_losses(
    head: &LossHead<'_>,
    hidden: &Tensor,
    anchor: Option<&FrozenRows<'_>>,
    chunk: &Chunk,
    weights: Option<&BlockWeights>,
) -> ChunkLosses {
    let to_device = |numbers: &[i64]| Tensor::from_slice(numbers).to_device(hidden.device());
    let (labels, targets) = (to_device(&chunk.labels), to_device(&chunk.noisy_targets));
    let num_rows = chunk.rows.len() as i64;
    let num_noisy_rows = hidden.size()[0] - num_rows;
    let frozen = anchor.map(|rows| rows.logits().log_softmax(-1, Kind::Float));
    let (frozen_targets, anchor) = if head.has_frozen_targets { (frozen, None) } else { (None, frozen) };
    with_autograd(head, hidden, |logits| {
        let log_probs = logits.log_softmax(-1, Kind::Float);
        let clean = log_probs.narrow(0, 0, num_rows);
        let is_labelled = labels.ne(NO_LABEL).unsqueeze(-1);
        let label_log_probs = clean.gather(1, &labels.clamp_min(0).unsqueeze(-1), false);
        let ar = -(label_log_probs * is_labelled).sum(Kind::Float);
        let global = (num_noisy_rows > 0).then(|| {
            let noisy = log_probs.narrow(0, num_rows, num_noisy_rows);
            let target = frozen_targets.unwrap_or_else(|| clean.detach()).index_select(0, &targets);
            let per_row = divergence(&target, &noisy, head.divergence);
            // The logsumexp of log-probabilities is 0.
            let weights = weights.map(|weights| tch::no_grad(|| weights.of_rows(&noisy, &per_row.zeros_like())));
            weights.map_or_else(|| per_row.shallow_clone(), |weights| weights * &per_row).sum(Kind::Float)
        });
        let anchor = anchor.map(|target| divergence(&target, &clean, Divergence::Forward).sum(Kind::Float));
        Losses { ar: Some(ar), global, local: None, anchor }
    })
}

/// The local loss of a chunk, from the hidden states of its rows and of their counterparts in the
/// next state.
pub fn local_losses(head: &LossHead<'_>, hidden: &Tensor, next_rows: &FrozenRows<'_>) -> ChunkLosses {
    with_autograd(head, hidden, |logits| {
        let log_probs = logits.log_softmax(-1, Kind::Float);
        let target = next_rows.logits().log_softmax(-1, Kind::Float);
        let local = divergence(&target, &log_probs, head.divergence).sum(Kind::Float);
        Losses { local: Some(local), ..Losses::default() }
    })
}

/// The divergence of log-probabilities `[rows, vocab]` from their targets, for each row.
pub fn divergence(target: &Tensor, student: &Tensor, divergence: Divergence) -> Tensor {
    let sum = |terms: Tensor| terms.sum_dim_intlist([-1i64].as_slice(), false, Kind::Float);
    let kl = |p: &Tensor, q: &Tensor| sum(p.exp() * (p - q));
    let acceptance = || sum(target.minimum(student).exp()).clamp_min(MIN_ACCEPTANCE);
    match divergence {
        Divergence::Forward => kl(target, student),
        Divergence::Reverse => kl(student, target),
        Divergence::Jsd => {
            let middle = target.logaddexp(student) - std::f64::consts::LN_2;
            (kl(target, &middle) + kl(student, &middle)) * 0.5
        }
        Divergence::Nla => -acceptance().log(),
        Divergence::LkHybrid => {
            let acceptance = acceptance();
            let kl_weight = (acceptance.detach() * -3.0).exp();
            &kl_weight * kl(target, student) + (1.0 - &kl_weight) * (1.0 - acceptance)
        }
    }
}

/// Computes losses from the logits of hidden states and, if there is a backward, the gradient of
/// the hidden states.
fn with_autograd(
    head: &LossHead<'_>,
    hidden: &Tensor,
    losses: impl FnOnce(Tensor) -> Losses<Option<Tensor>>,
) -> ChunkLosses {
    let hidden = hidden.detach().set_requires_grad(head.scale.is_some());
    let sums = losses(head.model.logits_with_grad(&hidden));
    let Some(scale) = head.scale else { return ChunkLosses { sums, d_rows: None } };
    let scaled = |(sum, scale): (&Option<Tensor>, f64)| sum.as_ref().map(|sum| sum * scale);
    sums.as_ref().zip(scale).into_array().into_iter().filter_map(scaled).sum::<Tensor>().backward();
    ChunkLosses { sums, d_rows: Some(hidden.grad()) }
}
