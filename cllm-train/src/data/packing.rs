//! One sequence that yields both losses: prompt, clean response, and noisy blocks that share the response's positions.
//!
//! The idea of packing both streams is Jacobi Forcing's (arXiv 2512.14681).

use cllm_core::train::{AttentionRanges, PackedBatch};

/// The label of a token that the autoregressive loss passes over.
pub const NO_LABEL: i64 = -100;
/// An empty range.
const NOTHING: (i32, i32) = (0, 0);

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
    positions: Vec<i32>,
    noisy: Vec<NoisyBlock>,
    /// Whether the response is one that the autoregressive loss teaches.
    labels: bool,
}

impl Packed {
    /// Packs a response and noisy states of its blocks, which are in the order of their starts.
    pub fn new(prompt: &[i32], response: &[i32], noisy: Vec<NoisyBlock>) -> Self {
        let mut tokens = [prompt, response].concat();
        let mut positions: Vec<i32> = (0..tokens.len() as i32).collect();
        let streams =
            noisy.iter().map(|block| (block, &block.tokens)).chain(noisy.iter().map(|block| (block, &block.next)));
        for (block, state) in streams {
            tokens.extend(state);
            positions.extend((0..state.len()).map(|offset| (prompt.len() + block.start + offset) as i32));
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

    /// What each token sees, in places of this sequence.
    fn seen(&self) -> Vec<AttentionRanges> {
        let until = |place: usize| place as i32 + 1;
        let clean = self.prompt_len + self.response.len();
        let mut seen: Vec<AttentionRanges> = (0..clean).map(|place| [(0, until(place)), NOTHING, NOTHING]).collect();
        let places: Vec<_> = self.places().collect();
        // The blocks before one that it sees stand together, right before it: blocks are in the order of their starts.
        let first_seen = |index: usize, window: usize| {
            let first = places[..index].iter().find(|(_, other)| other.start >= window);
            first.map_or(places[index].0, |&(place, _)| place) as i32
        };
        let clean_of = |block: &NoisyBlock| (0, (self.prompt_len + block.window.min(block.start)) as i32);
        for (index, &(place, block)) in places.iter().enumerate() {
            let first = first_seen(index, block.window);
            seen.extend(
                (place..place + block.tokens.len()).map(|query| [clean_of(block), (first, until(query)), NOTHING]),
            );
        }
        // A next state sees what its block sees: only the states of the blocks before it.
        for (index, (place, block)) in self.next_places().enumerate() {
            let before = (first_seen(index, block.window), places[index].0 as i32);
            seen.extend(
                (place..place + block.next.len()).map(|query| [clean_of(block), before, (place as i32, until(query))]),
            );
        }
        seen
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

/// Packed sequences one behind another, and what the losses take of them, on the host.
pub struct Batch {
    /// All sequences.
    pub stream: PackedBatch,
    /// Their prompts and responses alone, for the frozen teacher; empty where none is asked.
    pub clean: PackedBatch,
    /// Every response token, and the noisy tokens that are kept.
    pub chunks: Vec<Chunk>,
    /// Every noisy token of the local loss.
    pub local: Vec<LocalChunk>,
    /// What it holds.
    pub counts: Counts,
}

/// So much of a batch that its logits may exist at once.
#[derive(Debug, Default, PartialEq)]
pub struct Chunk {
    /// Places before response tokens, and those of prompts that the anchor holds.
    pub places: Vec<i64>,
    /// The tokens after them, [`NO_LABEL`] where the autoregressive loss has no part.
    pub labels: Vec<i64>,
    /// The same places in the clean stream.
    pub clean_places: Vec<i64>,
    /// Places of noisy tokens.
    pub noisy: Vec<i64>,
    /// For each of them, which of `places` predicts the same token.
    pub targets: Vec<i64>,
}

/// Likewise, for the local loss.
#[derive(Debug, Default, PartialEq)]
pub struct LocalChunk {
    /// Places of noisy tokens.
    pub places: Vec<i64>,
    /// For each of them, the place beside it in the next state.
    pub next: Vec<i64>,
}

/// What a batch holds.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counts {
    /// Tokens without padding.
    pub tokens: usize,
    /// Tokens of the responses.
    pub clean: usize,
    /// Tokens of the anchor.
    pub anchored: usize,
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
    pub fn divisors(&self) -> [usize; 4] {
        [self.labels, self.noisy, self.local, self.anchored]
    }

    /// Counts of several batches together.
    pub fn add(&mut self, other: Counts) {
        self.tokens += other.tokens;
        self.clean += other.clean;
        self.anchored += other.anchored;
        self.labels += other.labels;
        self.noisy += other.noisy;
        self.local += other.local;
        self.blocks += other.blocks;
    }
}

impl Batch {
    /// Packs sequences. `rows`: most logits at once; `anchor`: where a frozen model reads the clean part too, the share of the
    /// prompts' tokens that it holds besides the responses.
    pub fn new(sequences: &[Packed], rows: usize, anchor: Option<f64>) -> Self {
        let (mut stream, mut clean, mut counts) = (PackedBatch::default(), PackedBatch::default(), Counts::default());
        let (mut chunks, mut local) = (vec![Chunk::default()], vec![LocalChunk::default()]);
        for sequence in sequences {
            let base = stream.tokens.len();
            let clean_base = clean.tokens.len();
            stream.push(&sequence.tokens, &sequence.positions, &sequence.seen());
            if let Some(share) = anchor {
                clean.push_causal(&sequence.tokens[..sequence.prompt_len + sequence.response.len()]);
                for place in spread(share, sequence.prompt_len.saturating_sub(1)) {
                    Chunk::add(&mut chunks, rows, (base + place, clean_base + place, NO_LABEL), Vec::new());
                    counts.anchored += 1;
                }
                counts.anchored += sequence.response.len();
            }
            let mut noisy = vec![Vec::new(); sequence.response.len()];
            for (place, predicted) in sequence.noisy_targets() {
                noisy[predicted].push((base + place) as i64);
                counts.noisy += 1;
            }
            for (offset, (&label, noisy)) in sequence.response.iter().zip(noisy).enumerate() {
                // A response token at 0 has no token before it where the prompt is empty.
                let before = (sequence.prompt_len + offset).saturating_sub(1);
                let label = if sequence.labels { i64::from(label) } else { NO_LABEL };
                Chunk::add(&mut chunks, rows, (base + before, clean_base + before, label), noisy);
            }
            for (place, next) in sequence.next_targets() {
                if local[local.len() - 1].places.len() >= rows {
                    local.push(LocalChunk::default());
                }
                let last = local.len() - 1;
                local[last].places.push((base + place) as i64);
                local[last].next.push((base + next) as i64);
                counts.local += 1;
            }
            counts.tokens += sequence.len();
            counts.clean += sequence.response.len();
            counts.labels += if sequence.labels { sequence.response.len() } else { 0 };
            counts.blocks += sequence.noisy().len();
        }
        local.retain(|chunk| !chunk.places.is_empty());
        Batch { stream, clean, chunks, local, counts }
    }
}

/// A share of the first `count` places, evenly spread.
fn spread(share: f64, count: usize) -> impl Iterator<Item = usize> {
    let before = move |place: usize| (place as f64 * share) as usize;
    (0..count).filter(move |&place| before(place + 1) > before(place))
}

impl Chunk {
    /// Adds a response token, and the noisy tokens before which its distribution is the target, to the last chunk or a new one.
    fn add(chunks: &mut Vec<Chunk>, rows: usize, clean: (usize, usize, i64), noisy: Vec<i64>) {
        let full = |chunk: &Chunk| chunk.labels.len() + chunk.noisy.len() + 1 + noisy.len() > rows;
        if chunks.last().is_some_and(|chunk| !chunk.labels.is_empty() && full(chunk)) {
            chunks.push(Chunk::default());
        }
        let last = chunks.len() - 1;
        let chunk = &mut chunks[last];
        chunk.targets.extend(noisy.iter().map(|_| chunk.labels.len() as i64));
        chunk.noisy.extend(noisy);
        chunk.places.push(clean.0 as i64);
        chunk.clean_places.push(clean.1 as i64);
        chunk.labels.push(clean.2);
    }
}
