//! Decoding: autoregressive and Jacobi behind one engine. Autoregressive decoding is Jacobi decoding with n = 1.

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::model::Transformer;
use crate::trajectory::{Block, FinishReason};

/// How tokens are chosen and verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// One token a forward.
    Ar,
    /// Fixed blocks of n tokens, iterated to their fixed point (Song et al., arXiv 2002.03629; CLLM, 2403.00835).
    Jacobi {
        /// Tokens of a block, at least 2.
        n: usize,
    },
}

/// One prompt to answer.
#[derive(Debug, Clone)]
pub struct Request {
    /// Names the randomness of the first guesses.
    pub sample_id: String,
    /// Token ids, at least one.
    pub prompt_ids: Vec<i32>,
}

/// When an answer ends.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most tokens of an answer, EOS included.
    pub max_new_tokens: usize,
    /// Ids that end an answer.
    pub eos_ids: Vec<i32>,
}

/// An answer and how it came.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Token ids through EOS or the limit.
    pub response_ids: Vec<i32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Forwards of this row after prefill; prefill covers all but the last prompt token, so autoregressive decoding
    /// needs exactly one forward a token.
    pub forwards: usize,
    /// Tokens that each forward made final, in order (cut at the end of the answer); they sum to the response.
    pub accepted: Vec<u32>,
    /// The trajectory, when it was asked for.
    pub blocks: Vec<Block>,
}

/// What a batch of answers took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timing {
    /// Seconds of the prompts' forward.
    pub prefill_seconds: f64,
    /// Seconds of everything after it.
    pub decode_seconds: f64,
}

/// Tokens that became final in one forward of one row, for those who watch: row index and the new tokens.
pub type Watcher<'w> = &'w mut dyn FnMut(usize, &[i32]);

/// Options of one call of [`decode`].
#[derive(Debug, Clone, Copy)]
pub struct DecodeOptions {
    /// How.
    pub strategy: Strategy,
    /// Seed of the first guesses.
    pub seed: u64,
    /// Keep the trajectory of each block.
    pub record: bool,
}

/// Answers all requests as one batch, each row at its own position and finishing on its own.
///
/// # Errors
/// [`crate::Error::Usage`] when a prompt and its answer do not fit the model's context; libtorch's errors; interruption.
pub fn decode(
    model: &Transformer,
    requests: &[Request],
    limits: &Limits,
    options: DecodeOptions,
    watcher: Option<Watcher<'_>>,
) -> Result<(Vec<Answer>, Timing)> {
    let _ = (model, requests, limits, options, watcher);
    todo!()
}
