//! Backends: what runs a forward.
//!
//! A [`Backend`] owns a KV cache with one row per sequence, in slots. The slot of a token is its
//! position in the sequence; draft tokens occupy the slots after it and, if they are rejected, are
//! overwritten by the next window.

pub(super) mod attention_time;
pub(super) mod cuda_graph;
pub(super) mod cuda_model;
pub(super) mod eager;
pub(super) mod gated;
#[cfg(test)]
mod needs_gpu;
pub(super) mod speculative;

use super::sampling::{Candidates, Sampling, position_key};
use super::tree::{Node, TokenTree};
use crate::Result;
use crate::model::{SlotCopy, SlotMove};

/// Forwards batches of prompt chunks and windows. Rows of the cache are numbered from 0 without
/// gaps.
pub(super) trait Backend {
    /// Starts a forward: caches the chunks, and samples a token after each token of each window.
    /// Window i belongs to row i of the cache; chunks belong to later rows.
    fn launch(&mut self, chunks: &[PromptChunk<'_>], windows: &[Window<'_>], outputs: Outputs) -> Result<()>;

    /// Waits for the forward and returns what it sampled, for each window.
    fn collect(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predictions>>;

    /// Moves keys and values to lower slots. Rows ascend, and so do the slots of a row that are read.
    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()>;

    /// Copies a row of the cache over another.
    fn copy_row(&mut self, from: usize, to: usize) -> Result<()>;

    /// Copies keys and values of neighboring slots to another row.
    fn copy_slots(&mut self, copy: &SlotCopy) -> Result<()>;

    /// Maximum number of prompt tokens in a forward, in addition to its windows.
    fn max_prompt_tokens(&self) -> usize;
}

impl<B: Backend + ?Sized> Backend for &mut B {
    fn launch(&mut self, chunks: &[PromptChunk<'_>], windows: &[Window<'_>], outputs: Outputs) -> Result<()> {
        (**self).launch(chunks, windows, outputs)
    }

    fn collect(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predictions>> {
        (**self).collect(windows)
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()> {
        (**self).move_slots(moves)
    }

    fn copy_row(&mut self, from: usize, to: usize) -> Result<()> {
        (**self).copy_row(from, to)
    }

    fn copy_slots(&mut self, copy: &SlotCopy) -> Result<()> {
        (**self).copy_slots(copy)
    }

    fn max_prompt_tokens(&self) -> usize {
        (**self).max_prompt_tokens()
    }
}

/// What a forward gives after each token of its windows, in addition to the sampled token.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outputs {
    /// The likeliest tokens with their probabilities.
    pub(super) candidates: bool,
}

/// The number of tokens that a forward of `num_tokens` is padded to on a GPU: a power of two, a
/// midpoint between two powers from 64 on, or a multiple of 512 above 1,024. Each size costs a
/// capture and the memory of a graph.
pub(super) fn padded_size(num_tokens: usize) -> usize {
    match num_tokens {
        0 => 0,
        1025.. => num_tokens.next_multiple_of(512),
        _ => {
            let power = num_tokens.next_power_of_two();
            let between = power / 4 * 3;
            if power > 64 && num_tokens <= between { between } else { power }
        }
    }
}

/// Tokens of a prompt to cache.
pub(super) struct PromptChunk<'s> {
    pub(super) row: usize,
    /// Position of the first token.
    pub(super) start: usize,
    /// At least one.
    pub(super) tokens: &'s [i32],
}

/// The tokens of a sequence to forward: its last token, then the draft. The token at offset i
/// occupies slot `start + i`, even if the window branches.
pub(super) struct Window<'s> {
    /// Position of `last_token`.
    pub(super) start: usize,
    pub(super) last_token: i32,
    pub(super) draft: &'s [i32],
    /// How the tokens branch; `None` if each follows the one before it.
    pub(super) tree: Option<&'s TokenTree>,
    /// Number of trailing tokens that the model reads with its adapters for drafts. No other token
    /// sees them.
    pub(super) num_adapted: usize,
    /// Whether the draft is what closes a thought: it is accepted in any case, and nothing is proposed
    /// after it.
    pub(super) is_closing: bool,
    /// How tokens are sampled, and the key of the sequence's noise.
    pub(super) sampling: Sampling,
    pub(super) sequence_key: u64,
}

impl Window<'_> {
    pub(super) fn tokens(&self) -> impl Iterator<Item = i32> {
        std::iter::once(self.last_token).chain(self.draft.iter().copied())
    }

    pub(super) fn len(&self) -> usize {
        1 + self.draft.len()
    }

    /// Offset of the first token that is read with adapters.
    pub(super) fn first_adapted(&self) -> usize {
        self.len() - self.num_adapted
    }

    /// Whether the next draft may be what a second model, or the model with its adapters, proposes
    /// after these tokens.
    pub(super) fn needs_proposals(&self) -> bool {
        !self.draft.is_empty() && !self.is_closing
    }

    pub(super) fn node(&self, offset: usize) -> Node {
        self.tree.map_or(Node::in_order(offset), |tree| tree.node(offset))
    }

    /// Key of the noise that the token after the one at `offset` is sampled with.
    pub(super) fn noise_key(&self, offset: usize) -> u64 {
        position_key(self.sequence_key, self.start + self.node(offset).depth + 1)
    }
}

/// The result of a forward for one window.
pub(super) struct Predictions {
    /// The token sampled after each token of the window.
    pub(super) tokens: Vec<i32>,
    /// The likeliest tokens there, if the forward was to give them; else empty.
    pub(super) candidates: Vec<Candidates>,
    /// The token that the draft model, or the model with its adapters, sampled there, if there is one.
    pub(super) drafted: Option<Vec<i32>>,
}

impl Predictions {
    /// Splits what was sampled for all windows, one window after another.
    fn split(windows: &[Window<'_>], mut tokens: &[i32], mut candidates: &[Candidates]) -> Vec<Self> {
        let take = |window: &Window<'_>| Predictions {
            tokens: take_front(&mut tokens, window.len()),
            candidates: take_front(&mut candidates, window.len()),
            drafted: None,
        };
        windows.iter().map(take).collect()
    }
}

/// Removes the leading `len` values, or all if there are fewer.
fn take_front<T: Copy>(values: &mut &[T], len: usize) -> Vec<T> {
    let (front, rest) = values.split_at(len.min(values.len()));
    *values = rest;
    front.to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn padded_sizes_are_few_and_never_too_small() {
        assert_eq!([0, 1, 3, 17, 33, 65, 97, 500, 1025].map(padded_size), [0, 1, 4, 32, 64, 96, 128, 512, 1536]);
        assert!((1..5000).all(|num_tokens| padded_size(num_tokens) >= num_tokens));
    }
}
