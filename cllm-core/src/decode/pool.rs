//! Guesses from what was seen or guessed before.

use std::collections::VecDeque;

use super::guesser::Step;

/// Rejection recycling (Jacobi Forcing, arXiv 2512.14681): what was predicted after a rejected guess is often right, only
/// too early or too late. The last few such tails are kept; where a token of theirs becomes known later, what followed it
/// is guessed again.
pub(super) struct TailPool {
    /// The newest last.
    tails: VecDeque<Vec<i32>>,
    most: usize,
}

impl TailPool {
    pub(super) fn new(most: usize) -> Self {
        TailPool { tails: VecDeque::new(), most }
    }

    /// At a rejection: what the newest tail has after the token that became known takes the place of the leading guesses, and
    /// the tail that was predicted after that token is kept.
    pub(super) fn recycle(&mut self, step: &Step<'_>, guesses: &mut [i32]) {
        let tail = step.open();
        if self.most == 0 || tail.is_empty() {
            return;
        }
        let after = |tail: &Vec<i32>| {
            let place = tail.iter().position(|&token| token == step.newest())?;
            (place + 1 < tail.len()).then(|| tail[place + 1..].to_vec())
        };
        if let Some(found) = self.tails.iter().rev().find_map(after) {
            let length = found.len().min(guesses.len());
            guesses[..length].copy_from_slice(&found[..length]);
        }
        if self.tails.len() == self.most {
            self.tails.pop_front();
        }
        self.tails.push_back(tail.to_vec());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_returns_after_the_token_that_it_followed() {
        let mut pool = TailPool::new(2);
        let mut guesses = [0; 4];
        let mut recycle = |predicted: &[i32]| {
            pool.recycle(&Step { predicted, matched: 0, known: &[], cut: false }, &mut guesses);
            guesses
        };
        assert_eq!(recycle(&[1, 7, 8, 9]), [0; 4], "there was nothing to recycle");
        assert_eq!(recycle(&[7, 4]), [8, 9, 0, 0]);
        // Only two tails are kept, and nothing follows the 4.
        assert_eq!(recycle(&[8, 5]), [9, 9, 0, 0]);
        assert_eq!(recycle(&[7, 6]), [9, 9, 0, 0]);
        assert_eq!(recycle(&[4, 1]), [9, 9, 0, 0]);
    }
}
