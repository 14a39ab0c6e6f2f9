//! From data sets to batches on the host. `dataset` reads examples, `schedule` decides which
//! examples make which step, `packing` turns an example into one sequence of tokens, `batch` joins
//! sequences and notes what each loss needs of them, and `loader` does both on a thread ahead of
//! training. Nothing here touches a device.

pub mod batch;
pub mod dataset;
pub(crate) mod loader;
pub mod packing;
pub mod schedule;
mod state_sampling;
