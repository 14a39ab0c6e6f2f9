//! A window that rolls on.

use super::ngram_pool::TailPool;
use super::{Draws, Guesser, Step};

/// The window always holds n tokens: the last known one and n - 1 guesses.
pub(crate) struct Rolling {
    n: usize,
    pool: TailPool,
    draws: Draws,
    guesses: Vec<i32>,
}

impl Rolling {
    pub(crate) fn new(n: usize, pool: usize, prompt: &[i32], mut draws: Draws) -> Self {
        let mut guesses = Vec::new();
        draws.fill(&mut guesses, n - 1, prompt);
        Rolling { n, pool: TailPool::new(pool), draws, guesses }
    }
}

impl Guesser for Rolling {
    fn guesses(&self) -> &[i32] {
        &self.guesses
    }

    fn advance(&mut self, step: &Step<'_>) {
        let rejected = step.matched < self.guesses.len();
        self.guesses = step.open().to_vec();
        self.draws.fill(&mut self.guesses, self.n - 1, step.known);
        if rejected {
            self.pool.recycle(step, &mut self.guesses);
        }
    }
}
