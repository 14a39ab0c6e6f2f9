//! The profile of blocks: fast-forwarded and stationary tokens (CLLM, section 4 and table 3), told by the recorded states.
//!
//! A block is looked at as far as the answer goes: what stands after EOS, or after the length limit, counts nowhere.

use std::ops::AddAssign;

use super::{Block, Trajectory};

/// Sums over blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Profile {
    /// Blocks.
    pub blocks: usize,
    /// Tokens of the answer in them.
    pub tokens: usize,
    /// Iterations from the first guess until all of these tokens are right.
    pub iterations: usize,
    /// Tokens that the iterations added to the right prefix: one that each of them adds in any case, and what is beyond it.
    pub fast_forwarded: usize,
    /// Tokens that were right while one before them was wrong, and stayed right.
    pub stationary: usize,
}

impl Profile {
    /// That of one block, of whose tokens the first `answer` belong to the answer.
    pub fn of(block: &Block, answer: usize) -> Self {
        let Some(fixed_point) = block.states.last() else { return Profile::default() };
        let answer = answer.min(fixed_point.len());
        let right = |state: &[i32], position: usize| state[position] == fixed_point[position];
        let prefix = |state: &[i32]| (0..answer).take_while(|&position| right(state, position)).count();
        let prefixes: Vec<usize> = block.states.iter().map(|state| prefix(state)).collect();
        let first = prefixes[0];
        let is_stationary = |&position: &usize| {
            let turn = prefixes.iter().position(|&prefix| prefix > position).unwrap_or(0);
            // Right in the last state before its turn, and from its turn on it is in the right prefix.
            turn > 0 && right(&block.states[turn - 1], position)
        };
        Profile {
            blocks: 1,
            tokens: answer,
            iterations: prefixes.iter().take_while(|&&prefix| prefix < answer).count(),
            fast_forwarded: answer - first,
            stationary: (first..answer).filter(is_stationary).count(),
        }
    }

    /// Mean number of tokens that an iteration adds to the right prefix, the one of any iteration among them, as the paper
    /// counts; none without iterations.
    pub fn fast_forwarded_per_iteration(&self) -> Option<f64> {
        mean(self.fast_forwarded, self.iterations)
    }

    /// Mean number of tokens of a block that came to the right prefix beyond one an iteration; none without blocks.
    pub fn beyond_one_per_block(&self) -> Option<f64> {
        mean(self.fast_forwarded.saturating_sub(self.iterations), self.blocks)
    }

    /// Mean number of stationary tokens of a block; none without blocks.
    pub fn stationary_per_block(&self) -> Option<f64> {
        mean(self.stationary, self.blocks)
    }

    /// Mean number of iterations of a block; none without blocks.
    pub fn iterations_per_block(&self) -> Option<f64> {
        mean(self.iterations, self.blocks)
    }
}

impl AddAssign for Profile {
    fn add_assign(&mut self, other: Profile) {
        self.blocks += other.blocks;
        self.tokens += other.tokens;
        self.iterations += other.iterations;
        self.fast_forwarded += other.fast_forwarded;
        self.stationary += other.stationary;
    }
}

fn mean(sum: usize, of: usize) -> Option<f64> {
    (of > 0).then(|| sum as f64 / of as f64)
}

impl Trajectory {
    /// The profile of every block, and whether the answer goes through all of it.
    pub fn block_profiles(&self) -> impl Iterator<Item = (Profile, bool)> {
        self.blocks.iter().map(|block| {
            let answer = self.answer_in(block);
            (Profile::of(block, answer), block.states.last().is_some_and(|state| state.len() == answer))
        })
    }

    /// Forwards that the response took: one for its first token; in a block one for each state after the first, and one more
    /// that finds the last state to be a fixed point and opens the next block, or ends the answer.
    pub fn num_forwards(&self) -> usize {
        let in_block = |block: &Block| {
            let Some(fixed_point) = block.states.last() else { return 0 };
            // Tokens known once the last state stands: a forward knows the guesses that it confirms and one more.
            let mut known = 1;
            for pair in block.states.windows(2) {
                known += (known..pair[0].len()).take_while(|&at| pair[0][at] == pair[1][at]).count() + 1;
            }
            let opens_next = (block.start as usize + fixed_point.len()) < self.response_ids.len();
            block.states.len() - 1 + usize::from(known < self.answer_in(block) || opens_next)
        };
        usize::from(!self.response_ids.is_empty()) + self.blocks.iter().map(in_block).sum::<usize>()
    }

    /// Tokens of a block that belong to the answer.
    fn answer_in(&self, block: &Block) -> usize {
        let left = self.response_ids.len().saturating_sub(block.start as usize);
        block.states.last().map_or(0, |state| state.len().min(left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Iteration 1 fixes token 1 and knows 3 before its turn; iteration 2 fixes the rest.
    fn block() -> Block {
        Block { start: 0, states: vec![vec![1, 9, 9, 9], vec![1, 2, 8, 4], vec![1, 2, 3, 4]] }
    }

    #[test]
    fn the_profile_counts_what_the_paper_counts() {
        let found = Profile::of(&block(), 4);
        let by_hand = Profile { blocks: 1, tokens: 4, iterations: 2, fast_forwarded: 3, stationary: 1 };
        assert_eq!(found, by_hand);
        assert_eq!(found.fast_forwarded_per_iteration(), Some(1.5));
        assert_eq!(found.beyond_one_per_block(), Some(1.0));
        let at_once = Profile::of(&Block { start: 0, states: vec![vec![1, 2]] }, 2);
        assert_eq!(at_once, Profile { blocks: 1, tokens: 2, ..Profile::default() });
        assert_eq!(at_once.fast_forwarded_per_iteration(), None);
    }

    #[test]
    fn what_stands_after_the_answer_counts_nowhere() {
        // With three tokens the stationary one is gone, with two the second iteration too.
        let three = Profile { blocks: 1, tokens: 3, iterations: 2, fast_forwarded: 2, stationary: 0 };
        assert_eq!(Profile::of(&block(), 3), three);
        let two = Profile { blocks: 1, tokens: 2, iterations: 1, fast_forwarded: 1, stationary: 0 };
        assert_eq!(Profile::of(&block(), 2), two);
    }

    #[test]
    fn a_token_that_was_right_and_became_wrong_again_is_not_stationary() {
        let states = vec![vec![1, 9, 9, 4], vec![1, 2, 8, 7], vec![1, 2, 3, 4]];
        assert_eq!(Profile::of(&Block { start: 0, states }, 4).stationary, 0);
    }
}
