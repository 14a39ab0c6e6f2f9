//! Sequences packed one after another, on the host.

use std::borrow::Cow;

use crate::cuda::block_mask::AttentionRanges;
use crate::model::{ModelConfig, PerWindow};

#[derive(Debug, Clone, Default, PartialEq)]
pub struct PackedBatch {
    pub tokens: Vec<i32>,
    /// Position of each token in its sequence, for RoPE.
    pub positions: Vec<i32>,
    /// The tokens that each token sees, as ranges of indices in the batch. They are within its own
    /// sequence. Within a range, positions ascend up to the token's own.
    pub attention_ranges: Vec<AttentionRanges>,
    /// Index one past the last token of each sequence.
    pub sequence_ends: Vec<usize>,
    /// Indices of the draft tokens, for adapters that act on these alone. No other token attends to
    /// them.
    pub draft_rows: Vec<i64>,
}

impl PackedBatch {
    /// Appends a sequence, whose tokens from index `first_draft` on are drafts.
    /// `attention_ranges` are indices in the sequence.
    pub fn push(
        &mut self,
        tokens: &[i32],
        positions: &[i32],
        attention_ranges: &[AttentionRanges],
        first_draft: usize,
    ) {
        let base = self.tokens.len() as i32;
        self.draft_rows.extend((first_draft..tokens.len()).map(|index| i64::from(base) + index as i64));
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
        self.push(tokens, &positions.collect::<Vec<_>>(), &ranges, tokens.len());
    }

    /// Pairs of tokens that attention does not mask, summed over the layers of a model.
    pub fn num_attended_pairs(&self, config: &ModelConfig) -> usize {
        let num_pairs = PerWindow::new(config, |window| {
            let ranges = self.ranges_within(window);
            ranges.iter().flatten().map(|(start, end)| (end - start).max(0) as usize).sum::<usize>()
        });
        config.sliding_windows.iter().map(|&window| num_pairs.get(window)).sum()
    }

    /// The attention ranges in layers with a sliding window: the last `window` positions up to a
    /// token's own.
    pub(super) fn ranges_within(&self, window: Option<i32>) -> Cow<'_, [AttentionRanges]> {
        let Some(window) = window else { return Cow::Borrowed(&self.attention_ranges) };
        let within = |(ranges, &position): (&AttentionRanges, &i32)| {
            ranges.map(|(start, end)| {
                let positions = &self.positions[start as usize..end.max(start) as usize];
                let num_before = positions.partition_point(|&other| position - other >= window);
                (start + num_before as i32, end)
            })
        };
        Cow::Owned(self.attention_ranges.iter().zip(&self.positions).map(within).collect())
    }
}
