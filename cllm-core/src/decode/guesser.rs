//! What a strategy is to a row: it guesses the tokens that follow, and learns from what a forward predicted.

use rand::RngExt;

use super::window::Tree;
use super::{DecodeOptions, Strategy, jacobi::Jacobi, lookahead::Lookahead, multi_block::MultiBlock, rolling::Rolling};
use crate::fingerprint;
use crate::trajectory::Block;

/// The guesses of one row.
pub(super) trait Guesser {
    /// What to forward after the last known token.
    fn guesses(&self) -> &[i32];

    /// How the window branches; without it, each of its tokens follows the one before it.
    fn tree(&self) -> Option<&Tree> {
        None
    }

    /// Makes the guesses of the next window.
    fn advance(&mut self, step: &Step<'_>);

    /// The trajectory, of a strategy that has one.
    fn blocks(self: Box<Self>) -> Vec<Block> {
        Vec::new()
    }
}

/// What a forward brought.
pub(super) struct Step<'s> {
    /// The tokens predicted after each token of the window.
    pub(super) predicted: &'s [i32],
    /// What is guessed after each of them: the predictions, or those of another model.
    pub(super) drafts: &'s [i32],
    /// Guesses, one after another, that agreed with the predictions before them; the prediction after the last of them is
    /// final too. In a window that does not branch they are the leading ones.
    pub(super) matched: usize,
    /// Prompt and known tokens, the new ones included.
    pub(super) known: &'s [i32],
    /// The answer ended before the last of the new tokens, which is not among the known ones then.
    pub(super) cut: bool,
}

impl Step<'_> {
    /// The newest known token, which the next window begins with; of a window that does not branch.
    pub(super) fn newest(&self) -> i32 {
        self.predicted[self.matched]
    }

    /// What was drafted under guesses of which at least one was wrong: the next guesses; of a window that does not branch.
    pub(super) fn open(&self) -> &[i32] {
        &self.drafts[self.matched + 1..]
    }
}

/// The guesser of a row that begins to be decoded.
pub(super) fn guesser(options: DecodeOptions, sample_id: &str, prompt: &[i32]) -> Box<dyn Guesser> {
    let draws = Draws { seed: options.seed, sample_id: sample_id.to_owned(), count: 0 };
    match options.strategy {
        Strategy::Ar => Box::new(Jacobi::new(1, prompt.len(), options.record, draws)),
        Strategy::Jacobi { n } => Box::new(Jacobi::new(n, prompt.len(), options.record, draws)),
        Strategy::Drafted { n } => Box::new(Rolling::new(n, 0, prompt, draws)),
        Strategy::Rolling { n, pool } => Box::new(Rolling::new(n, pool, prompt, draws)),
        Strategy::MultiBlock { n, blocks, ratio, pool } => {
            Box::new(MultiBlock::new(n, blocks, ratio, pool, prompt, draws))
        }
        Strategy::Lookahead { window, ngram, candidates } => {
            Box::new(Lookahead::new(window, ngram, candidates, prompt, draws))
        }
    }
}

/// Draws first guesses from the tokens seen so far; each draw has a generator of its own.
pub(super) struct Draws {
    seed: u64,
    sample_id: String,
    count: u64,
}

impl Draws {
    /// Fills the guesses up to `size`.
    pub(super) fn fill(&mut self, guesses: &mut Vec<i32>, size: usize, seen: &[i32]) {
        let draw = self.count;
        self.count += 1;
        let missing = size - guesses.len();
        // Autoregressive decoding never misses any, a rolling window none after a forward without a match.
        if missing == 0 {
            return;
        }
        let mut rng = fingerprint::rng(self.seed, &self.sample_id, draw);
        guesses.extend((0..missing).map(|_| seen[rng.random_range(0..seen.len())]));
    }
}
