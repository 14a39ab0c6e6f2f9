//! Convergence profiles: fast-forwarded and stationary tokens (CLLM, arXiv 2403.00835, section 4
//! and table 3), derived from the recorded states.
//!
//! The converged prefix of a state is its longest prefix that agrees with the fixed point. Only
//! tokens of the response count: what follows EOS or the length limit in the last block is ignored.

use std::ops::AddAssign;

use super::row::{Block, Trajectory};

/// Counts over some blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Profile {
    pub num_blocks: usize,
    /// Tokens of the response in these blocks.
    pub num_tokens: usize,
    /// Iterations from the first draft until all of these tokens have converged.
    pub num_iterations: usize,
    /// Tokens by which iterations extended the converged prefix. This includes the one token that
    /// every iteration adds at least.
    pub num_fast_forwarded: usize,
    /// Tokens that were correct while a token before them was not, and that stayed correct.
    pub num_stationary: usize,
}

/// The profile of one block.
#[derive(Debug, Clone, Copy)]
pub struct BlockProfile {
    pub profile: Profile,
    /// Whether all n tokens of the block belong to the response.
    pub is_whole: bool,
}

impl Profile {
    /// The profile of a block whose first `num_response_tokens` tokens belong to the response.
    fn from_block(block: &Block, num_response_tokens: usize) -> Self {
        let Some(fixed_point) = block.states.last() else { return Profile::default() };
        let num_tokens = num_response_tokens.min(fixed_point.len());
        let is_correct = |state: &[i32], position: usize| state[position] == fixed_point[position];
        let converged = |state: &[i32]| (0..num_tokens).take_while(|&position| is_correct(state, position)).count();
        let converged: Vec<usize> = block.states.iter().map(|state| converged(state)).collect();
        let initially_converged = converged[0];
        let is_stationary = |&position: &usize| {
            let first_converged = converged.iter().position(|&prefix| prefix > position).unwrap_or(0);
            // From this state on the token is in the converged prefix; it was stationary if it was
            // correct just before.
            first_converged > 0 && is_correct(&block.states[first_converged - 1], position)
        };
        Profile {
            num_blocks: 1,
            num_tokens,
            num_iterations: converged.iter().take_while(|&&prefix| prefix < num_tokens).count(),
            num_fast_forwarded: num_tokens - initially_converged,
            num_stationary: (initially_converged..num_tokens).filter(is_stationary).count(),
        }
    }

    /// Mean number of tokens by which an iteration extends the converged prefix, at least 1. The
    /// paper counts this way. `None` if there were no iterations.
    pub fn fast_forwarded_per_iteration(&self) -> Option<f64> {
        mean(self.num_fast_forwarded, self.num_iterations)
    }

    /// Mean number of tokens per block that were added to the converged prefix beyond one per
    /// iteration.
    pub fn beyond_one_per_block(&self) -> Option<f64> {
        mean(self.num_fast_forwarded.saturating_sub(self.num_iterations), self.num_blocks)
    }

    /// Mean number of stationary tokens per block.
    pub fn stationary_per_block(&self) -> Option<f64> {
        mean(self.num_stationary, self.num_blocks)
    }

    /// Mean number of iterations per block.
    pub fn iterations_per_block(&self) -> Option<f64> {
        mean(self.num_iterations, self.num_blocks)
    }
}

impl AddAssign for Profile {
    fn add_assign(&mut self, other: Profile) {
        self.num_blocks += other.num_blocks;
        self.num_tokens += other.num_tokens;
        self.num_iterations += other.num_iterations;
        self.num_fast_forwarded += other.num_fast_forwarded;
        self.num_stationary += other.num_stationary;
    }
}

fn mean(sum: usize, count: usize) -> Option<f64> {
    (count > 0).then(|| sum as f64 / count as f64)
}

impl Trajectory {
    /// The profile of every block, in order.
    pub fn block_profiles(&self) -> impl Iterator<Item = BlockProfile> {
        self.blocks.iter().map(|block| {
            let num_tokens = self.response_tokens_in(block);
            let is_whole = block.states.last().is_some_and(|state| state.len() == num_tokens);
            BlockProfile { profile: Profile::from_block(block, num_tokens), is_whole }
        })
    }

    /// Number of forwards in which the response was decoded: one for its first token, one for the
    /// first token after a thought that was closed at its limit and, in each block, one for every
    /// state after the first draft plus one that confirms the fixed point and opens the next block or
    /// ends the response.
    pub fn num_forwards(&self) -> usize {
        let forced = self.forced_tokens();
        let in_block = |block: &Block| {
            // A forward accepts the draft tokens that it confirms and one more.
            let mut num_accepted = 1;
            for pair in block.states.windows(2) {
                let confirmed = (num_accepted..pair[0].len()).take_while(|&at| pair[0][at] == pair[1][at]).count();
                num_accepted += confirmed + 1;
            }
            let opens_next = block.end() < self.response_ids.len() && block.end() != forced.start;
            let needs_confirmation = num_accepted < self.response_tokens_in(block) || opens_next;
            block.states.len().saturating_sub(1) + usize::from(needs_confirmation)
        };
        let num_first_tokens = usize::from(!self.response_ids.is_empty()) + usize::from(!forced.is_empty());
        num_first_tokens + self.blocks.iter().map(in_block).sum::<usize>()
    }

    fn response_tokens_in(&self, block: &Block) -> usize {
        let after_start = self.response_ids.len().saturating_sub(block.start as usize);
        block.states.last().map_or(0, |state| state.len().min(after_start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Iteration 1 accepts token 1 and already has token 3; iteration 2 accepts the rest.
    fn block() -> Block {
        Block { start: 0, states: vec![vec![1, 9, 9, 9], vec![1, 2, 8, 4], vec![1, 2, 3, 4]] }
    }

    #[test]
    fn the_profile_counts_what_the_paper_counts() {
        let profile = Profile::from_block(&block(), 4);
        let by_hand =
            Profile { num_blocks: 1, num_tokens: 4, num_iterations: 2, num_fast_forwarded: 3, num_stationary: 1 };
        assert_eq!(profile, by_hand);
        assert_eq!(profile.fast_forwarded_per_iteration(), Some(1.5));
        assert_eq!(profile.beyond_one_per_block(), Some(1.0));
        let at_once = Profile::from_block(&Block { start: 0, states: vec![vec![1, 2]] }, 2);
        assert_eq!(at_once, Profile { num_blocks: 1, num_tokens: 2, ..Profile::default() });
        assert_eq!(at_once.fast_forwarded_per_iteration(), None);
    }

    #[test]
    fn tokens_after_the_response_are_not_counted() {
        // Three tokens leave out the stationary one, two tokens the second iteration too.
        let three =
            Profile { num_blocks: 1, num_tokens: 3, num_iterations: 2, num_fast_forwarded: 2, num_stationary: 0 };
        assert_eq!(Profile::from_block(&block(), 3), three);
        let two = Profile { num_blocks: 1, num_tokens: 2, num_iterations: 1, num_fast_forwarded: 1, num_stationary: 0 };
        assert_eq!(Profile::from_block(&block(), 2), two);
    }

    #[test]
    fn a_token_that_was_correct_and_became_wrong_again_is_not_stationary() {
        let states = vec![vec![1, 9, 9, 4], vec![1, 2, 8, 7], vec![1, 2, 3, 4]];
        assert_eq!(Profile::from_block(&Block { start: 0, states }, 4).num_stationary, 0);
    }
}
