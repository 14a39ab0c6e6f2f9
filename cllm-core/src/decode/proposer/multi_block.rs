//! Multi-block decoding (Jacobi Forcing, arXiv 2512.14681): the next block begins before the one in
//! front of it is final.

use super::random_draft::RandomDraft;
use super::tail_pool::TailPool;
use super::{Proposer, Verification};

/// The draft consists of the tokens of the front block that are not final (real-active in the
/// paper), followed by the blocks behind it (pseudo-active), n tokens each.
///
/// Acceptance ignores the borders of blocks: a draft token is accepted as soon as it equals its
/// prediction and everything before it is accepted. What a block behind the front predicts
/// correctly, given a prefix that is not final, only decides when the next block begins; its tokens
/// are verified again.
pub(in crate::decode) struct MultiBlock {
    n: usize,
    max_blocks: usize,
    /// Accepted tokens of the newest block at which another one begins.
    min_accepted: usize,
    pool: TailPool,
    random: RandomDraft,
    /// Final tokens of the front block: 1 to n, since its first token is the last one of the
    /// sequence or an earlier one.
    num_final: usize,
    num_blocks_behind: usize,
    draft: Vec<i32>,
}

impl MultiBlock {
    pub(in crate::decode) fn new(
        n: usize,
        max_blocks: usize,
        min_accepted: usize,
        max_tails: usize,
        prompt: &[i32],
        random: RandomDraft,
    ) -> Self {
        let (draft, pool) = (Vec::new(), TailPool::new(max_tails));
        let mut blocks =
            MultiBlock { n, max_blocks, min_accepted, pool, random, num_final: 1, num_blocks_behind: 0, draft };
        blocks.restart(prompt);
        blocks
    }

    /// Leading tokens of the newest block that equal their predictions.
    fn num_matching_in_newest(&self, predicted: &[i32]) -> usize {
        let first = self.draft.len().saturating_sub(self.n);
        let pairs = self.draft[first..].iter().zip(&predicted[first..]);
        pairs.take_while(|(drafted, predicted)| drafted == predicted).count()
    }
}

impl Proposer for MultiBlock {
    fn draft(&self) -> &[i32] {
        &self.draft
    }

    fn update(&mut self, verification: &Verification<'_>) {
        let is_rejected = verification.num_accepted() < self.draft.len();
        let num_matching = self.num_matching_in_newest(verification.predicted);
        self.num_final += verification.num_accepted() + 1;
        while self.num_final > self.n {
            self.num_final -= self.n;
            self.num_blocks_behind = self.num_blocks_behind.saturating_sub(1);
        }
        let accepted_in_newest = if self.num_blocks_behind == 0 { self.num_final } else { num_matching };
        if accepted_in_newest >= self.min_accepted && self.num_blocks_behind + 1 < self.max_blocks {
            self.num_blocks_behind += 1;
        }
        let len = self.n - self.num_final + self.num_blocks_behind * self.n;
        self.draft = verification.tail().to_vec();
        // The token predicted after the last draft token may belong to a block that has not begun.
        self.draft.truncate(len);
        self.random.fill(&mut self.draft, len, verification.tokens);
        if is_rejected {
            self.pool.recycle(verification, &mut self.draft);
        }
    }

    fn restart(&mut self, tokens: &[i32]) {
        (self.num_final, self.num_blocks_behind) = (1, 0);
        self.draft.clear();
        self.random.fill(&mut self.draft, self.n - 1, tokens);
    }
}
