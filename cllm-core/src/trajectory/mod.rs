//! Jacobi trajectories: the Parquet schema, its writer and reader; the contract between the programs.

mod profile;
mod reader;
mod schema;
mod writer;

use serde::{Deserialize, Serialize};

pub use profile::Profile;
pub use reader::{INCOMPLETE_DATA_SET, Reader, RowChunk, Rows, fingerprint, rank_folder};
pub use schema::SCHEMA_VERSION;
pub use writer::{Manifest, Writer};

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

/// How a data set came to be; stands in the metadata of every shard and in the manifest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// Fingerprint of the teacher's config and weights.
    pub teacher: String,
    /// Fingerprint of its tokenizer.
    pub tokenizer: String,
    /// Ids of the teacher's vocabulary.
    pub vocab_size: usize,
    /// Tokens of a block.
    pub n: usize,
    /// Most tokens of a response.
    pub max_new_tokens: usize,
    /// Ids that end a response.
    pub eos_ids: Vec<i32>,
    /// Seed of the first guesses.
    pub seed: u64,
    /// Fingerprint of the prompts.
    pub prompts: String,
    /// Version of the toolkit that collected it.
    pub toolkit: String,
    /// What `augment` and `clean` did since, in order.
    pub steps: Vec<String>,
}

impl Trajectory {
    /// Checks what every row promises.
    ///
    /// # Errors
    /// The first promise that is broken, in words.
    pub fn check(&self, provenance: &Provenance) -> Result<(), String> {
        let length = self.response_ids.len();
        if length > provenance.max_new_tokens {
            let most = provenance.max_new_tokens;
            return Err(format!("the response has {length} tokens, and max_new_tokens was {most}"));
        }
        let mut joined: Vec<i32> = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            if block.start as usize != joined.len() {
                return Err(format!("block {index} starts at {}, expected {}", block.start, joined.len()));
            }
            if joined.len() >= length {
                return Err(format!("block {index} starts at {}, past the response of {length} tokens", block.start));
            }
            if let Some(state) = block.states.iter().find(|state| state.len() != provenance.n) {
                return Err(format!("block {index} has a state of {} tokens, expected {}", state.len(), provenance.n));
            }
            let fixed_point = block.states.last().ok_or_else(|| format!("block {index} has no states"))?;
            joined.extend(fixed_point);
        }
        if joined.len() < length || joined[..length] != self.response_ids {
            return Err("the fixed points joined are not the response".to_owned());
        }
        let states = self.blocks.iter().flat_map(|block| block.states.iter().flatten());
        let mut ids = self.prompt_ids.iter().chain(&self.response_ids).chain(states);
        if let Some(id) = ids.find(|&&id| id < 0 || id as usize >= provenance.vocab_size) {
            return Err(format!("token {id} is outside the vocabulary of {}", provenance.vocab_size));
        }
        let ends = self.response_ids.last().is_some_and(|last| provenance.eos_ids.contains(last));
        if ends != (self.finish_reason == FinishReason::Eos) {
            return Err(format!("finish_reason is {:?}, but the last token says otherwise", self.finish_reason));
        }
        let before_last = &self.response_ids[..length.saturating_sub(1)];
        if let Some(place) = before_last.iter().position(|id| provenance.eos_ids.contains(id)) {
            return Err(format!("token {place} of the response ends it, and {} follow", length - 1 - place));
        }
        let shape = |flags: &Vec<Vec<bool>>| {
            flags.len() == self.blocks.len()
                && flags.iter().zip(&self.blocks).all(|(flags, block)| flags.len() == block.states.len())
        };
        if self.augmented.as_ref().is_some_and(|flags| !shape(flags)) {
            return Err("`augmented` has not one flag a state".to_owned());
        }
        Ok(())
    }
}
