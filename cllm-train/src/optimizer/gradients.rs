//! The gradients of a step.

use std::rc::Rc;

use cllm_core::Result;
use cllm_core::distributed::ProcessGroup;
use cllm_core::model::{ParamBuffer, Transformer};
use cllm_core::train::{GradientSink, ShardedGradients};
use tch::Tensor;

/// Where the gradients of a step add up.
pub enum Gradients {
    /// All of this process's own. They are summed over the processes once, at the end of the step.
    Whole { own: ParamBuffer, group: Rc<ProcessGroup> },
    /// This process's shard of the sums over the processes (ZeRO stage 2).
    Sharded(ShardedGradients),
}

impl Gradients {
    /// Gradients of the trainable weights of a model, which collects them from now on.
    ///
    /// # Errors
    /// [`cllm_core::Error::Torch`], for example when memory runs out.
    pub fn new(model: &Transformer, group: Rc<ProcessGroup>, is_sharded: bool) -> Result<Self> {
        Ok(match is_sharded {
            true => Gradients::Sharded(ShardedGradients::new(model, group)?),
            false => Gradients::Whole { own: model.collect_gradients()?, group },
        })
    }

    /// Where a backward adds to them.
    pub fn sink(&self) -> &dyn GradientSink {
        match self {
            Gradients::Whole { own, .. } => own,
            Gradients::Sharded(sharded) => sharded,
        }
    }

    /// Called for a batch that other processes train on and this one does not.
    ///
    /// # Errors
    /// libtorch's errors, a process that has died.
    pub fn add_nothing(&self) -> Result<()> {
        match self {
            Gradients::Whole { .. } => Ok(()),
            Gradients::Sharded(sharded) => sharded.add_nothing(),
        }
    }

    /// This process's shard `[elements]` of the sums over all processes.
    ///
    /// # Errors
    /// libtorch's errors, a process that has died.
    pub fn sums(&self) -> Result<Tensor> {
        match self {
            Gradients::Whole { own, group } => group.reduce_scatter(own.buffer()),
            Gradients::Sharded(sharded) => Ok(sharded.sums()?.shallow_clone()),
        }
    }

    /// Sets all of them to zero, for the next step.
    pub fn clear(&self) {
        match self {
            Gradients::Whole { own, .. } => drop(own.buffer().shallow_clone().zero_()),
            Gradients::Sharded(sharded) => sharded.clear(),
        }
    }
}
