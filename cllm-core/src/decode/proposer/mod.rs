//! Proposers: how a strategy drafts the tokens of the next forward.
//!
//! A proposer sees the tokens of one sequence and what each forward predicted, and proposes draft
//! tokens; it never decides which are accepted. Each strategy in `strategy.rs` names the proposer
//! that it uses.

pub(super) mod jacobi;
pub(super) mod likeliest_paths;
pub(super) mod lookahead;
pub(super) mod multi_block;
mod ngram_pool;
pub(super) mod random_draft;
pub(super) mod rolling;
mod tail_pool;

use super::sampling::Candidates;
use super::tree::TokenTree;
use crate::trajectory::Block;
use likeliest_paths::LikeliestPaths;

/// Drafts the tokens of one sequence.
pub(super) trait Proposer {
    /// The draft tokens to forward after the last token.
    fn draft(&self) -> &[i32];

    /// How the window branches, last token included; `None` if each of its tokens follows the one
    /// before it.
    fn tree(&self) -> Option<&TokenTree> {
        None
    }

    /// Makes the next draft from the result of forwarding this one.
    fn update(&mut self, verification: &Verification<'_>);

    /// Makes a draft after the last of `tokens`, the prompt and the answer so far. The tokens before
    /// it were appended without a draft, so what was drafted for their positions is void.
    fn restart(&mut self, tokens: &[i32]);

    /// The proposer itself if others choose how many tokens it drafts.
    fn likeliest_paths(&mut self) -> Option<&mut LikeliestPaths> {
        None
    }

    /// The trajectory of a proposer that recorded one.
    fn into_blocks(self: Box<Self>) -> Vec<Block> {
        Vec::new()
    }
}

/// The result of forwarding a draft. Offsets count from the window's first token, which is the last
/// token of the sequence.
pub(super) struct Verification<'s> {
    /// The token that the model predicts after each token of the window.
    pub(super) predicted: &'s [i32],
    /// The proposal for the token after each token of the window: `predicted`, or the predictions
    /// of a draft model.
    pub(super) proposed: &'s [i32],
    /// The likeliest tokens after each token of the window, for a strategy that needs them; else
    /// empty.
    pub(super) candidates: &'s [Candidates],
    /// Offsets of the accepted tokens: 0 and those of accepted draft tokens. The token predicted
    /// after the last of them is new as well.
    pub(super) path: &'s [usize],
    /// Prompt and answer, new tokens included.
    pub(super) tokens: &'s [i32],
    /// The answer ended before the last of the new tokens, so `tokens` does not hold that one.
    pub(super) is_truncated: bool,
}

impl Verification<'_> {
    /// Number of accepted draft tokens. If the window does not branch, they are its leading draft
    /// tokens.
    pub(super) fn num_accepted(&self) -> usize {
        self.path.len() - 1
    }

    /// The newest token, with which the next window begins. Only for a window that does not branch.
    pub(super) fn last_token(&self) -> i32 {
        self.predicted[self.num_accepted()]
    }

    /// The tokens that were proposed at the positions after the newest token. Only for a window
    /// that does not branch.
    pub(super) fn tail(&self) -> &[i32] {
        &self.proposed[self.num_accepted() + 1..]
    }
}
