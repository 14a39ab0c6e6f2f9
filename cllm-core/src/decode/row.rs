//! One row of a batch: which tokens are known, which are guessed, and what a forward makes final.

use rand::RngExt;

use super::{Answer, DecodeOptions, Limits, Request, Strategy, Window};
use crate::fingerprint;
use crate::trajectory::{Block, FinishReason};

/// Decoding state of one request. The open block is `sequence[block_start..]` (known) followed by `guesses`; between two
/// blocks, and always when n = 1, there are no guesses. A rolling window always has n - 1.
pub(super) struct Row<'r> {
    request: Request,
    /// Key of the noise of each position.
    key: u64,
    limits: &'r Limits,
    options: DecodeOptions,
    /// Prompt and known tokens of the response.
    sequence: Vec<i32>,
    guesses: Vec<i32>,
    /// Times that guesses were drawn.
    draws: u64,
    accepted: Vec<u32>,
    blocks: Vec<Block>,
    finish_reason: Option<FinishReason>,
}

impl<'r> Row<'r> {
    pub(super) fn new(request: Request, limits: &'r Limits, options: DecodeOptions) -> Self {
        let mut row = Row {
            key: fingerprint::key(options.seed, &request.sample_id),
            sequence: request.prompt_ids.clone(),
            request,
            limits,
            options,
            guesses: Vec::new(),
            draws: 0,
            accepted: Vec::new(),
            blocks: Vec::new(),
            finish_reason: (limits.max_new_tokens == 0).then_some(FinishReason::Length),
        };
        if let Strategy::Rolling { .. } = options.strategy {
            row.draw_guesses();
        }
        row
    }

    pub(super) fn prompt(&self) -> &[i32] {
        &self.request.prompt_ids
    }

    /// What to forward next, as row `row` of the batch.
    pub(super) fn window(&self, row: usize) -> Window<'_> {
        let start = self.sequence.len() - 1;
        Window { row, start, known: self.sequence[start], guesses: &self.guesses, key: self.key }
    }

    pub(super) fn finished(&self) -> bool {
        self.finish_reason.is_some()
    }

    /// Takes the predictions after each token of the window: the guesses that agree with them are final up to the first
    /// that does not, and that one's correction is final too. Returns the tokens that became final.
    pub(super) fn accept(&mut self, predicted: &[i32]) -> &[i32] {
        let matched = self.guesses.iter().zip(predicted).take_while(|(guess, predicted)| guess == predicted).count();
        let converged = matched == self.guesses.len();
        let before = self.sequence.len();
        for &token in &predicted[..=matched] {
            self.sequence.push(token);
            self.finish_reason = self.reason_to_stop(token);
            if self.finished() {
                break;
            }
        }
        self.accepted.push((self.sequence.len() - before) as u32);
        if let Strategy::Rolling { .. } = self.options.strategy {
            self.guesses = predicted[matched + 1..].to_vec();
            self.draw_guesses();
        } else if converged {
            // All of the old block was right already, unless the answer ended inside it: the last token opens a block.
            if self.sequence.len() == before + matched + 1 {
                self.open_block();
            }
        } else {
            let next_guesses = predicted[matched + 1..self.guesses.len()].to_vec();
            self.record_state(&predicted[..=matched], &next_guesses);
            self.guesses = next_guesses;
        }
        &self.sequence[before..]
    }

    fn reason_to_stop(&self, token: i32) -> Option<FinishReason> {
        if self.limits.eos_ids.contains(&token) {
            Some(FinishReason::Eos)
        } else if self.response().len() >= self.limits.max_new_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    fn response(&self) -> &[i32] {
        &self.sequence[self.request.prompt_ids.len()..]
    }

    /// Fills the guesses up to n - 1 with tokens seen so far.
    fn draw_guesses(&mut self) {
        let draw = self.draws;
        self.draws += 1;
        let missing = self.options.strategy.block_size() - 1 - self.guesses.len();
        // Autoregressive decoding never misses any, a rolling window none after a forward without a match.
        if missing == 0 {
            return;
        }
        let mut rng = fingerprint::rng(self.options.seed, &self.request.sample_id, draw);
        let seen = &self.sequence;
        self.guesses.extend((0..missing).map(|_| seen[rng.random_range(0..seen.len())]));
    }

    /// The last known token is the first of a new block; the others are drawn from the tokens seen so far.
    fn open_block(&mut self) {
        self.guesses.clear();
        self.draw_guesses();
        let start = self.response().len() - 1;
        if self.options.record {
            let mut state = vec![self.sequence[self.sequence.len() - 1]];
            state.extend(&self.guesses);
            self.blocks.push(Block { start: start as u32, states: vec![state] });
        }
    }

    fn record_state(&mut self, fixed: &[i32], guesses: &[i32]) {
        if !self.options.record {
            return;
        }
        let Some(block) = self.blocks.last_mut() else { return };
        let Some(last) = block.states.last() else { return };
        let known = last.len() - fixed.len() - guesses.len();
        let mut state = last[..known].to_vec();
        state.extend(fixed);
        state.extend(guesses);
        block.states.push(state);
    }

    pub(super) fn into_answer(self) -> Answer {
        Answer {
            response_ids: self.sequence[self.request.prompt_ids.len()..].to_vec(),
            finish_reason: self.finish_reason.unwrap_or(FinishReason::Length),
            forwards: self.accepted.len(),
            accepted: self.accepted,
            blocks: self.blocks,
        }
    }
}
