//! A step out of libtorch's operations: the CPU, float32, and shapes that our kernels do not take.

use tch::{Kind, Tensor};

use crate::Result;
use crate::cuda::graphs;
use crate::decode::{Chunk, Forward, Place, Predicted, Sampling, Window, sampling as noise};
use crate::model::{KvCache, SlotMapping, SlotMove, Transformer, TreeMask};

/// A transformer and the cache of its rows. A known token's slot is its position: what a rejected guess wrote stays behind the
/// known tokens and is written over before any query reaches that far.
pub(crate) struct EagerModel<'m> {
    model: &'m Transformer,
    cache: KvCache,
    /// What the step that was begun chose.
    chosen: Vec<i32>,
}

/// Tokens of some neighbouring rows.
struct Batch {
    first_row: usize,
    rows: Vec<BatchRow>,
    /// Some row's tokens do not follow one another.
    branches: bool,
}

/// Tokens of a row, whose slots follow one another from `start` on.
struct BatchRow {
    start: usize,
    tokens: Vec<i32>,
    places: Vec<Place>,
}

impl BatchRow {
    fn of_chunk(chunk: &Chunk<'_>) -> Self {
        let places = (0..chunk.tokens.len()).map(Place::in_order).collect();
        BatchRow { start: chunk.start, tokens: chunk.tokens.to_vec(), places }
    }

    fn of_window(window: &Window<'_>) -> Self {
        let places = (0..window.len()).map(|offset| window.place(offset)).collect();
        BatchRow { start: window.start, tokens: window.tokens().collect(), places }
    }

    /// Of padding too.
    fn place(&self, offset: usize) -> Place {
        self.places.get(offset).copied().unwrap_or(Place::in_order(offset))
    }
}

impl<'m> EagerModel<'m> {
    pub(crate) fn new(model: &'m Transformer, rows: usize, capacity: usize) -> Self {
        let cache = KvCache::new(model.config(), rows, capacity, model.device(), model.kind());
        EagerModel { model, cache, chosen: Vec::new() }
    }

    fn hidden(&self, batch: &Batch) -> Tensor {
        let rows = &batch.rows;
        let lengths: Vec<usize> = rows.iter().map(|row| row.tokens.len()).collect();
        // Shorter rows are filled up with token 0 at the slots that follow.
        let width = lengths.iter().max().copied().unwrap_or(0);
        let shape = [rows.len() as i64, width as i64];
        let each = |of: &dyn Fn(&BatchRow, usize) -> i64| {
            let values: Vec<i64> = rows.iter().flat_map(|row| (0..width).map(|offset| of(row, offset))).collect();
            Tensor::from_slice(&values).view(shape).to_device(self.model.device())
        };
        let tokens = each(&|row, offset| row.tokens.get(offset).copied().unwrap_or(0).into());
        let slots = each(&|row, offset| (row.start + offset) as i64);
        let places = if batch.branches {
            let positions = each(&|row, offset| (row.start + row.place(offset).depth) as i64);
            let visible = each(&|row, offset| row.place(offset).visible as i64);
            SlotMapping { positions, tree_mask: Some(TreeMask { first_slot: slots.narrow(1, 0, 1), visible }), slots }
        } else {
            SlotMapping::sequential(slots)
        };
        let attended = rows.iter().map(|row| row.start + width).max().unwrap_or(0);
        let mut cache = self.cache.rows(batch.first_row, rows.len());
        self.model.forward_cached(&tokens, &places, &lengths, &mut cache, attended)
    }

    /// The choice after every token of the windows.
    fn choose(&self, hidden: &Tensor, windows: &[Window<'_>], sampling: Sampling) -> Result<Vec<i32>> {
        let logits = self.model.compute_logits(hidden)?;
        let Sampling::Temperature(temperature) = sampling else {
            return Ok(Vec::try_from(logits.argmax(-1, false).to_kind(Kind::Int).view([-1]))?);
        };
        let vocab = self.model.config().vocab_size as usize;
        let logits: Vec<f32> = Vec::try_from(logits.view([-1]))?;
        let keys = windows.iter().flat_map(|window| (0..window.len()).map(|offset| window.noise_key(offset)));
        Ok(keys.zip(logits.chunks(vocab)).map(|(key, row)| noise::choose(row, temperature, key)).collect())
    }
}

impl Forward for EagerModel<'_> {
    fn begin(&mut self, chunks: &[Chunk<'_>], windows: &[Window<'_>], sampling: Sampling) -> Result<()> {
        for neighbours in chunks.chunk_by(|one, next| one.row + 1 == next.row) {
            let rows = neighbours.iter().map(BatchRow::of_chunk).collect();
            let _ = self.hidden(&Batch { first_row: neighbours[0].row, rows, branches: false });
        }
        if windows.is_empty() {
            // What is timed apart must be over.
            return graphs::synchronize_current_stream(self.model.device());
        }
        let branches = windows.iter().any(|window| window.tree.is_some());
        let rows = windows.iter().map(BatchRow::of_window).collect();
        let hidden = self.hidden(&Batch { first_row: 0, rows, branches });
        self.chosen = self.choose(&hidden, windows, sampling)?;
        Ok(())
    }

    fn finish(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predicted>> {
        Ok(Predicted::each(windows, &self.chosen))
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()> {
        self.cache.move_slots(moves);
        Ok(())
    }

    fn copy_row(&mut self, from: usize, to: usize) -> Result<()> {
        self.cache.copy_row(from, to);
        Ok(())
    }

    fn prompt_tokens(&self) -> usize {
        usize::MAX
    }
}
