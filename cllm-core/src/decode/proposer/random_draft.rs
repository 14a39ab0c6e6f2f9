//! Initial drafts: random tokens of the sequence so far.

use rand::RngExt;

use crate::fingerprint;

/// Draws draft tokens uniformly from the tokens seen so far. Each draw has a generator of its own,
/// seeded by (seed, sample, number of the draw), so a sequence gets the same drafts in any batch.
pub(in crate::decode) struct RandomDraft {
    seed: u64,
    sample_id: String,
    num_draws: u64,
}

impl RandomDraft {
    pub(in crate::decode) fn new(seed: u64, sample_id: &str) -> Self {
        RandomDraft { seed, sample_id: sample_id.to_owned(), num_draws: 0 }
    }

    /// Fills the draft up to `len` tokens.
    pub(super) fn fill(&mut self, draft: &mut Vec<i32>, len: usize, tokens: &[i32]) {
        let draw = self.num_draws;
        self.num_draws += 1;
        let missing = len - draft.len();
        // Seeding a generator is slow, and many calls have nothing to draw.
        if missing == 0 {
            return;
        }
        let mut rng = fingerprint::derive_rng(self.seed, &self.sample_id, draw);
        draft.extend((0..missing).map(|_| tokens[rng.random_range(0..tokens.len())]));
    }
}
