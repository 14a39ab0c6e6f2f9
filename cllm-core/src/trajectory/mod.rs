//! Jacobi trajectories: the Parquet schema, its writer and reader; the contract between the programs.

use serde::{Deserialize, Serialize};

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// An EOS token, which is the last of the response.
    Eos,
    /// The length limit.
    Length,
}

/// One n-token block and how it converged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// Position of its first token in the response.
    pub start: u32,
    /// Every Jacobi state, from the initial guess to the fixed point; each exactly n tokens long.
    pub states: Vec<Vec<i32>>,
}

/// One response and its trajectory: a row of the data set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trajectory {
    /// Id from the prompt set.
    pub sample_id: String,
    /// Benchmark and split.
    pub source: String,
    /// The rendered prompt.
    pub prompt: String,
    /// Its tokens.
    pub prompt_ids: Vec<i32>,
    /// The fixed points joined, through EOS or the length limit.
    pub response_ids: Vec<i32>,
    /// The data set's own answer.
    pub reference: Option<String>,
    /// Per n-token block.
    pub blocks: Vec<Block>,
    /// Which states `augment` changed, per block.
    pub augmented: Option<Vec<Vec<bool>>>,
    /// Why the response ended.
    pub finish_reason: FinishReason,
    /// JSON text of what the task needs to score the answer.
    pub meta: Option<String>,
}
