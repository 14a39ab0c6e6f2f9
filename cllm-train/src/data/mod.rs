//! From data sets to packed batches.

pub mod dataset;
pub(crate) mod loader;
pub mod packing;
pub mod schedule;
mod state_sampling;
