//! Sequences packed one after another, on the host.

use crate::cuda::block_mask::AttentionRanges;

#[derive(Debug, Clone, Default, PartialEq)]
pub struct PackedBatch {
    pub tokens: Vec<i32>,
    /// Position of each token in its sequence, for RoPE.
    pub positions: Vec<i32>,
    /// The tokens that each token sees, as ranges of indices in the batch. They are within its own
    /// sequence.
    pub attention_ranges: Vec<AttentionRanges>,
    /// Index one past the last token of each sequence.
    pub sequence_ends: Vec<usize>,
}

impl PackedBatch {
    /// Appends a sequence. `attention_ranges` are indices in the sequence.
    pub fn push(&mut self, tokens: &[i32], positions: &[i32], attention_ranges: &[AttentionRanges]) {
        let base = self.tokens.len() as i32;
        self.tokens.extend(tokens);
        self.positions.extend(positions);
        let shifted = attention_ranges.iter().map(|ranges| ranges.map(|(start, end)| (start + base, end + base)));
        self.attention_ranges.extend(shifted);
        self.sequence_ends.push(self.tokens.len());
    }

    /// Appends a sequence in which every token sees itself and the tokens before it.
    pub fn push_causal(&mut self, tokens: &[i32]) {
        let positions = 0..tokens.len() as i32;
        let ranges: Vec<AttentionRanges> = positions.clone().map(|index| [(0, index + 1), (0, 0), (0, 0)]).collect();
        self.push(tokens, &positions.collect::<Vec<_>>(), &ranges);
    }
}
