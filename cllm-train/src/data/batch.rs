//! Joins packed sequences into a batch, and notes for each loss which rows of the hidden states it
//! needs. A row is the index of a token in the batch; the hidden state of a row predicts the token
//! after it.
//!
//! The vocabulary is applied to one chunk of rows at a time, since the logits of a whole batch
//! would not fit into memory. The rows of a noisy block are in one chunk.

use std::collections::BTreeMap;

use cllm_core::model::ModelConfig;
use cllm_core::train::PackedBatch;

use crate::data::packing::PackedSequence;
use crate::losses::Losses;

/// The label of a row that is not in the autoregressive loss.
pub const NO_LABEL: i64 = -100;
/// Maximum number of rows in a chunk for our kernels, which hold its logits once, in bfloat16. Each
/// chunk reads the output projection, and reads and writes its gradient. With fewer rows, that would
/// take longer than the arithmetic.
const MAX_CHUNK_ROWS: usize = 4096;
/// Maximum number of logits in a chunk for libtorch's operations: 256 MiB in float32, for each of a
/// few copies.
const MAX_EAGER_CHUNK_LOGITS: usize = 1 << 26;

/// The maximum number of rows in a chunk for a model with this vocabulary, whose losses our kernels
/// compute or libtorch's operations.
pub fn max_chunk_rows(config: &ModelConfig, has_kernels: bool) -> usize {
    match has_kernels {
        true => MAX_CHUNK_ROWS,
        false => (MAX_EAGER_CHUNK_LOGITS / config.vocab_size as usize).max(1),
    }
}

/// Packed sequences and the rows that the losses need, on the host.
pub struct Batch {
    pub packed: PackedBatch,
    /// The prompts and responses alone, for the frozen model; empty without an anchor.
    pub clean: PackedBatch,
    /// Rows of the autoregressive, global and anchor losses.
    pub chunks: Vec<Chunk>,
    /// Rows of the local loss.
    pub local_chunks: Vec<LocalChunk>,
    pub counts: BatchCounts,
}

/// Rows whose logits are in memory at the same time.
#[derive(Debug, Default, PartialEq)]
pub struct Chunk {
    /// Rows before response tokens, and those of prompts in the anchor loss.
    pub rows: Vec<i64>,
    /// The token after each of `rows`, or [`NO_LABEL`].
    pub labels: Vec<i64>,
    /// The same rows in [`Batch::clean`].
    pub clean_rows: Vec<i64>,
    /// Rows of noisy tokens in the global loss.
    pub noisy_rows: Vec<i64>,
    /// For each of `noisy_rows`, the index in `rows` of the row that predicts the same token in the
    /// clean response.
    pub noisy_targets: Vec<i64>,
    /// For each of `noisy_rows`, the token of the response that it should predict.
    pub noisy_labels: Vec<i64>,
    /// For each noisy block, the indices of its rows in `noisy_rows`, in order.
    pub noisy_blocks: Vec<Vec<usize>>,
}

/// Rows of the local loss whose logits are in memory at the same time.
#[derive(Debug, Default, PartialEq)]
pub struct LocalChunk {
    /// Rows of noisy tokens.
    pub rows: Vec<i64>,
    /// For each of them, the row of its counterpart in the next state.
    pub next_rows: Vec<i64>,
}

/// Numbers of tokens and blocks in one or more batches.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct BatchCounts {
    /// All tokens, without padding.
    pub num_tokens: usize,
    pub num_response_tokens: usize,
    /// Tokens in each loss.
    pub num_loss_tokens: Losses<usize>,
    /// Noisy blocks.
    pub num_blocks: usize,
}

impl BatchCounts {
    /// The counts of one sequence. With an anchor, `anchor_prompt_fraction` is the fraction of the
    /// prompt tokens in its loss.
    pub fn of(sequence: &PackedSequence, anchor_prompt_fraction: Option<f64>) -> Self {
        let num_anchored = |fraction| anchored_prompt_rows(sequence, fraction).count() + sequence.response_ids.len();
        BatchCounts {
            num_tokens: sequence.len(),
            num_response_tokens: sequence.response_ids.len(),
            num_loss_tokens: Losses {
                ar: sequence.labelled.iter().filter(|&&labelled| labelled).count(),
                global: sequence.global_offsets().into_iter().map(|offsets| offsets.len()).sum(),
                local: sequence.local_offsets().into_iter().map(|offsets| offsets.len()).sum(),
                anchor: anchor_prompt_fraction.map_or(0, num_anchored),
            },
            num_blocks: sequence.noisy_blocks().len(),
        }
    }

    pub fn add(&mut self, other: BatchCounts) {
        self.num_tokens += other.num_tokens;
        self.num_response_tokens += other.num_response_tokens;
        self.num_loss_tokens = self.num_loss_tokens.zip(other.num_loss_tokens).map(|(own, other)| own + other);
        self.num_blocks += other.num_blocks;
    }
}

/// A row before a response token, or of a prompt in the anchor loss, with the noisy rows that have it
/// as their target.
struct TargetRow {
    row: usize,
    /// The same row in [`Batch::clean`].
    clean_row: usize,
    label: i64,
    /// The token after the row.
    next_token: i64,
    noisy_rows: Vec<NoisyRow>,
}

/// A row of a noisy block.
#[derive(Clone)]
struct NoisyRow {
    row: i64,
    /// Number of the block in its sequence.
    block: usize,
}

impl TargetRow {
    fn num_rows(&self) -> usize {
        1 + self.noisy_rows.len()
    }
}

impl Batch {
    /// Joins sequences, with at most `max_chunk_rows` rows in a chunk. With an anchor,
    /// `anchor_prompt_fraction` is the fraction of the prompt tokens in its loss.
    pub fn new(sequences: &[PackedSequence], max_chunk_rows: usize, anchor_prompt_fraction: Option<f64>) -> Self {
        let mut batch = Batch {
            packed: PackedBatch::default(),
            clean: PackedBatch::default(),
            chunks: vec![Chunk::default()],
            local_chunks: Vec::new(),
            counts: BatchCounts::default(),
        };
        for sequence in sequences {
            batch.push(sequence, max_chunk_rows, anchor_prompt_fraction);
        }
        batch
    }

    fn push(&mut self, sequence: &PackedSequence, max_chunk_rows: usize, anchor_prompt_fraction: Option<f64>) {
        let first_row = self.packed.tokens.len();
        let first_clean_row = self.clean.tokens.len();
        let (token_ids, prompt_len) = (sequence.token_ids(), sequence.prompt_len());
        let (positions, ranges) = (sequence.positions(), sequence.attention_ranges());
        self.packed.push(&token_ids, &positions, &ranges, sequence.num_clean_tokens());
        if let Some(fraction) = anchor_prompt_fraction {
            self.clean.push_causal(&token_ids[..sequence.num_clean_tokens()]);
            for index in anchored_prompt_rows(sequence, fraction) {
                let (row, clean_row) = (first_row + index, first_clean_row + index);
                let next_token = i64::from(token_ids[index + 1]);
                let row = TargetRow { row, clean_row, label: NO_LABEL, next_token, noisy_rows: Vec::new() };
                self.push_rows(vec![row], max_chunk_rows);
            }
        }
        let (noisy_rows, continues_block) = noisy_rows(sequence, first_row);
        let has_labels = sequence.labelled.contains(&true);
        // Rows that blocks share, which go into the same chunk.
        let mut neighbors = Vec::new();
        for (offset, (&token_id, noisy_rows)) in sequence.response_ids.iter().zip(noisy_rows).enumerate() {
            if !continues_block[offset] {
                self.push_rows(std::mem::take(&mut neighbors), max_chunk_rows);
            }
            let is_labelled = sequence.labelled[offset];
            // No loss needs the turns of the user between those of the assistant.
            let is_other_turn = has_labels && !is_labelled;
            let is_needed = is_labelled || !noisy_rows.is_empty() || anchor_prompt_fraction.is_some();
            if is_other_turn || !is_needed {
                continue;
            }
            // After an empty prompt, no token comes before the first of the response.
            let index = (prompt_len + offset).saturating_sub(1);
            let (row, clean_row, next_token) = (first_row + index, first_clean_row + index, i64::from(token_id));
            let label = if is_labelled { next_token } else { NO_LABEL };
            neighbors.push(TargetRow { row, clean_row, label, next_token, noisy_rows });
        }
        self.push_rows(neighbors, max_chunk_rows);
        for (index, next_index) in sequence.local_targets() {
            self.push_local_row((first_row + index) as i64, (first_row + next_index) as i64, max_chunk_rows);
        }
        self.counts.add(BatchCounts::of(sequence, anchor_prompt_fraction));
    }

    /// Adds rows and the noisy rows that have them as their targets to the last chunk, or to a new one
    /// if they do not fit into the last. With more than fit into any, they are a chunk of their own.
    fn push_rows(&mut self, rows: Vec<TargetRow>, max_chunk_rows: usize) {
        let num_rows: usize = rows.iter().map(TargetRow::num_rows).sum();
        let is_full = |chunk: &Chunk| chunk.rows.len() + chunk.noisy_rows.len() + num_rows > max_chunk_rows;
        if self.chunks.last().is_none_or(|chunk| !chunk.rows.is_empty() && is_full(chunk)) {
            self.chunks.push(Chunk::default());
        }
        let chunk = self.chunks.last_mut().expect("a chunk was pushed if there was none");
        let mut blocks: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for target in rows {
            for noisy in target.noisy_rows {
                blocks.entry(noisy.block).or_default().push(chunk.noisy_rows.len());
                chunk.noisy_targets.push(chunk.rows.len() as i64);
                chunk.noisy_labels.push(target.next_token);
                chunk.noisy_rows.push(noisy.row);
            }
            chunk.rows.push(target.row as i64);
            chunk.clean_rows.push(target.clean_row as i64);
            chunk.labels.push(target.label);
        }
        chunk.noisy_blocks.extend(blocks.into_values());
    }

    fn push_local_row(&mut self, row: i64, next_row: i64, max_chunk_rows: usize) {
        if self.local_chunks.last().is_none_or(|chunk| chunk.rows.len() >= max_chunk_rows) {
            self.local_chunks.push(LocalChunk::default());
        }
        let chunk = self.local_chunks.last_mut().expect("a chunk was pushed if there was none");
        chunk.rows.push(row);
        chunk.next_rows.push(next_row);
    }
}

/// For each token of the response, the noisy rows of the global loss that predict it, and whether one
/// of their blocks also predicts the token before it. The sequence begins at `first_row`.
fn noisy_rows(sequence: &PackedSequence, first_row: usize) -> (Vec<Vec<NoisyRow>>, Vec<bool>) {
    let num_tokens = sequence.response_ids.len();
    let (mut rows, mut continues_block) = (vec![Vec::new(); num_tokens], vec![false; num_tokens]);
    for (block, targets) in sequence.global_targets().into_iter().enumerate() {
        for (number, (index, predicted)) in targets.into_iter().enumerate() {
            rows[predicted].push(NoisyRow { row: (first_row + index) as i64, block });
            continues_block[predicted] |= number > 0;
        }
    }
    (rows, continues_block)
}

/// The rows of a sequence's prompt that are in the anchor loss: a fraction of them, evenly spread.
fn anchored_prompt_rows(sequence: &PackedSequence, fraction: f64) -> impl Iterator<Item = usize> {
    let num_before = move |row: usize| (row as f64 * fraction) as usize;
    (0..sequence.prompt_len().saturating_sub(1)).filter(move |&row| num_before(row + 1) > num_before(row))
}
