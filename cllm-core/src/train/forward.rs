//! The training pass over a packed batch, with whichever implementation supports the model.

use tch::Tensor;

use super::cuda::{CudaBatch, CudaPass};
use super::eager::{EagerBatch, EagerPass};
use super::gradients::GradientSink;
use super::packed_batch::PackedBatch;
use crate::Result;
use crate::cuda::train::TrainKernels;
use crate::model::Transformer;

/// A packed batch on the device of a model.
pub struct DeviceBatch(Batch);

enum Batch {
    Cuda(Box<CudaBatch>),
    Eager(EagerBatch),
}

impl DeviceBatch {
    /// Copies a batch to the device of `model`.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] when kernels do not compile or memory runs out.
    pub fn new(batch: &PackedBatch, model: &Transformer) -> Result<Self> {
        Ok(DeviceBatch(match CudaBatch::new(batch, model)? {
            Some(batch) => Batch::Cuda(Box::new(batch)),
            None => Batch::Eager(EagerBatch::new(batch, model)),
        }))
    }

    /// Our own kernels, if they compute this batch.
    pub fn kernels(&self) -> Option<&TrainKernels> {
        match &self.0 {
            Batch::Cuda(batch) => Some(batch.kernels()),
            Batch::Eager(_) => None,
        }
    }
}

/// A forward with everything that its backward needs.
pub struct ForwardPass<'p> {
    /// Final hidden states, after the last norm, `[tokens, hidden]`.
    pub hidden: Tensor,
    pass: Pass<'p>,
}

enum Pass<'p> {
    Cuda(CudaPass<'p>),
    Eager(EagerPass<'p>),
}

/// Runs the forward over a batch. Of the leading `checkpointed_layers`, only the inputs are saved;
/// the backward computes these layers again, one at a time (Chen et al., arXiv 1604.06174).
///
/// # Errors
/// [`crate::Error::Torch`], for instance when memory runs out.
pub fn forward<'p>(
    model: &'p Transformer,
    batch: &'p DeviceBatch,
    checkpointed_layers: usize,
) -> Result<ForwardPass<'p>> {
    match &batch.0 {
        Batch::Cuda(batch) => {
            let (hidden, pass) = batch.forward(model, checkpointed_layers)?;
            Ok(ForwardPass { hidden, pass: Pass::Cuda(pass) })
        }
        Batch::Eager(batch) => {
            let (hidden, pass) = batch.forward(model, checkpointed_layers);
            Ok(ForwardPass { hidden, pass: Pass::Eager(pass) })
        }
    }
}

/// Final hidden states of a batch, `[tokens, hidden]`, without anything saved for a backward.
///
/// # Errors
/// [`crate::Error::Torch`], for instance when memory runs out.
pub fn hidden_states(model: &Transformer, batch: &DeviceBatch) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    match &batch.0 {
        Batch::Cuda(batch) => batch.hidden_states(model),
        Batch::Eager(batch) => Ok(batch.forward(model, 0).0),
    }
}

impl ForwardPass<'_> {
    /// Adds to the gradients of the weights, for which `gradients` has a place. `d_hidden`: the
    /// gradient of the hidden states, of their shape.
    ///
    /// # Errors
    /// [`crate::Error::Torch`], for instance when memory runs out.
    pub fn backward(self, d_hidden: &Tensor, gradients: &dyn GradientSink) -> Result<()> {
        match self.pass {
            Pass::Cuda(pass) => pass.backward(d_hidden, gradients),
            Pass::Eager(pass) => pass.backward(self.hidden, d_hidden, gradients),
        }
    }
}
