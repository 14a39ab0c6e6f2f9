//! A rolling window: accepted tokens leave it and new draft tokens fill it up, so its length never
//! changes.

use super::random_draft::RandomDraft;
use super::tail_pool::TailPool;
use super::{Proposer, Verification};

/// Drafts n - 1 tokens after the last one: first those that were proposed after the newest token,
/// then random ones.
pub(in crate::decode) struct Rolling {
    n: usize,
    pool: TailPool,
    random: RandomDraft,
    draft: Vec<i32>,
}

impl Rolling {
    pub(in crate::decode) fn new(n: usize, max_tails: usize, prompt: &[i32], random: RandomDraft) -> Self {
        let mut rolling = Rolling { n, pool: TailPool::new(max_tails), random, draft: Vec::new() };
        rolling.restart(prompt);
        rolling
    }
}

impl Proposer for Rolling {
    fn draft(&self) -> &[i32] {
        &self.draft
    }

    fn update(&mut self, verification: &Verification<'_>) {
        let is_rejected = verification.num_accepted() < self.draft.len();
        self.draft = verification.tail().to_vec();
        self.random.fill(&mut self.draft, self.n - 1, verification.tokens);
        if is_rejected {
            self.pool.recycle(verification, &mut self.draft);
        }
    }

    fn restart(&mut self, tokens: &[i32]) {
        self.draft.clear();
        self.random.fill(&mut self.draft, self.n - 1, tokens);
    }
}
