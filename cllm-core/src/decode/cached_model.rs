//! A transformer with its KV cache as the decoding loop sees it.

use tch::{Kind, Tensor};

use super::{Greedy, Window};
use crate::Result;
use crate::model::{KvCache, Transformer};

/// Rows of a batch that are forwarded together. The cache's slot is the position: what a rejected guess wrote stays behind
/// the known tokens and is written over before any query reaches that far.
pub(super) struct CachedModel<'m> {
    model: &'m Transformer,
    cache: KvCache,
    /// Rows of the cache, the finished ones too, until they are squeezed out.
    cached_rows: usize,
    /// Cache row of each live row.
    slots: Vec<usize>,
}

impl<'m> CachedModel<'m> {
    pub(super) fn new(model: &'m Transformer, rows: usize, capacity: usize) -> Self {
        let cache = KvCache::new(model.config(), rows, capacity, model.device(), model.kind());
        CachedModel { model, cache, cached_rows: rows, slots: (0..rows).collect() }
    }

    /// Caches all but the last token of each prompt.
    pub(super) fn prefill(&mut self, prompts: &[&[i32]]) {
        let width = prompts.iter().map(|prompt| prompt.len() - 1).max().unwrap_or(0);
        if width == 0 {
            return;
        }
        let rows: Vec<(usize, &[i32])> = prompts.iter().map(|prompt| (0, &prompt[..prompt.len() - 1])).collect();
        let (tokens, positions) = self.batch(&rows, width);
        let _ = self.model.hidden_cached(&tokens, &positions, &mut self.cache, width);
    }

    /// Tokens and positions `[rows, width]`; short rows are filled up with token 0 at the positions that follow.
    fn batch(&self, rows: &[(usize, &[i32])], width: usize) -> (Tensor, Tensor) {
        let mut tokens = Vec::with_capacity(rows.len() * width);
        let mut positions = Vec::with_capacity(rows.len() * width);
        for (start, row) in rows {
            tokens.extend(row.iter().map(|&token| i64::from(token)));
            tokens.extend(std::iter::repeat_n(0, width - row.len()));
            positions.extend((*start..start + width).map(|position| position as i64));
        }
        let shape = [rows.len() as i64, width as i64];
        let on_device = |values: Vec<i64>| Tensor::from_slice(&values).view(shape).to_device(self.model.device());
        (on_device(tokens), on_device(positions))
    }

    /// Copies the live rows together once less than half of the cache is live.
    fn squeeze(&mut self) {
        if self.slots.is_empty() || self.slots.len() * 2 > self.cached_rows {
            return;
        }
        let slots: Vec<i64> = self.slots.iter().map(|&slot| slot as i64).collect();
        self.cache.select(&slots);
        self.cached_rows = slots.len();
        self.slots = (0..self.cached_rows).collect();
    }
}

impl Greedy for CachedModel<'_> {
    fn predict(&mut self, windows: &[Window<'_>]) -> Result<Vec<Vec<i32>>> {
        let width = windows.iter().map(|window| 1 + window.guesses.len()).max().unwrap_or(0);
        let attended = windows.iter().map(|window| window.start + width).max().unwrap_or(0);
        let mut live: Vec<Vec<i32>> = vec![vec![0]; self.cached_rows];
        let mut starts = vec![0; self.cached_rows];
        for (window, &slot) in windows.iter().zip(&self.slots) {
            live[slot] = std::iter::once(window.known).chain(window.guesses.iter().copied()).collect();
            starts[slot] = window.start;
        }
        let rows: Vec<_> = starts.into_iter().zip(live.iter().map(Vec::as_slice)).collect();
        let (tokens, positions) = self.batch(&rows, width);
        let hidden = self.model.hidden_cached(&tokens, &positions, &mut self.cache, attended);
        let predicted = self.model.logits(&hidden)?.argmax(-1, false).to_kind(Kind::Int64);
        let predicted: Vec<i64> = Vec::try_from(predicted.view([-1]))?;
        let of_slot = |slot: usize, length: usize| {
            predicted[slot * width..slot * width + length].iter().map(|&token| token as i32).collect()
        };
        Ok(windows.iter().zip(&self.slots).map(|(window, &slot)| of_slot(slot, 1 + window.guesses.len())).collect())
    }

    fn keep(&mut self, rows: &[usize]) {
        self.slots = rows.iter().map(|&row| self.slots[row]).collect();
        self.squeeze();
    }
}
