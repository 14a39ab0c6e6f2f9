//! One sequence that yields both losses: prompt, clean response, and noisy blocks that share the response's positions.
//!
//! The idea of packing both streams is Jacobi Forcing's (arXiv 2512.14681).

use cllm_core::model::ALIGNED;
use tch::{Device, Kind, Tensor};

use crate::settings::Reduction;

/// The label of a token that the autoregressive loss passes over.
pub const NO_LABEL: i64 = -100;

/// One noisy state of a block.
#[derive(Debug, Clone, PartialEq)]
pub struct NoisyBlock {
    /// Position of its first token in the response.
    pub start: usize,
    /// The block sees clean tokens before this position of the response, and from there on the noisy blocks before it.
    pub window: usize,
    /// Its tokens, cut at the end of the response.
    pub tokens: Vec<i32>,
    /// The state after it, cut likewise; empty without local consistency.
    pub next: Vec<i32>,
}

/// A packed sequence.
#[derive(Debug, Clone, PartialEq)]
pub struct Packed {
    prompt_len: usize,
    response: Vec<i32>,
    /// Prompt, response, noisy blocks, their next states.
    tokens: Vec<i32>,
    positions: Vec<usize>,
    noisy: Vec<NoisyBlock>,
    /// Whether the response is one that the autoregressive loss teaches.
    labels: bool,
}

impl Packed {
    /// Packs a response and noisy states of its blocks, which are in the order of their starts.
    pub fn new(prompt: &[i32], response: &[i32], noisy: Vec<NoisyBlock>) -> Self {
        let mut tokens = [prompt, response].concat();
        let mut positions: Vec<usize> = (0..tokens.len()).collect();
        let streams =
            noisy.iter().map(|block| (block, &block.tokens)).chain(noisy.iter().map(|block| (block, &block.next)));
        for (block, state) in streams {
            tokens.extend(state);
            positions.extend((0..state.len()).map(|offset| prompt.len() + block.start + offset));
        }
        Packed { prompt_len: prompt.len(), response: response.to_vec(), tokens, positions, noisy, labels: true }
    }

    /// The same, whose response has no part in the autoregressive loss: it only is what noisy blocks are drawn to.
    pub fn without_labels(self) -> Self {
        Packed { labels: false, ..self }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// The noisy blocks.
    pub fn noisy(&self) -> &[NoisyBlock] {
        &self.noisy
    }

    /// Place of each noisy block's first token in the sequence.
    fn places(&self) -> impl Iterator<Item = (usize, &NoisyBlock)> {
        let mut place = self.prompt_len + self.response.len();
        self.noisy.iter().map(move |block| {
            let here = place;
            place += block.tokens.len();
            (here, block)
        })
    }

    /// Place of each block's next state.
    fn next_places(&self) -> impl Iterator<Item = (usize, &NoisyBlock)> {
        let noisy: usize = self.noisy.iter().map(|block| block.tokens.len()).sum();
        let mut place = self.prompt_len + self.response.len() + noisy;
        self.noisy.iter().map(move |block| {
            let here = place;
            place += block.next.len();
            (here, block)
        })
    }

    /// Writes true into the row-major `width x width` mask wherever a token of this sequence may look.
    fn mark(&self, mask: &mut [bool], width: usize) {
        let clean = self.prompt_len + self.response.len();
        for query in 0..clean {
            mask[query * width..][..=query].fill(true);
        }
        let places: Vec<_> = self.places().collect();
        // A next state sees what its block sees: only the states of the blocks before it.
        let noisy = places.iter().enumerate().map(|(index, &(place, block))| (index, place, block, block.tokens.len()));
        let next =
            self.next_places().enumerate().map(|(index, (place, block))| (index, place, block, block.next.len()));
        for (index, place, block, length) in noisy.chain(next) {
            for query in place..place + length {
                let row = &mut mask[query * width..][..width];
                row[..self.prompt_len + block.window.min(block.start)].fill(true);
                for &(earlier, other) in &places[..index] {
                    if other.start >= block.window {
                        row[earlier..earlier + other.tokens.len()].fill(true);
                    }
                }
                row[place..=query].fill(true);
            }
        }
        // Padding looks at itself, since a row of the mask must not be empty.
        for query in self.len()..width {
            mask[query * width + query] = true;
        }
    }

    /// For each noisy token that the loss keeps: its place, and the index of the response token that it predicts. Kept is
    /// what comes at or after the first difference from the clean response in all that the block sees, as long as
    /// the predicted token exists.
    fn noisy_targets(&self) -> Vec<(usize, usize)> {
        let differs = |block: &NoisyBlock| {
            let clean = &self.response[block.start..block.start + block.tokens.len()];
            block.tokens.iter().zip(clean).position(|(noisy, clean)| noisy != clean)
        };
        let mut targets = Vec::new();
        let all: Vec<_> = self.places().collect();
        for (index, &(place, block)) in all.iter().enumerate() {
            let before = all[..index].iter().any(|(_, other)| other.start >= block.window && differs(other).is_some());
            let Some(first) = (if before { Some(0) } else { differs(block) }) else { continue };
            for offset in first..block.tokens.len() {
                let predicted = block.start + offset + 1;
                if predicted < self.response.len() {
                    targets.push((place + offset, predicted));
                }
            }
        }
        targets
    }

    /// For each noisy token of the local loss: its place, and that of the token beside it in the next state. Kept is what
    /// comes at or after the first difference of the two, as long as the predicted token exists.
    fn next_targets(&self) -> Vec<(usize, usize)> {
        let mut targets = Vec::new();
        for ((place, block), (next, _)) in self.places().zip(self.next_places()) {
            let pairs = block.tokens.iter().zip(&block.next);
            let first = pairs.clone().position(|(now, then)| now != then).unwrap_or(block.tokens.len());
            let predicted = self.response.len().saturating_sub(block.start + 1);
            targets.extend((first..pairs.len().min(predicted)).map(|offset| (place + offset, next + offset)));
        }
        targets
    }
}

/// Packed sequences as tensors, padded to the longest and a multiple of [`ALIGNED`].
pub struct Batch {
    /// int64 `[rows, width]`.
    pub tokens: Tensor,
    /// int64 `[rows, width]`.
    pub positions: Tensor,
    /// bool `[rows, 1, width, width]`.
    pub mask: Tensor,
    /// Longest prompt and response of a row: noisy blocks and padding stand behind.
    pub clean_width: i64,
    /// Places (in `[rows * width]`) whose next clean token is a response token: int64 `[clean]`.
    pub clean_places: Tensor,
    /// Those response tokens, or -100 where the autoregressive loss has no part: int64 `[clean]`.
    pub labels: Tensor,
    /// Places of the noisy tokens that are kept: int64 `[noisy]`.
    pub noisy_places: Tensor,
    /// For each of them, the clean place (an index into `clean_places`) that predicts the same token: int64 `[noisy]`.
    pub noisy_targets: Tensor,
    /// Places of the noisy tokens of the local loss: int64 `[local]`.
    pub local_places: Tensor,
    /// For each of them, the place beside it in the next state: int64 `[local]`.
    pub local_targets: Tensor,
    /// Counts on the host.
    pub counts: Counts,
}

/// What a batch holds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counts {
    /// Tokens without padding.
    pub tokens: usize,
    /// Tokens of the responses.
    pub clean: usize,
    /// Tokens of the autoregressive loss.
    pub labels: usize,
    /// Tokens of the consistency loss.
    pub noisy: usize,
    /// Tokens of the local consistency loss.
    pub local: usize,
    /// Noisy blocks.
    pub blocks: usize,
}

impl Counts {
    /// By what the sums of the losses are divided: autoregressive, global, local, anchor.
    pub fn divisors(&self, reduction: Reduction) -> [usize; 4] {
        match reduction {
            Reduction::TokenMean => [self.labels, self.noisy, self.local, self.clean],
        }
    }

    /// Counts of several batches together.
    pub fn add(&mut self, other: Counts) {
        self.tokens += other.tokens;
        self.clean += other.clean;
        self.labels += other.labels;
        self.noisy += other.noisy;
        self.local += other.local;
        self.blocks += other.blocks;
    }
}

impl Batch {
    /// Lays sequences side by side.
    pub fn new(rows: &[Packed], device: Device) -> Self {
        let width = rows.iter().map(Packed::len).max().unwrap_or(0).next_multiple_of(ALIGNED);
        let mut tokens = vec![0i64; rows.len() * width];
        let mut positions = vec![0i64; rows.len() * width];
        let mut mask = vec![false; rows.len() * width * width];
        let (mut clean_places, mut labels, mut noisy_places, mut noisy_targets) = (vec![], vec![], vec![], vec![]);
        let (mut local_places, mut local_targets) = (vec![], vec![]);
        let mut counts = Counts::default();
        for (index, row) in rows.iter().enumerate() {
            let base = index * width;
            for (place, (&token, &position)) in row.tokens.iter().zip(&row.positions).enumerate() {
                tokens[base + place] = i64::from(token);
                positions[base + place] = position as i64;
            }
            row.mark(&mut mask[index * width * width..][..width * width], width);
            let first_clean = clean_places.len();
            // A response token at 0 has no token before it where the prompt is empty.
            for (offset, &token) in row.response.iter().enumerate() {
                clean_places.push((base + (row.prompt_len + offset).saturating_sub(1)) as i64);
                labels.push(if row.labels { i64::from(token) } else { NO_LABEL });
            }
            for (place, predicted) in row.noisy_targets() {
                noisy_places.push((base + place) as i64);
                noisy_targets.push((first_clean + predicted) as i64);
            }
            for (place, next) in row.next_targets() {
                local_places.push((base + place) as i64);
                local_targets.push((base + next) as i64);
            }
            counts.tokens += row.len();
            counts.labels += if row.labels { row.response.len() } else { 0 };
            counts.blocks += row.noisy().len();
        }
        counts.clean = clean_places.len();
        counts.noisy = noisy_places.len();
        counts.local = local_places.len();
        let (count, width) = (rows.len() as i64, width as i64);
        let to = |values: Vec<i64>| Tensor::from_slice(&values).to_device(device);
        Batch {
            tokens: to(tokens).view([count, width]),
            positions: to(positions).view([count, width]),
            clean_width: rows.iter().map(|row| row.prompt_len + row.response.len()).max().unwrap_or(0) as i64,
            mask: Tensor::from_slice(&mask).to_kind(Kind::Bool).view([count, 1, width, width]).to_device(device),
            clean_places: to(clean_places),
            labels: to(labels),
            noisy_places: to(noisy_places),
            noisy_targets: to(noisy_targets),
            local_places: to(local_places),
            local_targets: to(local_targets),
            counts,
        }
    }
}
