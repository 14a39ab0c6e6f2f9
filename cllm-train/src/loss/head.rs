//! The inputs and outputs that both implementations of the losses share.

use cllm_core::model::Transformer;
use tch::Tensor;

use crate::losses::Losses;
use crate::settings::Divergence;

/// The vocabulary projection of a model, and how losses are computed from its logits.
pub struct LossHead<'m> {
    pub model: &'m Transformer,
    /// Divergence of the global and local losses.
    pub divergence: Divergence,
    /// Whether the targets of the global loss are the frozen model's predictions, and there is no
    /// anchor loss.
    pub has_frozen_targets: bool,
    /// Factor of each loss in the gradient; `None` without a backward.
    pub scale: Option<Losses<f64>>,
}

/// Hidden states of rows whose logits need no gradient.
pub struct FrozenRows<'m> {
    pub model: &'m Transformer,
    /// `[rows, hidden]`.
    pub hidden: Tensor,
}

impl FrozenRows<'_> {
    /// `[rows, vocab]`.
    pub fn logits(&self) -> Tensor {
        tch::no_grad(|| self.model.project(&self.hidden))
    }
}

/// The losses of a chunk of rows.
pub struct ChunkLosses {
    /// Sums over the rows; `None` for a loss that is not computed from these rows.
    pub sums: Losses<Option<Tensor>>,
    /// Gradient of the rows' hidden states, if there is a backward.
    pub d_rows: Option<Tensor>,
}
