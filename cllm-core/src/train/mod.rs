//! Forward and backward passes of training over packed batches.
//!
//! [`forward()`] runs a batch and [`ForwardPass::backward`] adds to the gradients of the weights.
//! Both have two implementations: `cuda.rs`, by hand with kernels of our own, and `eager.rs`, with
//! libtorch's operations and autograd, for the CPU and for models that the kernels do not support.

mod cuda;
#[cfg(test)]
mod draft_gradient_tests;
mod eager;
mod forward;
mod gradients;
mod linear;
mod packed_batch;
mod sharded_gradients;

pub use crate::cuda::block_mask::AttentionRanges;
pub use cuda::{project_backward, slow_path_reason, slow_path_reason_on};
pub use eager::max_bias_elements;
pub use forward::{DeviceBatch, ForwardPass, forward, hidden_states};
pub use gradients::{GradientSink, ModelPart};
pub use packed_batch::PackedBatch;
pub use sharded_gradients::ShardedGradients;
