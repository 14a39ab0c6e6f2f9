//! What runs a forward.

pub(crate) mod cuda_graph;
mod cuda_model;
pub(crate) mod eager;
pub(crate) mod speculative;
