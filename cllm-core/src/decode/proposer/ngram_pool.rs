//! N-grams that were predicted or seen, by their first tokens: the candidates of lookahead
//! decoding.

use std::collections::{HashMap, VecDeque};

pub(super) struct NgramPool {
    /// For each first token, the tokens that followed it; the newest last.
    continuations: HashMap<i32, VecDeque<Vec<i32>>>,
    max_per_token: usize,
}

impl NgramPool {
    /// Keeps the newest `max_per_token` n-grams of each first token.
    pub(super) fn new(max_per_token: usize) -> Self {
        NgramPool { continuations: HashMap::new(), max_per_token }
    }

    /// Adds an n-gram; one that is in the pool already becomes the newest.
    pub(super) fn add(&mut self, ngram: &[i32]) {
        let Some((&first, rest)) = ngram.split_first() else { return };
        let kept = self.continuations.entry(first).or_default();
        if let Some(index) = kept.iter().position(|other| other == rest) {
            kept.remove(index);
        } else if kept.len() == self.max_per_token {
            kept.pop_front();
        }
        kept.push_back(rest.to_vec());
    }

    /// The tokens that followed a token, newest first.
    pub(super) fn after(&self, token: i32) -> impl Iterator<Item = &[i32]> {
        self.continuations.get(&token).into_iter().flat_map(|kept| kept.iter().rev()).map(Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_ngrams_of_each_first_token_are_kept_once() {
        let mut pool = NgramPool::new(2);
        [[1, 2, 3], [1, 4, 5], [7, 8, 9], [1, 2, 3]].iter().for_each(|ngram| pool.add(ngram));
        assert_eq!(pool.after(1).collect::<Vec<_>>(), [[2, 3], [4, 5]], "added again, it is the newest");
        pool.add(&[1, 6, 6]);
        assert_eq!(pool.after(1).collect::<Vec<_>>(), [[6, 6], [2, 3]], "the oldest is dropped");
        assert_eq!(pool.after(7).collect::<Vec<_>>(), [[8, 9]]);
        assert_eq!(pool.after(2).count(), 0);
    }
}
