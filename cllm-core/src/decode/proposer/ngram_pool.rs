//! Guesses from what was seen or guessed before.

use std::collections::{HashMap, VecDeque};

use super::Step;

/// Rejection recycling (Jacobi Forcing, arXiv 2512.14681): what was predicted after a rejected guess is often right, only
/// too early or too late. The last few such tails are kept; where a token of theirs becomes known later, what followed it
/// is guessed again.
pub(crate) struct TailPool {
    /// The newest last.
    tails: VecDeque<Vec<i32>>,
    most: usize,
}

impl TailPool {
    pub(crate) fn new(most: usize) -> Self {
        TailPool { tails: VecDeque::new(), most }
    }

    /// At a rejection: what the newest tail has after the token that became known takes the place of the leading guesses, and
    /// the tail that was predicted after that token is kept.
    pub(crate) fn recycle(&mut self, step: &Step<'_>, guesses: &mut [i32]) {
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

/// N-grams by their first tokens, of each the last few that were added.
pub(crate) struct NgramPool {
    /// What follows a token; the newest last.
    after: HashMap<i32, VecDeque<Vec<i32>>>,
    most: usize,
}

impl NgramPool {
    /// Keeps at most so many of each first token.
    pub(crate) fn new(most: usize) -> Self {
        NgramPool { after: HashMap::new(), most }
    }

    /// An n-gram that is there already becomes the newest.
    pub(crate) fn add(&mut self, ngram: &[i32]) {
        let Some((&first, rest)) = ngram.split_first() else { return };
        let kept = self.after.entry(first).or_default();
        if let Some(place) = kept.iter().position(|other| other == rest) {
            kept.remove(place);
        } else if kept.len() == self.most {
            kept.pop_front();
        }
        kept.push_back(rest.to_vec());
    }

    /// What followed a token, the newest first.
    pub(crate) fn after(&self, token: i32) -> impl Iterator<Item = &[i32]> {
        self.after.get(&token).into_iter().flat_map(|kept| kept.iter().rev()).map(Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_ngrams_of_each_token_are_kept_once() {
        let mut pool = NgramPool::new(2);
        [[1, 2, 3], [1, 4, 5], [7, 8, 9], [1, 2, 3]].iter().for_each(|ngram| pool.add(ngram));
        assert_eq!(pool.after(1).collect::<Vec<_>>(), [[2, 3], [4, 5]], "added again, it is the newest");
        pool.add(&[1, 6, 6]);
        assert_eq!(pool.after(1).collect::<Vec<_>>(), [[6, 6], [2, 3]], "the oldest had to go");
        assert_eq!(pool.after(7).collect::<Vec<_>>(), [[8, 9]]);
        assert_eq!(pool.after(2).count(), 0);
    }

    #[test]
    fn a_tail_returns_after_the_token_that_it_followed() {
        let mut pool = TailPool::new(2);
        let mut guesses = [0; 4];
        let mut recycle = |predicted: &[i32]| {
            pool.recycle(&Step { predicted, drafts: predicted, matched: 0, known: &[], cut: false }, &mut guesses);
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
