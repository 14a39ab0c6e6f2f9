//! Fixed blocks, iterated to their fixed point one after another (Song et al., arXiv 2002.03629; CLLM, 2403.00835). With
//! n = 1 it is autoregressive decoding.

use super::{Draws, Guesser, Step};
use crate::trajectory::Block;

pub(crate) struct Jacobi {
    n: usize,
    prompt_tokens: usize,
    record: bool,
    draws: Draws,
    /// The open block's tokens that are not known yet; none between two blocks, and always when n = 1.
    guesses: Vec<i32>,
    blocks: Vec<Block>,
}

impl Jacobi {
    /// The first forward has no guesses: it yields the first block's first token.
    pub(crate) fn new(n: usize, prompt_tokens: usize, record: bool, draws: Draws) -> Self {
        Jacobi { n, prompt_tokens, record, draws, guesses: Vec::new(), blocks: Vec::new() }
    }

    /// The last known token is the first of a new block; the others are drawn from the tokens seen so far.
    fn open_block(&mut self, known: &[i32]) {
        self.guesses.clear();
        self.draws.fill(&mut self.guesses, self.n - 1, known);
        if self.record {
            let last = known.len() - 1;
            let mut state = vec![known[last]];
            state.extend(&self.guesses);
            self.blocks.push(Block { start: (last - self.prompt_tokens) as u32, states: vec![state] });
        }
    }

    fn record_state(&mut self, fixed: &[i32], guesses: &[i32]) {
        if !self.record {
            return;
        }
        let Some(block) = self.blocks.last_mut() else { return };
        let Some(last) = block.states.last() else { return };
        let known = last.len() - fixed.len() - guesses.len();
        let mut state = last[..known].to_vec();
        state.extend(fixed);
        state.extend(guesses);
        block.states.push(state);
    }
}

impl Guesser for Jacobi {
    fn guesses(&self) -> &[i32] {
        &self.guesses
    }

    fn advance(&mut self, step: &Step<'_>) {
        if step.matched == self.guesses.len() {
            // All of the old block was right already, unless the answer ended inside it: the last token opens a block.
            if !step.cut {
                self.open_block(step.known);
            }
        } else {
            // The prediction after the last guess belongs to the next block.
            let next_guesses = step.predicted[step.matched + 1..self.guesses.len()].to_vec();
            self.record_state(&step.predicted[..=step.matched], &next_guesses);
            self.guesses = next_guesses;
        }
    }

    fn blocks(self: Box<Self>) -> Vec<Block> {
        self.blocks
    }
}
