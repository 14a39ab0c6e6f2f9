//! Blocks of which the next begins before the one in front is done (multi-block decoding of Jacobi Forcing, arXiv 2512.14681).

use super::ngram_pool::TailPool;
use super::{Draws, Guesser, Step};

/// The window is what is not known of the real-active block, followed by the pseudo-active blocks, n guesses each.
///
/// Accepting runs over the borders of blocks: a guess is final as soon as it agrees with its prediction and everything before
/// it is final, whichever block it stands in. That prediction was made under nothing but final tokens, so it is the token of
/// one-at-a-time decoding. A pseudo-active block's own agreement, under a prefix that is not final, only decides when the
/// next block begins; what it guessed is verified again once it is the real-active one.
pub(crate) struct MultiBlock {
    n: usize,
    most_blocks: usize,
    /// So many accepted tokens of the newest block begin another one.
    enough: usize,
    pool: TailPool,
    draws: Draws,
    /// Known tokens of the real-active block: 1 to n, for the last known token is its first at least.
    known: usize,
    pseudo_blocks: usize,
    guesses: Vec<i32>,
}

impl MultiBlock {
    pub(crate) fn new(n: usize, blocks: usize, ratio: f64, pool: usize, prompt: &[i32], mut draws: Draws) -> Self {
        let mut guesses = Vec::new();
        draws.fill(&mut guesses, n - 1, prompt);
        let enough = (ratio * n as f64).ceil() as usize;
        let pool = TailPool::new(pool);
        MultiBlock { n, most_blocks: blocks, enough, pool, draws, known: 1, pseudo_blocks: 0, guesses }
    }

    /// Leading guesses of the last n that agree with the predictions before them.
    fn agreed_in_last(&self, predicted: &[i32]) -> usize {
        let first = self.guesses.len().saturating_sub(self.n);
        self.guesses[first..]
            .iter()
            .zip(&predicted[first..])
            .take_while(|(guess, predicted)| guess == predicted)
            .count()
    }
}

impl Guesser for MultiBlock {
    fn guesses(&self) -> &[i32] {
        &self.guesses
    }

    fn advance(&mut self, step: &Step<'_>) {
        let rejected = step.matched < self.guesses.len();
        let agreed = self.agreed_in_last(step.predicted);
        self.known += step.matched + 1;
        while self.known > self.n {
            self.known -= self.n;
            self.pseudo_blocks = self.pseudo_blocks.saturating_sub(1);
        }
        let accepted = if self.pseudo_blocks == 0 { self.known } else { agreed };
        if accepted >= self.enough && self.pseudo_blocks + 1 < self.most_blocks {
            self.pseudo_blocks += 1;
        }
        let size = self.n - self.known + self.pseudo_blocks * self.n;
        self.guesses = step.open().to_vec();
        // The prediction after the last guess belongs to a block that has not begun.
        self.guesses.truncate(size);
        self.draws.fill(&mut self.guesses, size, step.known);
        if rejected {
            self.pool.recycle(step, &mut self.guesses);
        }
    }
}
