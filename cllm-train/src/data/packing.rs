//! Packs an example into one sequence that yields every loss: the prompt, the clean response, and
//! noisy blocks that share the response's position ids. An attention mask shows each noisy block
//! only the context that it would have when decoding.
//!
//! Packing the clean and the noisy tokens together is an idea of Jacobi Forcing (arXiv 2512.14681).

use std::ops::Range;

use cllm_core::train::AttentionRanges;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::data::dataset::Example;
use crate::data::state_sampling::{sample_num_tokens, sample_state};
use crate::settings::{BlockContext, ConsistencySettings};

const EMPTY_RANGE: (i32, i32) = (0, 0);

/// One noisy state of a block.
#[derive(Debug, Clone, PartialEq)]
pub struct NoisyBlock {
    /// Counts the states of the same block. Blocks attend only to noisy blocks of the same draw.
    pub draw: usize,
    /// Position of its first token in the response.
    pub start: usize,
    /// The block attends to clean tokens before this position of the response, and from there on to
    /// the noisy blocks before it.
    pub window_start: usize,
    /// Token ids of the state, cut at the end of the response or before.
    pub state: Vec<i32>,
    /// Token ids of the next state, cut at the same token; empty without local
    /// consistency.
    pub next_state: Vec<i32>,
}

/// An example as one sequence: prompt, response, noisy states, next states. Indices count its
/// tokens from 0.
#[derive(Debug, Clone, PartialEq)]
pub struct PackedSequence {
    prompt_ids: Vec<i32>,
    pub(crate) response_ids: Vec<i32>,
    noisy_blocks: Vec<NoisyBlock>,
    /// For each token of the response, whether the autoregressive loss teaches it.
    pub(crate) labelled: Vec<bool>,
}

impl PackedSequence {
    /// A response with noisy states of some of its blocks, which are sorted by their draw, and then
    /// by their start.
    pub fn new(prompt_ids: &[i32], response_ids: &[i32], noisy_blocks: Vec<NoisyBlock>) -> Self {
        PackedSequence {
            prompt_ids: prompt_ids.to_vec(),
            response_ids: response_ids.to_vec(),
            noisy_blocks,
            labelled: vec![true; response_ids.len()],
        }
    }

    /// Draws blocks of an example, and noisy states of each.
    pub fn sample(example: &Example, consistency: &ConsistencySettings, rng: &mut ChaCha8Rng) -> Self {
        let mut block_indices = example.candidate_blocks(consistency);
        if let Some(max_blocks) = consistency.max_blocks {
            block_indices.shuffle(rng);
            block_indices.truncate(max_blocks);
            block_indices.sort_unstable();
        }
        let mut noisy_blocks = Vec::new();
        let mut drawn: Vec<Vec<usize>> = vec![Vec::new(); block_indices.len()];
        for draw in 0..consistency.states_per_block {
            for (&index, drawn) in block_indices.iter().zip(&mut drawn) {
                if draw < example.num_draws(index, consistency) {
                    let (index_in_run, states) = (example.contiguous_run(index).1, &example.blocks[index].states);
                    let state = sample_state(states, drawn, index_in_run, consistency, rng);
                    drawn.push(state);
                    let num_tokens = sample_num_tokens(states, state, consistency, rng);
                    noisy_blocks.push(noisy_block(example, index, draw, (state, num_tokens), consistency));
                }
            }
        }
        let sequence = PackedSequence::new(&example.prompt_ids, &example.response_ids, noisy_blocks);
        PackedSequence { labelled: example.labelled.clone(), ..sequence }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        let num_noisy_tokens = |block: &NoisyBlock| block.state.len() + block.next_state.len();
        self.num_clean_tokens() + self.noisy_blocks.iter().map(num_noisy_tokens).sum::<usize>()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn prompt_len(&self) -> usize {
        self.prompt_ids.len()
    }

    pub(crate) fn token_ids(&self) -> Vec<i32> {
        let states = self.noisy_blocks.iter().map(|block| &block.state);
        let next_states = self.noisy_blocks.iter().map(|block| &block.next_state);
        let parts = [&self.prompt_ids, &self.response_ids].into_iter().chain(states).chain(next_states);
        parts.flatten().copied().collect()
    }

    /// Position id of each token. A noisy token has that of the response token that it replaces.
    pub(crate) fn positions(&self) -> Vec<i32> {
        let states = self.noisy_blocks.iter().map(|block| (block.start, block.state.len()));
        let next_states = self.noisy_blocks.iter().map(|block| (block.start, block.next_state.len()));
        let of_block = |(start, len): (usize, usize)| self.prompt_len() + start..self.prompt_len() + start + len;
        let of_blocks = states.chain(next_states).flat_map(of_block);
        (0..self.num_clean_tokens()).chain(of_blocks).map(|position| position as i32).collect()
    }

    /// Number of tokens of the prompt and the response.
    pub(crate) fn num_clean_tokens(&self) -> usize {
        self.prompt_len() + self.response_ids.len()
    }

    pub fn noisy_blocks(&self) -> &[NoisyBlock] {
        &self.noisy_blocks
    }

    /// Index of the first token of each noisy state.
    fn state_starts(&self) -> Vec<usize> {
        running_starts(self.num_clean_tokens(), self.noisy_blocks.iter().map(|block| block.state.len()))
    }

    /// Index of the first token of each next state.
    fn next_state_starts(&self) -> Vec<usize> {
        let num_noisy_tokens: usize = self.noisy_blocks.iter().map(|block| block.state.len()).sum();
        let start = self.num_clean_tokens() + num_noisy_tokens;
        running_starts(start, self.noisy_blocks.iter().map(|block| block.next_state.len()))
    }

    /// The indices that each token attends to.
    pub(crate) fn attention_ranges(&self) -> Vec<AttentionRanges> {
        let causal = |start: i32, index: usize| (start, index as i32 + 1);
        let mut ranges: Vec<AttentionRanges> =
            (0..self.num_clean_tokens()).map(|index| [causal(0, index), EMPTY_RANGE, EMPTY_RANGE]).collect();
        let starts = self.state_starts();
        // Blocks of a draw are sorted by their start, so the noisy blocks that one attends to are the
        // ones right before it.
        let window_starts: Vec<i32> = (0..starts.len())
            .map(|number| {
                let NoisyBlock { draw, window_start, .. } = self.noisy_blocks[number];
                let is_before = |other: &NoisyBlock| (other.draw, other.start) < (draw, window_start);
                starts[self.noisy_blocks[..number].partition_point(is_before)] as i32
            })
            .collect();
        let clean = |block: &NoisyBlock| (0, (self.prompt_len() + block.window_start.min(block.start)) as i32);
        for ((block, &start), &window_start) in self.noisy_blocks.iter().zip(&starts).zip(&window_starts) {
            let indices = start..start + block.state.len();
            ranges.extend(indices.map(|index| [clean(block), causal(window_start, index), EMPTY_RANGE]));
        }
        // A next state attends to the same tokens as its block, but to its own tokens in place of
        // the block's.
        let next_starts = self.next_state_starts();
        for (number, (block, &start)) in self.noisy_blocks.iter().zip(&next_starts).enumerate() {
            let before = (window_starts[number], starts[number] as i32);
            let indices = start..start + block.next_state.len();
            ranges.extend(indices.map(|index| [clean(block), before, causal(start as i32, index)]));
        }
        ranges
    }

    /// For each noisy block, its tokens in the global loss: the index of each, and the position in the
    /// response of the token that it predicts.
    pub(crate) fn global_targets(&self) -> Vec<Vec<(usize, usize)>> {
        let blocks = self.noisy_blocks.iter().zip(self.state_starts()).zip(self.global_offsets());
        let targets = |((block, start), offsets): ((&NoisyBlock, usize), Range<usize>)| {
            let first_predicted = block.start + 1;
            offsets.map(|offset| (start + offset, first_predicted + offset)).collect()
        };
        blocks.map(targets).collect()
    }

    /// For each noisy block, the offsets of its tokens in the global loss: from the first one at
    /// which the noisy context differs from the clean one, up to the end of the response.
    pub(crate) fn global_offsets(&self) -> Vec<Range<usize>> {
        let first_difference = |block: &NoisyBlock| {
            let clean = &self.response_ids[block.start..block.start + block.state.len()];
            block.state.iter().zip(clean).position(|(noisy, clean)| noisy != clean)
        };
        let differences: Vec<Option<usize>> = self.noisy_blocks.iter().map(first_difference).collect();
        let offsets = |number: usize| {
            let block = &self.noisy_blocks[number];
            let in_window = |&other: &usize| {
                let other = &self.noisy_blocks[other];
                other.draw == block.draw && other.start >= block.window_start
            };
            let context_differs = (0..number).rev().take_while(in_window).any(|other| differences[other].is_some());
            let first = if context_differs { Some(0) } else { differences[number] };
            let end = self.num_predicted(block).min(block.state.len());
            first.map_or(0..0, |first| first..end.max(first))
        };
        (0..self.noisy_blocks.len()).map(offsets).collect()
    }

    /// For each noisy token in the local loss: its index, and the index of its counterpart in the
    /// next state.
    pub(crate) fn local_targets(&self) -> Vec<(usize, usize)> {
        let starts = self.state_starts().into_iter().zip(self.next_state_starts());
        let targets = |((start, next_start), offsets): ((usize, usize), Range<usize>)| {
            offsets.map(move |offset| (start + offset, next_start + offset))
        };
        starts.zip(self.local_offsets()).flat_map(targets).collect()
    }

    /// For each noisy block, the offsets of its tokens in the local loss: from the first one at
    /// which the two states differ, up to the end of the response.
    pub(crate) fn local_offsets(&self) -> Vec<Range<usize>> {
        let offsets = |block: &NoisyBlock| {
            let pairs = block.state.iter().zip(&block.next_state);
            let first = pairs.clone().position(|(now, next)| now != next).unwrap_or(pairs.len());
            first..self.num_predicted(block).min(pairs.len()).max(first)
        };
        self.noisy_blocks.iter().map(offsets).collect()
    }

    /// Number of response tokens after the first one of a block.
    fn num_predicted(&self, block: &NoisyBlock) -> usize {
        self.response_ids.len().saturating_sub(block.start + 1)
    }
}

/// The noisy block of a state that was drawn, cut after some tokens.
fn noisy_block(
    example: &Example,
    block_index: usize,
    draw: usize,
    (drawn, num_tokens): (usize, usize),
    consistency: &ConsistencySettings,
) -> NoisyBlock {
    let block = &example.blocks[block_index];
    let state = &block.states[drawn];
    // Windows are counted anew after a thought that was closed at its limit, since its closing
    // tokens are in no block.
    let (run_start, _) = example.contiguous_run(block_index);
    let window_start = match consistency.context {
        BlockContext::Clean => block.start,
        BlockContext::NoisyWindow => {
            let window_tokens = state.len() * consistency.window_blocks;
            block.start - (block.start - run_start) % window_tokens
        }
    };
    let num_tokens = num_tokens.min(example.response_ids.len() - block.start);
    let next_state = match block.next_state(drawn) {
        Some(next_state) if consistency.local_weight > 0.0 => next_state[..num_tokens].to_vec(),
        _ => Vec::new(),
    };
    NoisyBlock { draw, start: block.start, window_start, state: state[..num_tokens].to_vec(), next_state }
}

/// The start of each part, when parts of these lengths follow one another from `start`.
fn running_starts(start: usize, lengths: impl Iterator<Item = usize>) -> Vec<usize> {
    let next_start = |next: &mut usize, length: usize| {
        let start = *next;
        *next += length;
        Some(start)
    };
    lengths.scan(start, next_start).collect()
}
