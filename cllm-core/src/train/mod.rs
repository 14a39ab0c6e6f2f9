//! Training forwards and backwards over packed batches.

mod cuda;
mod packed_batch;

pub(crate) use packed_batch::EagerStream;
pub use packed_batch::{DeviceStream, Pass, Seen, Stream};
