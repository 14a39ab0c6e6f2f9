//! Requests to the engine, and its answers.

use std::ops::AddAssign;

use super::sampling::Sampling;
use super::strategy::Strategy;
use crate::thought::{Thought, ThoughtLimit};
use crate::trajectory::{Block, FinishReason};
use crate::{Error, Result};

/// One prompt to answer.
#[derive(Debug, Clone)]
pub struct Request {
    /// Seeds the randomness of this request, so an answer does not depend on the batch it is
    /// decoded in.
    pub sample_id: String,
    /// Token ids, at least one.
    pub prompt_ids: Vec<i32>,
}

/// When an answer ends, and when its thought does.
#[derive(Debug, Clone)]
pub struct StopConditions {
    /// Maximum length of an answer, EOS included; at least 1 to decode.
    pub max_new_tokens: usize,
    /// Any of these ids ends an answer.
    pub eos_ids: Vec<i32>,
    /// `None`: a thought may be as long as the answer.
    pub thought_limit: Option<ThoughtLimit>,
}

impl StopConditions {
    /// Conditions without a limit on thoughts.
    pub fn new(max_new_tokens: usize, eos_ids: Vec<i32>) -> Self {
        StopConditions { max_new_tokens, eos_ids, thought_limit: None }
    }
}

/// How to decode a batch of requests.
#[derive(Debug, Clone, Copy)]
pub struct DecodeOptions {
    pub strategy: Strategy,
    /// Seeds the initial drafts and sampling above temperature 0.
    pub seed: u64,
    /// Keep every state of every block ([`Strategy::Jacobi`] only).
    pub record_trajectory: bool,
    pub sampling: Sampling,
}

impl DecodeOptions {
    /// Greedy decoding without trajectories.
    pub fn greedy(strategy: Strategy, seed: u64) -> Self {
        DecodeOptions { strategy, seed, record_trajectory: false, sampling: Sampling::Greedy }
    }
}

/// A request with how to answer it.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) request: Request,
    pub(super) stop: StopConditions,
    pub(super) options: DecodeOptions,
}

/// An answer and how it was decoded.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Token ids through EOS or the length limit.
    pub response_ids: Vec<i32>,
    pub finish_reason: FinishReason,
    /// Forwards of this sequence after prefill. Prefill covers all but the last prompt token, so
    /// autoregressive decoding needs exactly one forward per token.
    pub num_forwards: usize,
    /// Tokens that each forward decoded, in order. With the tokens that closed a thought at its
    /// limit, which were not decoded, they sum to the length of the answer.
    pub num_new_tokens: Vec<u32>,
    /// Tokens that all these forwards had for this sequence: its last token and draft tokens.
    pub num_window_tokens: u64,
    /// How many of these forwards were made larger by draft tokens although it was not known how
    /// long that takes, where the strategy chooses their number.
    pub num_probes: usize,
    /// How its thought ended. `None` without a limit on thoughts, or if it has no thought.
    pub thought: Option<Thought>,
    /// The trajectory, if it was asked for and the strategy decodes in fixed blocks; else empty.
    pub blocks: Vec<Block>,
    /// Time in forwards of its batch from its admission to its last token, so while its prompt and
    /// those of other requests were cached, too.
    pub timing: Timing,
}

impl Answer {
    /// Length of the answer without the tokens that closed its thought at the limit.
    pub fn num_decoded_tokens(&self) -> usize {
        self.num_new_tokens.iter().map(|&number| number as usize).sum()
    }
}

/// Called after each forward with the index of a request and the tokens that were added to its
/// answer.
pub type OnTokens<'f> = &'f mut dyn FnMut(usize, &[i32]);

/// How long a batch of answers took, or one of them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timing {
    /// Time in forwards that only cache prompts.
    pub prefill_seconds: f64,
    /// Time in all other forwards.
    pub decode_seconds: f64,
}

impl AddAssign for Timing {
    fn add_assign(&mut self, more: Timing) {
        self.prefill_seconds += more.prefill_seconds;
        self.decode_seconds += more.decode_seconds;
    }
}

/// Slots of the KV cache that one sequence needs: its prompt, its answer, and what a forward has past
/// the end of the answer.
pub fn required_slots(num_prompt_tokens: usize, stop: &StopConditions, strategy: Strategy) -> usize {
    num_prompt_tokens.saturating_add(stop.max_new_tokens).saturating_add(strategy.max_forwarded_tokens())
}

/// Checks that the prompt is not empty and fits the model's context together with its answer.
/// Callers use it to refuse a prompt set before a long run.
///
/// # Errors
/// [`Error::Usage`] that names the sample.
pub fn check_fits_context(request: &Request, stop: &StopConditions, max_positions: usize) -> Result<()> {
    let num_prompt_tokens = request.prompt_ids.len();
    let max_new_tokens = stop.max_new_tokens;
    if num_prompt_tokens == 0 {
        return Err(Error::usage(format!(
            "sample `{}` has an empty prompt; there is nothing to continue",
            request.sample_id
        )));
    }
    if num_prompt_tokens.saturating_add(max_new_tokens) > max_positions {
        return Err(Error::usage(format!(
            "sample `{}`: {num_prompt_tokens} prompt tokens and up to {max_new_tokens} new tokens do not fit the model's \
             context of {max_positions}; lower max_new_tokens or leave the sample out",
            request.sample_id
        )));
    }
    Ok(())
}
