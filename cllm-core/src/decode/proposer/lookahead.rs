//! Lookahead decoding (Fu et al., arXiv 2402.02057): a window over future tokens makes n-grams, which are guessed once a known
//! token is their first.

use super::ngram_pool::NgramPool;
use super::{Draws, Guesser, Step};
use crate::decode::tree::Tree;

/// One window of tokens, a tree, holds both branches of the method.
///
/// The lookahead branch has `levels` levels of `width` tokens. The first level begins with the last known token and each of its
/// tokens follows the one before it; a token of another level follows that of the same column one level before, so that it
/// stands one further in the sequence. Columns are trajectories of Jacobi iterations: a forward adds to each the prediction
/// after its last token, which makes it an n-gram for the pool, and takes away its first.
///
/// The verification branch is made of the pool's n-grams that begin with the last known token. Which branch a token stands in
/// does not matter to accepting it: it is final if it is the one predicted after the tokens that it follows.
pub(crate) struct Lookahead {
    width: usize,
    levels: usize,
    pool: NgramPool,
    draws: Draws,
    /// From the left to the right, each from the first level on.
    columns: Vec<Vec<i32>>,
    /// The window, its first token included.
    tokens: Vec<i32>,
    tree: Tree,
}

impl Lookahead {
    pub(crate) fn new(window: usize, ngram: usize, candidates: usize, prompt: &[i32], draws: Draws) -> Self {
        let mut pool = NgramPool::new(candidates);
        prompt.windows(ngram).for_each(|ngram| pool.add(ngram));
        let (columns, tokens, tree) = (Vec::new(), Vec::new(), Tree::new([]));
        let mut made = Lookahead { width: window, levels: ngram - 1, pool, draws, columns, tokens, tree };
        made.arrange(prompt);
        made
    }

    /// Fills up the columns and makes the window that follows the known tokens.
    fn arrange(&mut self, known: &[i32]) {
        let Lookahead { width, levels, .. } = *self;
        let mut drawn = Vec::new();
        self.draws.fill(&mut drawn, (width - self.columns.len()) * levels, known);
        self.columns.extend(drawn.chunks(levels).map(<[i32]>::to_vec));
        let newest = known[known.len() - 1];
        self.columns[0][0] = newest;
        self.tokens.clear();
        self.tokens.extend((0..levels).flat_map(|level| self.columns.iter().map(move |column| column[level])));
        let mut parents: Vec<usize> = (0..width - 1).chain(0..width * (levels - 1)).collect();
        for candidate in self.pool.after(newest) {
            let first = self.tokens.len();
            self.tokens.extend(candidate);
            parents.push(0);
            parents.extend(first..self.tokens.len() - 1);
        }
        self.tree = Tree::new(parents);
    }
}

impl Guesser for Lookahead {
    fn guesses(&self) -> &[i32] {
        &self.tokens[1..]
    }

    fn tree(&self) -> Option<&Tree> {
        Some(&self.tree)
    }

    fn advance(&mut self, step: &Step<'_>) {
        let last_level = &step.predicted[self.width * (self.levels - 1)..];
        for (column, &predicted) in self.columns.iter_mut().zip(last_level) {
            column.push(predicted);
            self.pool.add(column);
            column.remove(0);
        }
        // Columns keep their places in the sequence: those that lie before the newest token now are over.
        self.columns.drain(..step.matched.min(self.width));
        self.arrange(step.known);
    }
}
