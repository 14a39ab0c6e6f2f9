//! How far a run has come: what a checkpoint holds besides the weights and the optimizer's state.

use serde::{Deserialize, Serialize};

use crate::run_fingerprint::RunFingerprint;
use crate::validation::best_checkpoint::BestCheckpointTracker;

/// Progress of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainState {
    /// Number of steps done.
    pub step: usize,
    /// Packed tokens trained on, without padding.
    pub num_tokens: usize,
    /// Noisy blocks trained on.
    pub num_blocks: usize,
    /// Steps skipped because a gradient was not finite.
    pub num_skipped_steps: usize,
    /// Seconds of training, over all parts of an interrupted run.
    pub seconds: f64,
    pub validation: BestCheckpointTracker,
    pub fingerprint: RunFingerprint,
}

impl TrainState {
    /// The state before the first step.
    pub fn initial(fingerprint: RunFingerprint) -> Self {
        TrainState {
            step: 0,
            num_tokens: 0,
            num_blocks: 0,
            num_skipped_steps: 0,
            seconds: 0.0,
            validation: BestCheckpointTracker::default(),
            fingerprint,
        }
    }
}
