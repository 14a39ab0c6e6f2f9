//! One row of a batch: which tokens are known and what a forward makes final.

use super::proposer::{self, Guesser, Step};
use super::{Answer, DecodeOptions, Request, StopConditions, Window};
use crate::fingerprint;
use crate::trajectory::FinishReason;

/// What a forward made final.
pub(crate) struct Accepted<'r> {
    pub(crate) tokens: &'r [i32],
    /// Slots of the cache, from and to, whose keys and values must move so that those of known tokens lie in order.
    pub(crate) moves: Vec<(usize, usize)>,
}

/// Decoding state of one request.
pub(crate) struct Row<'r> {
    request: Request,
    /// Key of the noise of each position.
    key: u64,
    stop: &'r StopConditions,
    /// Prompt and known tokens of the response.
    sequence: Vec<i32>,
    guesser: Box<dyn Guesser>,
    accepted: Vec<u32>,
    finish_reason: Option<FinishReason>,
}

impl<'r> Row<'r> {
    pub(crate) fn new(request: Request, stop: &'r StopConditions, options: DecodeOptions) -> Self {
        Row {
            key: fingerprint::derive_seed(options.seed, &request.sample_id),
            sequence: request.prompt_ids.clone(),
            guesser: proposer::guesser(options, &request.sample_id, &request.prompt_ids),
            request,
            stop,
            accepted: Vec::new(),
            finish_reason: (stop.max_new_tokens == 0).then_some(FinishReason::Length),
        }
    }

    pub(crate) fn prompt(&self) -> &[i32] {
        &self.request.prompt_ids
    }

    /// What to forward next, as row `row` of the batch.
    pub(crate) fn window(&self, row: usize) -> Window<'_> {
        let start = self.sequence.len() - 1;
        let (guesses, tree) = (self.guesser.guesses(), self.guesser.tree());
        Window { row, start, known: self.sequence[start], guesses, tree, key: self.key }
    }

    pub(crate) fn finished(&self) -> bool {
        self.finish_reason.is_some()
    }

    /// Takes the predictions after each token of the window: the guesses that agree with them are final up to the first
    /// that does not, and that one's correction is final too. The next guesses come from `drafts`.
    pub(crate) fn accept(&mut self, predicted: &[i32], drafts: &[i32]) -> Accepted<'_> {
        let path = self.window(0).agreed(predicted);
        let (before, matched) = (self.sequence.len(), path.len() - 1);
        for &offset in &path {
            let token = predicted[offset];
            self.sequence.push(token);
            self.finish_reason = self.reason_to_stop(token);
            if self.finished() {
                break;
            }
        }
        self.accepted.push((self.sequence.len() - before) as u32);
        let cut = self.sequence.len() < before + matched + 1;
        self.guesser.advance(&Step { predicted, drafts, matched, known: &self.sequence, cut });
        let moved = path.into_iter().enumerate().filter(|(to, from)| to != from);
        let moves = moved.map(|(to, from)| (before - 1 + from, before - 1 + to)).collect();
        Accepted { tokens: &self.sequence[before..], moves }
    }

    fn reason_to_stop(&self, token: i32) -> Option<FinishReason> {
        if self.stop.eos_ids.contains(&token) {
            Some(FinishReason::Eos)
        } else if self.response().len() >= self.stop.max_new_tokens {
            Some(FinishReason::Length)
        } else {
            None
        }
    }

    fn response(&self) -> &[i32] {
        &self.sequence[self.request.prompt_ids.len()..]
    }

    pub(crate) fn into_answer(self) -> Answer {
        Answer {
            response_ids: self.response().to_vec(),
            finish_reason: self.finish_reason.unwrap_or(FinishReason::Length),
            num_forwards: self.accepted.len(),
            num_accepted: self.accepted,
            blocks: self.guesser.blocks(),
        }
    }
}
