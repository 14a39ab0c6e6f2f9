//! The backend made of libtorch's operations: for the CPU, for float32, and for shapes that our
//! kernels do not support.

use tch::{Kind, Tensor};

use super::{Backend, Outputs, Predictions, PromptChunk, Window};
use crate::Result;
use crate::cuda::graphs;
use crate::decode::sampling::{Candidate, Candidates, MAX_CANDIDATES, NO_CANDIDATES, sample, sample_candidates};
use crate::decode::tree::Node;
use crate::model::{KvCache, SlotCopy, SlotMapping, SlotMove, Transformer, TreeMask};

/// With libtorch's operations, longer prompts are cached one after the other, in pieces of so many
/// tokens: the mask of a forward has a number for every token and slot.
pub const MAX_PIECE_TOKENS: usize = 512;

pub(in crate::decode) struct EagerBackend<'m> {
    model: &'m Transformer,
    cache: KvCache,
    /// The tokens that the last forward sampled after each token of its windows.
    sampled: Vec<i32>,
    /// The likeliest tokens there, if it was to give them; else empty.
    candidates: Vec<Candidates>,
}

/// Tokens of neighboring rows of the cache.
struct RowBatch {
    first_row: usize,
    rows: Vec<RowTokens>,
    has_trees: bool,
}

/// Tokens of one row, in the slots from `start` on.
struct RowTokens {
    start: usize,
    tokens: Vec<i32>,
    nodes: Vec<Node>,
    /// Offset of the first token that is read with adapters for drafts.
    first_adapted: usize,
}

impl RowTokens {
    fn from_chunk(chunk: &PromptChunk<'_>) -> Self {
        let nodes = (0..chunk.tokens.len()).map(Node::in_order).collect();
        RowTokens { start: chunk.start, tokens: chunk.tokens.to_vec(), nodes, first_adapted: chunk.tokens.len() }
    }

    fn from_window(window: &Window<'_>) -> Self {
        let nodes = (0..window.len()).map(|offset| window.node(offset)).collect();
        let (tokens, first_adapted) = (window.tokens().collect(), window.first_adapted());
        RowTokens { start: window.start, tokens, nodes, first_adapted }
    }

    /// The offset whose token stands at this one: padding repeats the last token, in its slot.
    fn unpadded(&self, offset: usize) -> usize {
        offset.min(self.tokens.len() - 1)
    }
}

/// The forwards that cache chunks of prompts: of neighboring rows at once, but of long ones piece by
/// piece.
fn prompt_batches(chunks: &[PromptChunk<'_>]) -> Vec<RowBatch> {
    let is_short = |chunk: &PromptChunk<'_>| chunk.tokens.len() <= MAX_PIECE_TOKENS;
    let mut batches = Vec::new();
    for neighbors in chunks.chunk_by(|one, next| one.row + 1 == next.row && is_short(one) && is_short(next)) {
        let PromptChunk { row, start, tokens } = neighbors[0];
        let mut push = |rows| batches.push(RowBatch { first_row: row, rows, has_trees: false });
        if is_short(&neighbors[0]) {
            push(neighbors.iter().map(RowTokens::from_chunk).collect());
        } else {
            for (tokens, start) in tokens.chunks(MAX_PIECE_TOKENS).zip((start..).step_by(MAX_PIECE_TOKENS)) {
                push(vec![RowTokens::from_chunk(&PromptChunk { row, start, tokens })]);
            }
        }
    }
    batches
}

impl<'m> EagerBackend<'m> {
    pub(in crate::decode) fn new(model: &'m Transformer, num_rows: usize, capacity: usize) -> Result<Self> {
        let cache = KvCache::new(model.config(), num_rows, capacity, model.device(), model.kind())?;
        Ok(EagerBackend { model, cache, sampled: Vec::new(), candidates: Vec::new() })
    }

    /// Forwards the tokens and returns the final hidden states `[tokens, hidden]`.
    fn forward(&self, batch: &RowBatch) -> Tensor {
        let rows = &batch.rows;
        let lengths: Vec<usize> = rows.iter().map(|row| row.tokens.len()).collect();
        // Shorter rows are padded at the end. Slots of its own for padding could be past the last one
        // of the cache.
        let width = lengths.iter().max().copied().unwrap_or(0);
        let shape = [rows.len() as i64, width as i64];
        let per_token = |value: &dyn Fn(&RowTokens, usize) -> i64| {
            let of_row = |row| (0..width).map(move |offset| value(row, RowTokens::unpadded(row, offset)));
            let values: Vec<i64> = rows.iter().flat_map(of_row).collect();
            Tensor::from_slice(&values).view(shape).to_device(self.model.device())
        };
        let tokens = per_token(&|row, offset| row.tokens[offset].into());
        let slots = per_token(&|row, offset| (row.start + offset) as i64);
        let mapping = if batch.has_trees {
            let positions = per_token(&|row, offset| (row.start + row.nodes[offset].depth) as i64);
            let visible = per_token(&|row, offset| row.nodes[offset].visible as i64);
            SlotMapping { positions, tree_mask: Some(TreeMask { first_slot: slots.narrow(1, 0, 1), visible }), slots }
        } else {
            SlotMapping::sequential(slots)
        };
        let num_attended = rows.iter().map(|row| row.start + row.tokens.len()).max().unwrap_or(0);
        let mut cache = self.cache.rows(batch.first_row, rows.len());
        let draft_rows = draft_rows(rows);
        let draft_rows = (!draft_rows.is_empty()).then(|| Tensor::from_slice(&draft_rows).to_device(tokens.device()));
        self.model.forward_cached(&tokens, &mapping, &lengths, &mut cache, num_attended, draft_rows.as_ref())
    }

    /// Samples a token after each token of the windows.
    fn sample(&mut self, hidden: &Tensor, windows: &[Window<'_>], outputs: Outputs) -> Result<()> {
        let logits = self.model.compute_logits(hidden)?;
        if windows.iter().all(|window| window.sampling.is_greedy()) {
            self.sampled = Vec::try_from(logits.argmax(-1, false).to_kind(Kind::Int).view([-1]))?;
            self.candidates = if outputs.candidates { likeliest(&logits, &self.sampled)? } else { Vec::new() };
            return Ok(());
        }
        let vocab_size = self.model.config().vocab_size as usize;
        let logits: Vec<f32> = Vec::try_from(logits.view([-1]))?;
        let draws = windows
            .iter()
            .flat_map(|window| (0..window.len()).map(|offset| (window.sampling, window.noise_key(offset))));
        let draws = draws.zip(logits.chunks(vocab_size));
        if outputs.candidates {
            let candidates = draws.map(|((sampling, key), logits)| sample_candidates(logits, sampling, key));
            self.candidates = candidates.collect();
            self.sampled = self.candidates.iter().map(|candidates| candidates[0].token).collect();
        } else {
            self.sampled = draws.map(|((sampling, key), logits)| sample(logits, sampling, key)).collect();
            self.candidates.clear();
        }
        Ok(())
    }
}

/// The indices of the tokens that are read with adapters for drafts, among the tokens of all rows.
fn draft_rows(rows: &[RowTokens]) -> Vec<i64> {
    let mut first = 0;
    let indices = rows.iter().flat_map(|row| {
        let indices = first + row.first_adapted..first + row.tokens.len();
        first = indices.end;
        indices
    });
    indices.map(|index| index as i64).collect()
}

/// The likeliest tokens by logits `[tokens, vocab]`, of which `chosen` come first: among equal
/// logits, `topk` does not prefer the lowest id.
fn likeliest(logits: &Tensor, chosen: &[i32]) -> Result<Vec<Candidates>> {
    let num_candidates = logits.size()[1].min(MAX_CANDIDATES as i64);
    let (top, ids) = logits.topk(num_candidates, -1, true, true);
    let probabilities = (top - logits.logsumexp([-1], true)).exp();
    let probabilities: Vec<f32> = Vec::try_from(probabilities.view([-1]))?;
    let ids: Vec<i32> = Vec::try_from(ids.to_kind(Kind::Int).view([-1]))?;
    let rows = ids.chunks(num_candidates as usize).zip(probabilities.chunks(num_candidates as usize));
    let candidates = |(&chosen, (ids, probabilities)): (&i32, (&[i32], &[f32]))| {
        let others = ids.iter().filter(|&&token| token != chosen);
        let tokens = std::iter::once(&chosen).chain(others);
        let mut candidates = NO_CANDIDATES;
        for (candidate, (&token, &probability)) in candidates.iter_mut().zip(tokens.zip(probabilities)) {
            *candidate = Candidate { token, probability };
        }
        candidates
    };
    Ok(chosen.iter().zip(rows).map(candidates).collect())
}

impl Backend for EagerBackend<'_> {
    fn launch(&mut self, chunks: &[PromptChunk<'_>], windows: &[Window<'_>], outputs: Outputs) -> Result<()> {
        for batch in prompt_batches(chunks) {
            let _ = self.forward(&batch);
        }
        if windows.is_empty() {
            // Prefill is timed on its own, so a GPU must have finished it.
            return graphs::synchronize_current_stream(self.model.device());
        }
        let has_trees = windows.iter().any(|window| window.tree.is_some());
        let rows = windows.iter().map(RowTokens::from_window).collect();
        let hidden = self.forward(&RowBatch { first_row: 0, rows, has_trees });
        self.sample(&hidden, windows, outputs)
    }

    fn collect(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predictions>> {
        Ok(Predictions::split(windows, &self.sampled, &self.candidates))
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()> {
        self.cache.move_slots(moves);
        Ok(())
    }

    fn copy_row(&mut self, from: usize, to: usize) -> Result<()> {
        self.cache.copy_row(from, to);
        Ok(())
    }

    fn copy_slots(&mut self, copy: &SlotCopy) -> Result<()> {
        self.cache.copy_slots(copy);
        Ok(())
    }

    fn max_prompt_tokens(&self) -> usize {
        usize::MAX
    }
}
