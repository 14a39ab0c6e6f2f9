//! Jacobi decoding: fixed blocks, each iterated to its fixed point before the next begins (Song et
//! al., arXiv 2002.03629; CLLM, arXiv 2403.00835). Blocks of one token are autoregressive decoding.

use super::random_draft::RandomDraft;
use super::{Proposer, Verification};
use crate::trajectory::Block;

pub(in crate::decode) struct Jacobi {
    n: usize,
    num_prompt_tokens: usize,
    record_trajectory: bool,
    random: RandomDraft,
    /// The tokens of the block that are not final yet; empty between two blocks, and always for
    /// blocks of one token.
    draft: Vec<i32>,
    /// The trajectory so far, if it is recorded.
    blocks: Vec<Block>,
}

impl Jacobi {
    /// The first forward has no draft: it gives the first token of the first block.
    pub(in crate::decode) fn new(n: usize, prompt: &[i32], record_trajectory: bool, random: RandomDraft) -> Self {
        let (draft, blocks) = (Vec::new(), Vec::new());
        Jacobi { n, num_prompt_tokens: prompt.len(), record_trajectory, random, draft, blocks }
    }

    /// Opens a block: its first token is the last one of the sequence, the others are random.
    fn open_block(&mut self, tokens: &[i32]) {
        self.draft.clear();
        self.random.fill(&mut self.draft, self.n - 1, tokens);
        if self.record_trajectory {
            let last = tokens.len() - 1;
            let state = [&tokens[last..], &self.draft].concat();
            self.blocks.push(Block { start: (last - self.num_prompt_tokens) as u32, states: vec![state] });
        }
    }

    /// Records the state of the open block in which `new_tokens` became final, with `draft` after
    /// them.
    fn record_state(&mut self, new_tokens: &[i32], draft: &[i32]) {
        if !self.record_trajectory {
            return;
        }
        let Some(block) = self.blocks.last_mut() else { return };
        let Some(previous) = block.states.last() else { return };
        let num_final = previous.len() - new_tokens.len() - draft.len();
        let state = [&previous[..num_final], new_tokens, draft].concat();
        block.states.push(state);
    }
}

impl Proposer for Jacobi {
    fn draft(&self) -> &[i32] {
        &self.draft
    }

    fn update(&mut self, verification: &Verification<'_>) {
        let (predicted, num_accepted) = (verification.predicted, verification.num_accepted());
        if num_accepted == self.draft.len() {
            // The block is at its fixed point and the newest token begins the next, unless the
            // answer ended before that.
            if !verification.is_truncated {
                self.open_block(verification.tokens);
            }
        } else {
            // The token predicted after the last draft token belongs to the next block.
            let next_draft = predicted[num_accepted + 1..self.draft.len()].to_vec();
            self.record_state(&predicted[..=num_accepted], &next_draft);
            self.draft = next_draft;
        }
    }

    fn restart(&mut self, tokens: &[i32]) {
        self.open_block(tokens);
    }

    fn into_blocks(self: Box<Self>) -> Vec<Block> {
        self.blocks
    }
}
