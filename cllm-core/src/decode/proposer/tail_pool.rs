//! Rejection recycling (Jacobi Forcing, arXiv 2512.14681).
//!
//! What was proposed after a rejected draft token is often correct, only too early or too late. So
//! the last few rejected tails are kept, and when a new token occurs in one of them, what followed
//! it there is drafted again.

use std::collections::VecDeque;

use super::Verification;

pub(super) struct TailPool {
    /// The newest last.
    tails: VecDeque<Vec<i32>>,
    max_tails: usize,
}

impl TailPool {
    pub(super) fn new(max_tails: usize) -> Self {
        TailPool { tails: VecDeque::new(), max_tails }
    }

    /// Call it after a rejection. Overwrites the leading draft tokens with what followed the newest
    /// token in the newest tail that has it, then keeps the tail that was rejected now.
    pub(super) fn recycle(&mut self, verification: &Verification<'_>, draft: &mut [i32]) {
        let tail = verification.tail();
        if self.max_tails == 0 || tail.is_empty() {
            return;
        }
        let after_last_token = |tail: &Vec<i32>| {
            let index = tail.iter().position(|&token| token == verification.last_token())?;
            (index + 1 < tail.len()).then(|| tail[index + 1..].to_vec())
        };
        if let Some(recycled) = self.tails.iter().rev().find_map(after_last_token) {
            let len = recycled.len().min(draft.len());
            draft[..len].copy_from_slice(&recycled[..len]);
        }
        if self.tails.len() == self.max_tails {
            self.tails.pop_front();
        }
        self.tails.push_back(tail.to_vec());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_returns_after_a_token_that_it_contains() {
        let mut pool = TailPool::new(2);
        let mut draft = [0; 4];
        let mut recycle = |predicted: &[i32]| {
            let (proposed, candidates, path, tokens) = (predicted, &[][..], &[0][..], &[][..]);
            pool.recycle(
                &Verification { predicted, proposed, candidates, path, tokens, is_truncated: false },
                &mut draft,
            );
            draft
        };
        assert_eq!(recycle(&[1, 7, 8, 9]), [0; 4], "the pool was empty");
        assert_eq!(recycle(&[7, 4]), [8, 9, 0, 0]);
        // The pool keeps two tails, and nothing follows the 4.
        assert_eq!(recycle(&[8, 5]), [9, 9, 0, 0]);
        assert_eq!(recycle(&[7, 6]), [9, 9, 0, 0]);
        assert_eq!(recycle(&[4, 1]), [9, 9, 0, 0]);
    }
}
