//! Drafts that branch: a window of tokens as a tree, so that one forward verifies several
//! continuations.

/// Maximum number of tokens in a tree: each token has a mask of 64 bits for the tokens that it
/// sees.
pub(super) const MAX_TREE_TOKENS: usize = 64;

/// How a token of a window relates to the others. Offsets count from the window's first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Node {
    /// Offset of the token that this one follows; 0 for the first token.
    pub(super) parent: usize,
    /// Distance from the first token, in positions of the sequence.
    pub(super) depth: usize,
    /// Attention mask within the window: bit i is set if the token sees the one at offset i. Only
    /// windows in order are longer than 64 tokens; there, every token also sees all earlier ones
    /// from offset 64 on.
    pub(super) visible: u64,
}

impl Node {
    /// A node of a window whose tokens follow one another.
    pub(super) fn in_order(offset: usize) -> Self {
        Node { parent: offset.saturating_sub(1), depth: offset, visible: u64::MAX }
    }
}

/// A window that branches. A token comes after its parent, not necessarily directly.
#[derive(Debug)]
pub(super) struct TokenTree(Vec<Node>);

impl TokenTree {
    /// Makes a tree from the parents of all tokens but the first; at most [`MAX_TREE_TOKENS`] - 1
    /// of them.
    pub(super) fn new(parents: impl IntoIterator<Item = usize>) -> Self {
        let mut nodes = vec![Node { parent: 0, depth: 0, visible: 1 }];
        for parent in parents {
            let Node { depth, visible, .. } = nodes[parent];
            nodes.push(Node { parent, depth: depth + 1, visible: visible | 1 << nodes.len() });
        }
        TokenTree(nodes)
    }

    /// Two copies of a window, which do not see each other: its nodes, and then the same nodes
    /// again. At most [`MAX_TREE_TOKENS`] in all.
    pub(super) fn doubled(nodes: &[Node]) -> Self {
        let within = |(offset, node): (usize, &Node)| Node { visible: node.visible & up_to(offset), ..*node };
        let first: Vec<Node> = nodes.iter().enumerate().map(within).collect();
        let shifted = |node: &Node| Node {
            parent: node.parent + nodes.len(),
            depth: node.depth,
            visible: node.visible << nodes.len(),
        };
        TokenTree(first.iter().copied().chain(first.iter().map(shifted)).collect())
    }

    pub(super) fn node(&self, offset: usize) -> Node {
        self.0[offset]
    }
}

/// Mask of the tokens of a window up to an offset below 64.
fn up_to(offset: usize) -> u64 {
    u64::MAX >> (63 - offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_sees_its_ancestors_and_itself() {
        let tree = TokenTree::new([0, 1, 0, 3, 1]);
        let nodes: Vec<_> = (0..6).map(|offset| tree.node(offset)).map(|node| (node.depth, node.visible)).collect();
        assert_eq!(nodes, [(0, 0b1), (1, 0b11), (2, 0b111), (1, 0b1001), (2, 0b11001), (2, 0b100011)]);
        assert_eq!(TokenTree::new(0..63).node(63), Node::in_order(63));
    }

    #[test]
    fn the_copies_of_a_window_do_not_see_each_other() {
        let nodes = |tree: TokenTree, len| {
            (0..len).map(|at| tree.node(at)).map(|node| (node.depth, node.visible)).collect::<Vec<_>>()
        };
        let chain: Vec<Node> = (0..3).map(Node::in_order).collect();
        let doubled = nodes(TokenTree::doubled(&chain), 6);
        assert_eq!(doubled, [(0, 0b1), (1, 0b11), (2, 0b111), (0, 0b1000), (1, 0b11000), (2, 0b111000)]);
        let branching: Vec<Node> = [0, 1, 2].map(|at| TokenTree::new([0, 0]).node(at)).into();
        let doubled = nodes(TokenTree::doubled(&branching), 6);
        assert_eq!(doubled, [(0, 0b1), (1, 0b11), (1, 0b101), (0, 0b1000), (1, 0b11000), (1, 0b101000)]);
    }
}
