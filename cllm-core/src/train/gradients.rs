//! Where a backward puts the gradients of the weights.

use std::ops::Range;

use crate::Result;

/// Weights whose gradients are complete at the same moment of a backward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelPart {
    /// The output projection. Where it is the embedding, it is no part of its own.
    LmHead,
    /// The matrices of a layer.
    Layer(usize),
    Embedding,
}

/// What a backward tells about its progress. It begins with [`ModelPart::LmHead`], and goes from the
/// last layer to the embedding.
pub trait GradientSink {
    /// The gradients of this part come next: its weights need a place for them.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], for instance when memory runs out.
    fn begin(&self, part: ModelPart) -> Result<()>;

    /// The backward of this batch adds nothing more to the gradients of this part.
    ///
    /// # Errors
    /// As [`Self::begin`]; [`crate::Error::Peer`] if another process has ended.
    fn complete(&self, part: ModelPart) -> Result<()>;
}

/// A buffer of all gradients always has a place for each.
impl GradientSink for crate::model::ParamBuffer {
    fn begin(&self, _: ModelPart) -> Result<()> {
        Ok(())
    }

    fn complete(&self, _: ModelPart) -> Result<()> {
        Ok(())
    }
}

/// The backward of layers to which a batch adds no gradients.
pub(super) fn complete_without_gradients(layers: Range<usize>, gradients: &dyn GradientSink) -> Result<()> {
    layers.rev().map(ModelPart::Layer).try_for_each(|layer| {
        gradients.begin(layer)?;
        gradients.complete(layer)
    })
}
