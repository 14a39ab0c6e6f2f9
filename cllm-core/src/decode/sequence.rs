//! A sequence: one request that is being answered, its tokens so far and the proposer of its
//! drafts.

use super::acceptance::accepted_path;
use super::backend::{Predictions, Window};
use super::proposer::random_draft::RandomDraft;
use super::proposer::{Proposer, Verification};
use super::request::{Answer, DecodeOptions, Request, StopConditions};
use crate::fingerprint;
use crate::trajectory::FinishReason;

/// What a forward added to a sequence.
pub(super) struct Accepted<'s> {
    pub(super) request_index: usize,
    /// The new tokens of the answer.
    pub(super) tokens: &'s [i32],
    /// Pairs of cache slots, from and to, between which keys and values must move so that the slot
    /// of each token is its position.
    pub(super) moves: Vec<(usize, usize)>,
}

pub(super) struct Sequence<'r> {
    request_index: usize,
    stop: &'r StopConditions,
    /// Prompt and answer so far.
    tokens: Vec<i32>,
    num_prompt_tokens: usize,
    /// Prompt tokens in the cache.
    num_cached: usize,
    proposer: Box<dyn Proposer>,
    /// Key of the noise that tokens are sampled with.
    sequence_key: u64,
    num_new_tokens: Vec<u32>,
    finish_reason: Option<FinishReason>,
}

impl<'r> Sequence<'r> {
    pub(super) fn new(
        request_index: usize,
        request: Request,
        stop: &'r StopConditions,
        options: DecodeOptions,
    ) -> Self {
        let random = RandomDraft::new(options.seed, &request.sample_id);
        Sequence {
            request_index,
            stop,
            num_prompt_tokens: request.prompt_ids.len(),
            num_cached: 0,
            proposer: options.strategy.proposer(&request.prompt_ids, random, options.record_trajectory),
            sequence_key: fingerprint::derive_seed(options.seed, &request.sample_id),
            tokens: request.prompt_ids,
            num_new_tokens: Vec::new(),
            finish_reason: (stop.max_new_tokens == 0).then_some(FinishReason::Length),
        }
    }

    pub(super) fn request_index(&self) -> usize {
        self.request_index
    }

    /// Prompt tokens that are in the cache.
    pub(super) fn num_cached(&self) -> usize {
        self.num_cached
    }

    /// The part of the prompt that must be cached before decoding: all but its last token, which
    /// begins the first window.
    pub(super) fn uncached_prompt(&self) -> &[i32] {
        &self.tokens[self.num_cached..self.num_prompt_tokens - 1]
    }

    pub(super) fn add_cached(&mut self, num_tokens: usize) {
        self.num_cached += num_tokens;
    }

    pub(super) fn is_decoding(&self) -> bool {
        self.uncached_prompt().is_empty()
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finish_reason.is_some()
    }

    /// The window of the next forward: the last token and the draft.
    pub(super) fn window(&self) -> Window<'_> {
        let start = self.tokens.len() - 1;
        Window {
            start,
            last_token: self.tokens[start],
            draft: self.proposer.draft(),
            tree: self.proposer.tree(),
            sequence_key: self.sequence_key,
        }
    }

    /// Processes the tokens that the backend sampled after each token of the window: appends the
    /// accepted draft tokens and the token sampled after the last of them, up to the end of the
    /// answer, and has the proposer make the next draft.
    pub(super) fn accept(&mut self, predictions: &Predictions) -> Accepted<'_> {
        let predicted = &predictions.tokens;
        let path = accepted_path(&self.window(), predicted);
        let (num_before, num_accepted) = (self.tokens.len(), path.len() - 1);
        for &offset in &path {
            self.tokens.push(predicted[offset]);
            self.finish_reason = self.finish_reason_after(predicted[offset]);
            if self.is_finished() {
                break;
            }
        }
        let num_new = self.tokens.len() - num_before;
        self.num_new_tokens.push(num_new as u32);
        self.proposer.update(&Verification {
            predicted,
            proposed: predictions.drafted.as_ref().unwrap_or(predicted),
            num_accepted,
            tokens: &self.tokens,
            is_truncated: num_new < num_accepted + 1,
        });
        let start = num_before - 1;
        let misplaced = path.into_iter().enumerate().filter(|(depth, offset)| depth != offset);
        Accepted {
            request_index: self.request_index,
            tokens: &self.tokens[num_before..],
            moves: misplaced.map(|(depth, offset)| (start + offset, start + depth)).collect(),
        }
    }

    fn finish_reason_after(&self, token: i32) -> Option<FinishReason> {
        if self.stop.eos_ids.contains(&token) {
            Some(FinishReason::Eos)
        } else if self.answer().len() >= self.stop.max_new_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    fn answer(&self) -> &[i32] {
        &self.tokens[self.num_prompt_tokens..]
    }

    pub(super) fn into_answer(self) -> Answer {
        Answer {
            response_ids: self.answer().to_vec(),
            finish_reason: self.finish_reason.unwrap_or(FinishReason::Length),
            num_forwards: self.num_new_tokens.len(),
            num_new_tokens: self.num_new_tokens,
            blocks: self.proposer.into_blocks(),
        }
    }
}
