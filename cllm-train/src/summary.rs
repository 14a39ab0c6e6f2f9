//! summary.json: what a finished run did.

use std::path::{Path, PathBuf};

use cllm_core::{Result, atomic_file};
use serde::Serialize;
use serde_json::Value;

use crate::settings::Objective;
use crate::validation::best_checkpoint::{BestCheckpoint, BestCheckpointTracker};
use crate::validation::metrics::GenerationMetrics;

/// Name of the file in the folder of a run.
pub const SUMMARY_FILE: &str = "summary.json";

/// What a finished run did; docs/data-format.md describes the fields.
#[derive(Debug, Serialize)]
pub struct Summary {
    pub schema_version: u32,
    pub objective: Objective,
    pub parameters: i64,
    pub trained_parameters: i64,
    pub steps: usize,
    pub skipped_steps: usize,
    pub tokens: usize,
    pub blocks: usize,
    pub seconds: f64,
    pub tokens_per_second: f64,
    pub blocks_per_second: f64,
    /// The last line of metrics.jsonl about training.
    pub final_losses: Value,
    /// Whether the run ended before its last step because validation brought no new best
    /// checkpoint.
    pub stopped_early: bool,
    pub validation: ValidationSummary,
    /// `None` on the CPU.
    pub peak_memory_bytes: Option<u64>,
    /// Folder of the final model.
    pub model: PathBuf,
}

/// Answers to the validation prompts; `None` without prompts.
#[derive(Debug, Serialize)]
pub struct ValidationSummary {
    initial: Option<GenerationMetrics>,
    last: Option<GenerationMetrics>,
    best: Option<BestCheckpoint>,
}

impl Summary {
    /// # Errors
    /// File-system errors.
    pub fn write(&self, run: &Path) -> Result<()> {
        atomic_file::write_json(&run.join(SUMMARY_FILE), self)
    }
}

impl From<BestCheckpointTracker> for ValidationSummary {
    fn from(BestCheckpointTracker { initial, last, best, .. }: BestCheckpointTracker) -> Self {
        ValidationSummary { initial, last, best }
    }
}
