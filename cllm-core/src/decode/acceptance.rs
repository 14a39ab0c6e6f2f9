//! The acceptance rule. A draft token is accepted if it is the token that the model samples at its
//! position, given a prefix of accepted tokens. The answer is therefore the model's own, token for
//! token.

use super::backend::Window;
use super::tree::Node;

/// Returns the offsets of the accepted tokens, in the order of their positions. The path begins
/// with offset 0, the last token of the sequence; each token after it equals the one `predicted`
/// after its parent. If a tree has several such paths, the longest is returned, or among equally
/// long ones the one that ends first in the window.
pub(super) fn accepted_path(window: &Window<'_>, predicted: &[i32]) -> Vec<usize> {
    let mut is_accepted = vec![true];
    let (mut end, mut max_depth) = (0, 0);
    for (offset, token) in window.tokens().enumerate().skip(1) {
        let Node { parent, depth, .. } = window.node(offset);
        is_accepted.push(is_accepted[parent] && predicted[parent] == token);
        if is_accepted[offset] && depth > max_depth {
            (end, max_depth) = (offset, depth);
        }
    }
    let mut path = vec![end];
    while end > 0 {
        end = window.node(end).parent;
        path.push(end);
    }
    path.reverse();
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::sampling::Sampling;
    use crate::decode::tree::TokenTree;

    #[test]
    fn the_longest_branch_that_equals_its_predictions_is_accepted() {
        // 5 is followed by 6 and 7 in one branch, by 6, 8 and 9 in another.
        let (tree, draft) = (TokenTree::new([0, 1, 0, 3, 4]), [6, 7, 6, 8, 9]);
        let sampling = Sampling::Greedy;
        let window = |tree| Window {
            start: 0,
            last_token: 5,
            draft: &draft,
            tree,
            num_adapted: 0,
            is_closing: false,
            sampling,
            sequence_key: 0,
        };
        let path = |predicted: [i32; 6]| accepted_path(&window(Some(&tree)), &predicted);
        assert_eq!(path([6, 8, 0, 8, 9, 0]), [0, 3, 4, 5]);
        assert_eq!(path([6, 7, 0, 7, 9, 0]), [0, 1, 2]);
        assert_eq!(path([6, 1, 0, 1, 9, 0]), [0, 1], "the first of two equally long paths");
        assert_eq!(path([1, 7, 0, 8, 9, 0]), [0], "nothing after a rejected token is accepted");
        assert_eq!(accepted_path(&window(None), &[6, 7, 6, 1, 9, 0]), [0, 1, 2, 3]);
    }
}
