//! From data sets to batches on the host. `dataset` reads examples, `schedule` assigns them to
//! steps, `division` divides a step among processes, `packing` turns an example into one sequence of
//! tokens, `batch` joins sequences and notes which rows each loss needs, and `loader` packs and joins
//! on a thread ahead of training. Nothing here touches a device.

pub mod batch;
pub mod dataset;
pub(crate) mod division;
pub(crate) mod loader;
pub mod packing;
pub mod schedule;
mod state_sampling;
mod turns;
