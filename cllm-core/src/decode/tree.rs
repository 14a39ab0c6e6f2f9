//! What a row forwards in one step: tokens in order, or branching as a tree.

use super::sampling as noise;

/// Most tokens of a window that branches: what a token sees of it is told in 64 bits.
pub(crate) const MOST_ENTRIES: usize = 64;

/// Where a token of a window stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Offset in the window of the token that it follows; 0 for the first token.
    pub(crate) parent: usize,
    /// Tokens of the window that it follows, one after another.
    pub(crate) depth: usize,
    /// Bit i: it sees the token at offset i. Tokens at offset 64 and above are in order, and seen by all behind them.
    pub(crate) visible: u64,
}

impl Place {
    /// In a window of which each token follows the one before it.
    pub(crate) fn in_order(offset: usize) -> Self {
        Place { parent: offset.saturating_sub(1), depth: offset, visible: u64::MAX }
    }
}

/// A window that branches; a token stands behind the one that it follows.
#[derive(Debug)]
pub(crate) struct Tree(Vec<Place>);

impl Tree {
    /// From the offsets of the tokens that the second token and those behind it follow; at most [`MOST_ENTRIES`] - 1.
    pub(crate) fn new(parents: impl IntoIterator<Item = usize>) -> Self {
        let mut places = vec![Place { parent: 0, depth: 0, visible: 1 }];
        for parent in parents {
            let Place { depth, visible, .. } = places[parent];
            places.push(Place { parent, depth: depth + 1, visible: visible | 1 << places.len() });
        }
        Tree(places)
    }

    pub(crate) fn place(&self, offset: usize) -> Place {
        self.0[offset]
    }
}

/// The tokens of a row to forward: the last known one and the guesses after it.
pub(crate) struct Window<'r> {
    pub(crate) row: usize,
    /// Position of `known` in the sequence.
    pub(crate) start: usize,
    pub(crate) known: i32,
    pub(crate) guesses: &'r [i32],
    /// How the tokens branch; without it, each follows the one before it. The token at an offset has that slot after `start`.
    pub(crate) tree: Option<&'r Tree>,
    /// Key of the row's randomness.
    pub(crate) key: u64,
}

impl Window<'_> {
    pub(crate) fn tokens(&self) -> impl Iterator<Item = i32> {
        std::iter::once(self.known).chain(self.guesses.iter().copied())
    }

    pub(crate) fn len(&self) -> usize {
        1 + self.guesses.len()
    }

    pub(crate) fn place(&self, offset: usize) -> Place {
        self.tree.map_or(Place::in_order(offset), |tree| tree.place(offset))
    }

    /// Key of the noise at the position after a token.
    pub(crate) fn noise_key(&self, offset: usize) -> u64 {
        noise::position_key(self.key, self.start + self.place(offset).depth + 1)
    }

    /// Offsets of the longest sequence of tokens, from the first on, each of which is the one predicted after the one before.
    pub(crate) fn agreed(&self, predicted: &[i32]) -> Vec<usize> {
        let mut agrees = vec![true];
        let (mut path, mut most) = (vec![0], 0);
        for (offset, token) in self.tokens().enumerate().skip(1) {
            let Place { parent, depth, .. } = self.place(offset);
            agrees.push(agrees[parent] && predicted[parent] == token);
            if agrees[offset] && depth > most {
                (path[0], most) = (offset, depth);
            }
        }
        while let Some(&first) = path.last().filter(|&&first| first > 0) {
            path.push(self.place(first).parent);
        }
        path.reverse();
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_sees_what_it_follows_and_itself() {
        let tree = Tree::new([0, 1, 0, 3, 1]);
        let places: Vec<_> =
            (0..6).map(|offset| tree.place(offset)).map(|place| (place.depth, place.visible)).collect();
        assert_eq!(places, [(0, 0b1), (1, 0b11), (2, 0b111), (1, 0b1001), (2, 0b11001), (2, 0b100011)]);
        let last = Tree::new(0..63).place(63);
        assert_eq!(last, Place::in_order(63));
    }

    #[test]
    fn the_longest_branch_that_agrees_is_taken() {
        // 5 is followed by 6 and 7 in one branch, by 6, 8 and 9 in another.
        let (tree, guesses) = (Tree::new([0, 1, 0, 3, 4]), [6, 7, 6, 8, 9]);
        let window = |tree| Window { row: 0, start: 0, known: 5, guesses: &guesses, tree, key: 0 };
        let agreed = |predicted: [i32; 6]| window(Some(&tree)).agreed(&predicted);
        assert_eq!(agreed([6, 8, 0, 8, 9, 0]), [0, 3, 4, 5]);
        assert_eq!(agreed([6, 7, 0, 7, 9, 0]), [0, 1, 2]);
        assert_eq!(agreed([6, 1, 0, 1, 9, 0]), [0, 1], "the first of two that are equal");
        assert_eq!(agreed([1, 7, 0, 8, 9, 0]), [0], "behind a wrong token nothing counts");
        assert_eq!(window(None).agreed(&[6, 7, 6, 1, 9, 0]), [0, 1, 2, 3]);
    }
}
