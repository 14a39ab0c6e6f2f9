//! Lookahead decoding (Fu et al., arXiv 2402.02057): Jacobi iterations on future tokens collect
//! n-grams, which become candidates when the last token is their first.

use super::ngram_pool::NgramPool;
use super::random_draft::RandomDraft;
use super::{Proposer, Verification};
use crate::decode::tree::TokenTree;

/// One tree of tokens holds both branches of the method.
///
/// The lookahead branch is a grid of `num_levels` levels and `width` columns. The first level
/// begins with the last token of the sequence, and each of its tokens follows the one before it. A
/// token of another level follows the token of its column in the level before, so it is one
/// position further on. Each column is a Jacobi trajectory: a forward appends the token predicted
/// after its last one, which makes it an n-gram for the pool, and its first token is dropped.
///
/// The verification branch holds the n-grams of the pool that begin with the last token. Acceptance
/// does not distinguish the two branches.
pub(in crate::decode) struct Lookahead {
    width: usize,
    num_levels: usize,
    pool: NgramPool,
    random: RandomDraft,
    /// From left to right, each from the first level on.
    columns: Vec<Vec<i32>>,
    /// The whole window: the last token and the draft.
    window: Vec<i32>,
    tree: TokenTree,
}

impl Lookahead {
    pub(in crate::decode) fn new(
        width: usize,
        ngram_len: usize,
        max_candidates: usize,
        prompt: &[i32],
        random: RandomDraft,
    ) -> Self {
        let mut pool = NgramPool::new(max_candidates);
        prompt.windows(ngram_len).for_each(|ngram| pool.add(ngram));
        let (columns, window, tree) = (Vec::new(), Vec::new(), TokenTree::new([]));
        let mut lookahead = Lookahead { width, num_levels: ngram_len - 1, pool, random, columns, window, tree };
        lookahead.restart(prompt);
        lookahead
    }

    /// Replaces missing columns by random tokens and lays out the window that begins with the last
    /// token.
    fn build_window(&mut self, tokens: &[i32]) {
        let Lookahead { width, num_levels, .. } = *self;
        let mut random_tokens = Vec::new();
        self.random.fill(&mut random_tokens, (width - self.columns.len()) * num_levels, tokens);
        self.columns.extend(random_tokens.chunks(num_levels).map(<[i32]>::to_vec));
        let last_token = tokens[tokens.len() - 1];
        self.columns[0][0] = last_token;
        self.window.clear();
        self.window.extend((0..num_levels).flat_map(|level| self.columns.iter().map(move |column| column[level])));
        let mut parents: Vec<usize> = (0..width - 1).chain(0..width * (num_levels - 1)).collect();
        for candidate in self.pool.after(last_token) {
            let first = self.window.len();
            self.window.extend(candidate);
            parents.push(0);
            parents.extend(first..self.window.len() - 1);
        }
        self.tree = TokenTree::new(parents);
    }
}

impl Proposer for Lookahead {
    fn draft(&self) -> &[i32] {
        &self.window[1..]
    }

    fn tree(&self) -> Option<&TokenTree> {
        Some(&self.tree)
    }

    fn update(&mut self, verification: &Verification<'_>) {
        let last_level = &verification.predicted[self.width * (self.num_levels - 1)..];
        for (column, &predicted) in self.columns.iter_mut().zip(last_level) {
            column.push(predicted);
            self.pool.add(column);
            column.remove(0);
        }
        // The columns keep their positions, so those at positions before the newest token are
        // dropped.
        self.columns.drain(..verification.num_accepted().min(self.width));
        self.build_window(verification.tokens);
    }

    fn restart(&mut self, tokens: &[i32]) {
        self.columns.clear();
        self.build_window(tokens);
    }
}
