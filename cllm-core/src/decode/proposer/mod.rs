//! What a strategy is to a row: it guesses the tokens that follow, and learns from what a forward predicted.

mod jacobi;
mod lookahead;
mod multi_block;
mod ngram_pool;
mod rolling;

use rand::RngExt;

use crate::decode::tree::Tree;
use crate::decode::{DecodeOptions, Strategy};
use crate::fingerprint;
use crate::trajectory::Block;
use jacobi::Jacobi;
use lookahead::Lookahead;
use multi_block::MultiBlock;
use rolling::Rolling;

/// The guesses of one row.
pub(crate) trait Guesser {
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
pub(crate) struct Step<'s> {
    /// The tokens predicted after each token of the window.
    pub(crate) predicted: &'s [i32],
    /// What is guessed after each of them: the predictions, or those of another model.
    pub(crate) drafts: &'s [i32],
    /// Guesses, one after another, that agreed with the predictions before them; the prediction after the last of them is
    /// final too. In a window that does not branch they are the leading ones.
    pub(crate) matched: usize,
    /// Prompt and known tokens, the new ones included.
    pub(crate) known: &'s [i32],
    /// The answer ended before the last of the new tokens, which is not among the known ones then.
    pub(crate) cut: bool,
}

impl Step<'_> {
    /// The newest known token, which the next window begins with; of a window that does not branch.
    pub(crate) fn newest(&self) -> i32 {
        self.predicted[self.matched]
    }

    /// What was drafted under guesses of which at least one was wrong: the next guesses; of a window that does not branch.
    pub(crate) fn open(&self) -> &[i32] {
        &self.drafts[self.matched + 1..]
    }
}

/// The guesser of a row that begins to be decoded.
pub(crate) fn guesser(options: DecodeOptions, sample_id: &str, prompt: &[i32]) -> Box<dyn Guesser> {
    let draws = Draws { seed: options.seed, sample_id: sample_id.to_owned(), count: 0 };
    match options.strategy {
        Strategy::Ar => Box::new(Jacobi::new(1, prompt.len(), options.record_trajectory, draws)),
        Strategy::Jacobi { n } => Box::new(Jacobi::new(n, prompt.len(), options.record_trajectory, draws)),
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
pub(crate) struct Draws {
    seed: u64,
    sample_id: String,
    count: u64,
}

impl Draws {
    /// Fills the guesses up to `size`.
    pub(crate) fn fill(&mut self, guesses: &mut Vec<i32>, size: usize, seen: &[i32]) {
        let draw = self.count;
        self.count += 1;
        let missing = size - guesses.len();
        // Autoregressive decoding never misses any, a rolling window none after a forward without a match.
        if missing == 0 {
            return;
        }
        let mut rng = fingerprint::derive_rng(self.seed, &self.sample_id, draw);
        guesses.extend((0..missing).map(|_| seen[rng.random_range(0..seen.len())]));
    }
}
