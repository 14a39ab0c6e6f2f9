//! A step out of libtorch's operations: the CPU, float32, and shapes that our kernels do not take.

use tch::{Kind, Tensor};

use super::{Choice, Chunk, Forward, Window, noise};
use crate::model::{KvCache, Transformer};
use crate::{Result, device};

/// A transformer and the cache of its rows. The cache's slot is the position: what a rejected guess wrote stays behind the
/// known tokens and is written over before any query reaches that far.
pub(super) struct EagerModel<'m> {
    model: &'m Transformer,
    cache: KvCache,
}

/// Tokens of some neighbouring rows, each from its own position on.
struct Batch {
    first_row: usize,
    rows: Vec<(usize, Vec<i32>)>,
    /// Tokens of the longest row; shorter ones are filled up with token 0 at the positions that follow.
    width: usize,
}

impl<'m> EagerModel<'m> {
    pub(super) fn new(model: &'m Transformer, rows: usize, capacity: usize) -> Self {
        let cache = KvCache::new(model.config(), rows, capacity, model.device(), model.kind());
        EagerModel { model, cache }
    }

    fn hidden(&self, batch: &Batch) -> Tensor {
        let width = batch.width;
        let mut tokens = Vec::with_capacity(batch.rows.len() * width);
        let mut positions = Vec::with_capacity(batch.rows.len() * width);
        for (start, row) in &batch.rows {
            tokens.extend(row.iter().map(|&token| i64::from(token)));
            tokens.extend(std::iter::repeat_n(0, width - row.len()));
            positions.extend((*start..start + width).map(|position| position as i64));
        }
        let shape = [batch.rows.len() as i64, width as i64];
        let on_device = |values: Vec<i64>| Tensor::from_slice(&values).view(shape).to_device(self.model.device());
        let attended = batch.rows.iter().map(|(start, _)| start + width).max().unwrap_or(0);
        let mut cache = self.cache.rows(batch.first_row, batch.rows.len());
        let lengths: Vec<usize> = batch.rows.iter().map(|(_, row)| row.len()).collect();
        self.model.hidden_cached(&on_device(tokens), &on_device(positions), &lengths, &mut cache, attended)
    }

    /// The choice after every token of the windows.
    fn choose(&self, hidden: &Tensor, windows: &[Window<'_>], choice: Choice) -> Result<Vec<i32>> {
        let logits = self.model.logits(hidden)?;
        if choice.temperature == 0.0 {
            return Ok(Vec::try_from(logits.argmax(-1, false).to_kind(Kind::Int).view([-1]))?);
        }
        let vocab = self.model.config().vocab_size as usize;
        let logits: Vec<f32> = Vec::try_from(logits.view([-1]))?;
        let keys = windows.iter().flat_map(|window| {
            (0..window.len()).map(|offset| noise::position_key(window.key, window.start + offset + 1))
        });
        Ok(keys.zip(logits.chunks(vocab)).map(|(key, row)| noise::choose(row, choice.temperature, key)).collect())
    }
}

impl Forward for EagerModel<'_> {
    fn step(&mut self, chunks: &[Chunk<'_>], windows: &[Window<'_>], choice: Choice) -> Result<Vec<Vec<i32>>> {
        for neighbours in chunks.chunk_by(|one, next| one.row + 1 == next.row) {
            let rows: Vec<_> = neighbours.iter().map(|chunk| (chunk.start, chunk.tokens.to_vec())).collect();
            let width = rows.iter().map(|(_, tokens)| tokens.len()).max().unwrap_or(0);
            let _ = self.hidden(&Batch { first_row: neighbours[0].row, rows, width });
        }
        if windows.is_empty() {
            // What is timed apart must be over.
            device::synchronize(self.model.device());
            return Ok(Vec::new());
        }
        let width = windows.iter().map(Window::len).max().unwrap_or(0);
        let rows = windows.iter().map(|window| (window.start, window.tokens().collect())).collect();
        let hidden = self.hidden(&Batch { first_row: 0, rows, width });
        let mut chosen = self.choose(&hidden, windows, choice)?.into_iter();
        Ok(windows.iter().map(|window| chosen.by_ref().take(window.len()).collect()).collect())
    }

    fn copy_row(&mut self, from: usize, to: usize) -> Result<()> {
        self.cache.copy_row(from, to);
        Ok(())
    }

    fn prompt_tokens(&self) -> usize {
        usize::MAX
    }
}
