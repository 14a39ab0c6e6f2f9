//! Training forwards and backwards over packed batches.

mod cuda;
mod packed_batch;

pub use cuda::{has_kernels, project_backward};
pub(crate) use packed_batch::EagerBatch;
pub use packed_batch::{AttentionRanges, DeviceBatch, ForwardPass, PackedBatch, forward, hidden_states};
