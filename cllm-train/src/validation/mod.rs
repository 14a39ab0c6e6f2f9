//! What a run is judged by on held-out data.

pub(crate) mod best_checkpoint;
pub(crate) mod generation_probe;
mod losses;
