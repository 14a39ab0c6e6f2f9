//! A sequence: one request that is being answered, its tokens so far and the proposer of its
//! drafts.

use std::ops::Range;

use super::acceptance::accepted_path;
use super::backend::{Predictions, Window};
use super::proposer::random_draft::RandomDraft;
use super::proposer::{Proposer, Verification};
use super::request::{Answer, DecodeOptions, Request, StopConditions, Timing};
use super::sampling::Sampling;
use super::window_chooser::{Outcome, Prospects};
use crate::fingerprint;
use crate::thought::Thought;
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

pub(super) struct Sequence {
    request_index: usize,
    stop: StopConditions,
    /// Prompt and answer so far.
    tokens: Vec<i32>,
    num_prompt_tokens: usize,
    /// Prompt tokens in the cache.
    num_cached: usize,
    proposer: Box<dyn Proposer>,
    /// How tokens are sampled, and the key of their noise.
    sampling: Sampling,
    sequence_key: u64,
    num_new_tokens: Vec<u32>,
    /// Tokens of all windows so far.
    num_window_tokens: u64,
    num_probes: usize,
    timing: Timing,
    /// Whether the next window closes the thought, which has reached its limit.
    is_closing: bool,
    /// Positions in the answer of the tokens that closed the thought.
    forced: Option<Range<usize>>,
    finish_reason: Option<FinishReason>,
}

impl Sequence {
    pub(super) fn new(request_index: usize, request: Request, stop: StopConditions, options: DecodeOptions) -> Self {
        debug_assert!(stop.max_new_tokens > 0, "a sequence gets a token in its first forward");
        let random = RandomDraft::new(options.seed, &request.sample_id);
        Sequence {
            request_index,
            finish_reason: None,
            stop,
            num_prompt_tokens: request.prompt_ids.len(),
            num_cached: 0,
            proposer: options.strategy.proposer(&request.prompt_ids, random, options.record_trajectory),
            sampling: options.sampling,
            sequence_key: fingerprint::derive_seed(options.seed, &request.sample_id),
            tokens: request.prompt_ids,
            num_new_tokens: Vec::new(),
            num_window_tokens: 0,
            num_probes: 0,
            timing: Timing::default(),
            is_closing: false,
            forced: None,
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

    /// Counts a forward of the batch.
    pub(super) fn add_time(&mut self, timing: Timing) {
        self.timing += timing;
    }

    pub(super) fn is_decoding(&self) -> bool {
        self.uncached_prompt().is_empty()
    }

    pub(super) fn is_finished(&self) -> bool {
        self.finish_reason.is_some()
    }

    /// Ends the answer where it is.
    pub(super) fn cut(&mut self) {
        self.finish_reason = Some(FinishReason::Length);
    }

    /// The tokens whose keys and values are in the cache: those of the prompt so far, or of the prompt
    /// and the answer but for the last token.
    pub(super) fn cached_tokens(&self) -> &[i32] {
        let end = if self.is_decoding() { self.tokens.len() - 1 } else { self.num_cached };
        &self.tokens[..end]
    }

    /// The tokens that close the thought in the next window; usually none.
    fn closing(&self) -> &[i32] {
        match &self.stop.thought_limit {
            Some(limit) if self.is_closing => &limit.closing.closing_ids,
            _ => &[],
        }
    }

    /// What each token that the next window may draft is expected to add to the new tokens; empty if
    /// there is nothing to choose.
    pub(super) fn gains(&mut self, prospects: &Prospects<'_>) -> Vec<f64> {
        match self.proposer.likeliest_paths() {
            Some(paths) if !self.is_closing => paths.gains(prospects, &self.tokens),
            _ => Vec::new(),
        }
    }

    /// Sets how many of these tokens the next window drafts, in a forward that is a probe or not.
    pub(super) fn set_num_drafts(&mut self, num_drafts: usize, is_probe: bool) {
        self.num_probes += usize::from(is_probe);
        if let Some(paths) = self.proposer.likeliest_paths() {
            paths.set_num_drafts(num_drafts);
        }
    }

    /// What became of the draft tokens of the last window, if their number was chosen.
    pub(super) fn take_outcomes(&mut self) -> Vec<Outcome> {
        self.proposer.likeliest_paths().map(|paths| paths.take_outcomes()).unwrap_or_default()
    }

    /// The window of the next forward: the last token, and the draft or the tokens that close the
    /// thought.
    pub(super) fn window(&self) -> Window<'_> {
        let start = self.tokens.len() - 1;
        let (draft, tree) = match self.closing() {
            [] => (self.proposer.draft(), self.proposer.tree()),
            closing => (closing, None),
        };
        let Sequence { sampling, sequence_key, is_closing, .. } = *self;
        Window {
            start,
            last_token: self.tokens[start],
            draft,
            tree,
            num_adapted: 0,
            is_closing,
            sampling,
            sequence_key,
        }
    }

    /// Processes the tokens that the backend sampled after each token of the window.
    pub(super) fn accept(&mut self, predictions: &Predictions) -> Accepted<'_> {
        let num_before = self.tokens.len();
        self.num_window_tokens += predictions.tokens.len() as u64;
        let moves = if self.is_closing {
            self.close_thought(&predictions.tokens);
            Vec::new()
        } else {
            self.accept_draft(predictions)
        };
        Accepted { request_index: self.request_index, tokens: &self.tokens[num_before..], moves }
    }

    /// Appends the accepted draft tokens and the token sampled after the last of them, up to the end
    /// of the answer or the limit of its thought, and has the proposer make the next draft. Returns
    /// the moves in the cache.
    fn accept_draft(&mut self, predictions: &Predictions) -> Vec<(usize, usize)> {
        let predicted = &predictions.tokens;
        let path = accepted_path(&self.window(), predicted);
        let (num_before, num_accepted) = (self.tokens.len(), path.len() - 1);
        for &offset in &path {
            self.push(predicted[offset]);
            if self.is_finished() || self.is_closing {
                break;
            }
        }
        let num_new = self.tokens.len() - num_before;
        self.num_new_tokens.push(num_new as u32);
        self.proposer.update(&Verification {
            predicted,
            proposed: predictions.drafted.as_ref().unwrap_or(predicted),
            candidates: &predictions.candidates,
            path: &path,
            tokens: &self.tokens,
            is_truncated: num_new < num_accepted + 1,
        });
        let start = num_before - 1;
        let misplaced = path.into_iter().enumerate().filter(|(depth, offset)| depth != offset);
        misplaced.map(|(depth, offset)| (start + offset, start + depth)).collect()
    }

    /// Appends the tokens that close the thought, whatever the model predicted in their place, and
    /// the one after them.
    fn close_thought(&mut self, predicted: &[i32]) {
        let closing = self.closing().to_vec();
        let start = self.answer().len();
        self.forced = Some(start..start + closing.len());
        self.is_closing = false;
        self.tokens.extend(&closing);
        self.push(predicted[closing.len()]);
        self.num_new_tokens.push(1);
        self.proposer.restart(&self.tokens);
    }

    /// Appends a token of the model, and notes whether the answer has ended or its thought is at the
    /// limit.
    fn push(&mut self, token: i32) {
        self.tokens.push(token);
        self.finish_reason = self.finish_reason_after(token);
        let Some(limit) = self.stop.thought_limit.as_ref().filter(|_| !self.is_finished()) else { return };
        let (prompt, answer) = self.tokens.split_at(self.num_prompt_tokens);
        if answer.len() == limit.closing.max_thinking_tokens && limit.tokens.is_open(prompt, answer) {
            self.is_closing = true;
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

    /// How the thought ended, if thoughts have a limit.
    fn thought(&self) -> Option<Thought> {
        let tokens = &self.stop.thought_limit.as_ref()?.tokens;
        let (prompt, answer) = self.tokens.split_at(self.num_prompt_tokens);
        match &self.forced {
            Some(positions) => Some(Thought::Forced(positions.clone())),
            None => tokens.thought(prompt, answer),
        }
    }

    pub(super) fn into_answer(self) -> Answer {
        Answer {
            thought: self.thought(),
            response_ids: self.answer().to_vec(),
            finish_reason: self.finish_reason.unwrap_or(FinishReason::Length),
            num_forwards: self.num_new_tokens.len(),
            num_new_tokens: self.num_new_tokens,
            num_window_tokens: self.num_window_tokens,
            num_probes: self.num_probes,
            blocks: self.proposer.into_blocks(),
            timing: self.timing,
        }
    }
}
