//! The input of a forward: its tokens, and where each belongs in the cache.
//!
//! Kernels follow these numbers as indices without checking them, so they are checked here, where
//! they are written. The host writes all parts into one buffer, which a single copy brings to the
//! device.

use std::ops::Range;

use tch::Tensor;

use super::decode::MAX_CANDIDATES;
use super::shape::KernelShape;
use super::tiles::{SLOTS_PER_READ, tile_tokens};
use crate::{Error, Result};

/// The sizes of a forward, padding included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ForwardShape {
    pub(crate) num_tokens: usize,
    /// Number of leading tokens after which a token is sampled.
    pub(crate) num_outputs: usize,
    /// Maximum number of tiles. A tile is a run of tokens of one row that read its cache together.
    pub(crate) num_tiles: usize,
    /// Whether some tokens are read with adapters for drafts.
    pub(crate) has_adapted: bool,
    /// Of the shared layers, if these have no adapters and there are tokens that later layers read
    /// both with adapters and without: in these layers, both are one.
    pub(crate) shared: Option<SharedShape>,
}

/// The sizes of the shared layers of a forward, padding included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SharedShape {
    pub(crate) num_tokens: usize,
    pub(crate) num_tiles: usize,
}

impl SharedShape {
    fn as_forward(self) -> ForwardShape {
        let SharedShape { num_tokens, num_tiles } = self;
        ForwardShape { num_tokens, num_outputs: 0, num_tiles, has_adapted: false, shared: None }
    }
}

/// What a forward gives after each of its outputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SamplingOptions {
    /// Whether every output is the token with the largest logit.
    pub(crate) is_greedy: bool,
    /// Whether the likeliest tokens are given with their probabilities, or only the sampled one.
    pub(crate) gives_candidates: bool,
    /// Whether some outputs are drawn from their nucleus, for which all logits of one are needed at
    /// once.
    pub(crate) has_nucleus: bool,
}

impl SamplingOptions {
    /// Whether only the token with the largest logit is given.
    pub(super) fn is_argmax(self) -> bool {
        self.is_greedy && !self.gives_candidates
    }

    /// Numbers that the result for an output consists of: the sampled token, or for each candidate,
    /// from the sampled one on, its token (-1 for none) and the bits of its probability.
    pub(crate) fn ints_per_output(self) -> usize {
        if self.gives_candidates { MAX_INTS_PER_OUTPUT } else { 1 }
    }
}

pub(super) const MAX_INTS_PER_OUTPUT: usize = 2 * MAX_CANDIDATES;

/// Upper bounds of the indices in an input.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct InputLimits {
    pub(crate) model: KernelShape,
    /// Rows of the cache.
    pub(crate) num_rows: usize,
    /// Number of slots in a row, and of positions in the rotation table.
    pub(crate) capacity: usize,
}

impl InputLimits {
    /// # Errors
    /// [`Error::Internal`] if kernels could not read the last slots of the cache.
    pub(super) fn check(&self) -> Result<()> {
        if self.capacity.is_multiple_of(SLOTS_PER_READ) {
            return Ok(());
        }
        Err(Error::internal(format!("the cache has {} slots: expected a multiple of {SLOTS_PER_READ}", self.capacity)))
    }
}

/// A token to forward.
#[derive(Clone, Copy)]
pub(crate) struct InputToken {
    pub(crate) id: i32,
    /// Position that it is rotated to.
    pub(crate) position: usize,
    /// The slots of its window that it attends to: bit i is the slot i after the window's first.
    pub(crate) visible: u64,
    /// How the token after it is sampled, if one is.
    pub(crate) draw: Option<Draw>,
    /// Whether it is read with adapters for drafts. If shared layers have an input of their own, such
    /// tokens are the second half of a row, and copies of the first half, which is read without.
    pub(crate) is_adapted: bool,
}

/// How a token is sampled.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Draw {
    /// Factor of the logits, or 0 to choose the token with the largest.
    pub(crate) inverse_temperature: f32,
    /// The sum of the probabilities of the tokens that it is drawn from.
    pub(crate) top_p: f32,
    /// Key of the noise.
    pub(crate) key: u64,
}

/// The parts of an input, as ranges of one buffer of int32.
pub(crate) struct InputLayout {
    // 64-bit numbers come first, because they must start at even indices of the int32 buffer.
    pub(crate) visible: Range<usize>,
    pub(crate) keys: Range<usize>,
    /// The bits of a factor for each output.
    pub(crate) inverse_temperatures: Range<usize>,
    /// The bits of a sum of probabilities for each output.
    pub(crate) top_ps: Range<usize>,
    pub(crate) tokens: Range<usize>,
    pub(crate) row: Range<usize>,
    pub(crate) slot: Range<usize>,
    pub(crate) position: Range<usize>,
    pub(crate) adapted: Range<usize>,
    pub(crate) tile_row: Range<usize>,
    pub(crate) tile_first_token: Range<usize>,
    pub(crate) tile_length: Range<usize>,
    pub(crate) tile_window: Range<usize>,
    /// For each token, the index of the same one in the input of the shared layers, if these have one
    /// of their own.
    pub(crate) shared_index: Range<usize>,
    /// That input, which has such a layout too.
    pub(crate) shared: Range<usize>,
}

impl InputLayout {
    pub(crate) fn new(shape: ForwardShape) -> Self {
        let ForwardShape { num_tokens, num_outputs, num_tiles, shared, .. } = shape;
        let num_indexed = if shared.is_some() { num_tokens } else { 0 };
        let shared = shared.map_or(0, |shared| InputLayout::new(shared.as_forward()).len());
        let mut end = 0;
        let mut next = |length: usize| {
            let start = end;
            end += length;
            start..end
        };
        InputLayout {
            visible: next(2 * num_tokens),
            keys: next(2 * num_outputs),
            inverse_temperatures: next(num_outputs),
            top_ps: next(num_outputs),
            tokens: next(num_tokens),
            row: next(num_tokens),
            slot: next(num_tokens),
            position: next(num_tokens),
            adapted: next(num_tokens),
            tile_row: next(num_tiles),
            tile_first_token: next(num_tiles),
            tile_length: next(num_tiles),
            tile_window: next(num_tiles),
            shared_index: next(num_indexed),
            shared: {
                // It begins with 64-bit numbers.
                let start = end.next_multiple_of(2);
                start..start + shared
            },
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.shared.end
    }
}

/// Writes an input into a buffer of the host. The buffer is a valid input at any time: all that has
/// not been written yet is padding.
pub(crate) struct InputWriter<'b> {
    ints: &'b mut [i32],
    layout: InputLayout,
    shape: ForwardShape,
    limits: InputLimits,
    tile_tokens: usize,
    num_tokens: usize,
    num_tiles: usize,
    /// Of the shared layers, if they have an input of their own.
    shared: Option<Box<InputWriter<'b>>>,
}

impl<'b> InputWriter<'b> {
    /// An input that is all padding. The buffer is as long as the shape's [`InputLayout`].
    pub(crate) fn new(ints: &'b mut [i32], shape: ForwardShape, limits: InputLimits) -> Self {
        let layout = InputLayout::new(shape);
        let (ints, ints_of_shared) = ints.split_at_mut(layout.shared.start);
        let shared = shape.shared.map(|shared| Box::new(InputWriter::new(ints_of_shared, shared.as_forward(), limits)));
        // Kernels skip the tokens and tiles of row -1.
        let InputLayout { inverse_temperatures, tokens, slot, position, adapted, shared_index, .. } = &layout;
        for range in [inverse_temperatures, tokens, slot, position, adapted, shared_index] {
            ints[range.clone()].fill(0);
        }
        ints[layout.top_ps.clone()].fill(1.0f32.to_bits().cast_signed());
        for range in [&layout.row, &layout.tile_row] {
            ints[range.clone()].fill(-1);
        }
        let tile_tokens = tile_tokens(&limits.model, shape.num_tokens);
        InputWriter { ints, layout, shape, limits, tile_tokens, num_tokens: 0, num_tiles: 0, shared }
    }

    /// Adds tokens of a row of the cache. They occupy the slots from `start` on and form one
    /// window.
    ///
    /// # Errors
    /// [`Error::Internal`] if a token does not fit the model, the cache or the forward.
    pub(crate) fn push_row(
        &mut self,
        row: usize,
        start: usize,
        tokens: impl IntoIterator<Item = InputToken>,
    ) -> Result<()> {
        let first = self.num_tokens;
        let tokens: Vec<InputToken> = tokens.into_iter().collect();
        for (offset, token) in tokens.iter().enumerate() {
            self.push(row, start + offset, token)?;
        }
        self.push_shared(row, start, first, &tokens)?;
        for token in (first..self.num_tokens).step_by(self.tile_tokens) {
            if self.num_tiles == self.shape.num_tiles {
                return Err(Error::internal(format!("an input has more tiles than {:?}", self.shape)));
            }
            let (layout, index) = (&self.layout, self.num_tiles);
            self.ints[layout.tile_row.start + index] = row as i32;
            self.ints[layout.tile_first_token.start + index] = token as i32;
            self.ints[layout.tile_length.start + index] = self.tile_tokens.min(self.num_tokens - token) as i32;
            self.ints[layout.tile_window.start + index] = start as i32;
            self.num_tiles += 1;
        }
        Ok(())
    }

    /// Adds a row's tokens, which the input has from index `first` on, to that of the shared layers.
    fn push_shared(&mut self, row: usize, start: usize, first: usize, tokens: &[InputToken]) -> Result<()> {
        let Some(shared) = &mut self.shared else { return Ok(()) };
        let num_adapted = tokens.iter().filter(|token| token.is_adapted).count();
        let (plain, adapted) = tokens.split_at(tokens.len() - num_adapted);
        // It sees the copies of what the other sees.
        let is_copy = |(one, copy): (&InputToken, &InputToken)| {
            copy.is_adapted
                && (one.id, one.position) == (copy.id, copy.position)
                && one.visible.checked_shl(num_adapted as u32) == Some(copy.visible)
        };
        let are_copies = plain.len() == num_adapted && plain.iter().zip(adapted).all(is_copy);
        if num_adapted > 0 && !are_copies {
            return Err(Error::internal(format!("the {num_adapted} adapted tokens of row {row} are no copies")));
        }
        let first_of_shared = shared.num_tokens;
        shared.push_row(row, start, plain.iter().map(|token| InputToken { draw: None, ..*token }))?;
        let indices = &mut self.ints[self.layout.shared_index.clone()][first..first + tokens.len()];
        for (offset, index) in indices.iter_mut().enumerate() {
            *index = (first_of_shared + offset % plain.len()) as i32;
        }
        Ok(())
    }

    fn push(&mut self, row: usize, slot: usize, token: &InputToken) -> Result<()> {
        let (index, InputLimits { model, num_rows, capacity }) = (self.num_tokens, self.limits);
        let InputToken { id, position, visible, draw, is_adapted } = *token;
        let fits = index < self.shape.num_tokens
            && usize::try_from(id).is_ok_and(|id| id < model.vocab)
            && row < num_rows
            && slot < capacity
            && position < capacity
            && (draw.is_none() || index < self.shape.num_outputs)
            && (!is_adapted || self.shape.has_adapted);
        if !fits {
            let limits = format!("{:?}, {num_rows} rows of {capacity} slots, {} tokens", self.shape, model.vocab);
            let token = format!("token {id} at index {index}, row {row}, slot {slot}, position {position}");
            return Err(Error::internal(format!("{token} does not fit a forward of {limits}")));
        }
        let layout = &self.layout;
        self.ints[layout.tokens.start + index] = id;
        self.ints[layout.row.start + index] = row as i32;
        self.ints[layout.slot.start + index] = slot as i32;
        self.ints[layout.position.start + index] = position as i32;
        self.ints[layout.adapted.start + index] = is_adapted.into();
        let (visible_start, key_start) = (layout.visible.start, layout.keys.start);
        if let Some(Draw { inverse_temperature, top_p, .. }) = draw {
            self.ints[layout.inverse_temperatures.start + index] = inverse_temperature.to_bits().cast_signed();
            self.ints[layout.top_ps.start + index] = top_p.to_bits().cast_signed();
        }
        self.write_u64(visible_start + 2 * index, visible);
        if let Some(Draw { key, .. }) = draw {
            self.write_u64(key_start + 2 * index, key);
        }
        self.num_tokens += 1;
        Ok(())
    }

    fn write_u64(&mut self, index: usize, value: u64) {
        (self.ints[index], self.ints[index + 1]) = (value as i32, (value >> 32) as i32);
    }
}

/// An input on the device. Its indices are within its limits when kernels read them.
pub(crate) struct ForwardInput {
    shape: ForwardShape,
    limits: InputLimits,
    pub(super) sampling: SamplingOptions,
    pub(super) tokens: Tensor,
    pub(super) row: Tensor,
    pub(super) slot: Tensor,
    pub(super) position: Tensor,
    /// 1 for tokens that are read with adapters for drafts, else 0.
    pub(super) adapted: Tensor,
    pub(super) visible: Tensor,
    pub(super) keys: Tensor,
    pub(super) inverse_temperatures: Tensor,
    pub(super) top_ps: Tensor,
    pub(super) tile_row: Tensor,
    pub(super) tile_first_token: Tensor,
    pub(super) tile_length: Tensor,
    pub(super) tile_window: Tensor,
    shared_index: Tensor,
    shared: Option<Box<ForwardInput>>,
}

/// A row of a table for each token of an input.
#[derive(Clone, Copy)]
pub(crate) struct InitialRows<'t> {
    /// `[num_rows, hidden]`
    pub(super) table: &'t Tensor,
    pub(super) num_rows: usize,
    /// Less than `num_rows`, int32 `[T]`.
    pub(super) indices: &'t Tensor,
}

impl ForwardInput {
    /// Views of a buffer on the device.
    ///
    /// # Safety
    /// When a kernel reads the buffer, it holds what an [`InputWriter`] wrote for this shape and
    /// these limits.
    pub(super) unsafe fn new(
        buffer: &Tensor,
        shape: ForwardShape,
        limits: InputLimits,
        sampling: SamplingOptions,
    ) -> Self {
        let layout = InputLayout::new(shape);
        let view = |range: &Range<usize>| buffer.narrow(0, range.start as i64, range.len() as i64);
        ForwardInput {
            shape,
            limits,
            sampling,
            tokens: view(&layout.tokens),
            row: view(&layout.row),
            slot: view(&layout.slot),
            position: view(&layout.position),
            adapted: view(&layout.adapted),
            visible: view(&layout.visible),
            keys: view(&layout.keys),
            inverse_temperatures: view(&layout.inverse_temperatures),
            top_ps: view(&layout.top_ps),
            tile_row: view(&layout.tile_row),
            tile_first_token: view(&layout.tile_first_token),
            tile_length: view(&layout.tile_length),
            tile_window: view(&layout.tile_window),
            shared_index: view(&layout.shared_index),
            // SAFETY: the writer wrote this part of the buffer for that shape.
            shared: shape.shared.map(|shared| {
                Box::new(unsafe { Self::new(&view(&layout.shared), shared.as_forward(), limits, sampling) })
            }),
        }
    }

    /// The rows of the embeddings `[vocab, hidden]`.
    pub(crate) fn embeddings<'t>(&'t self, table: &'t Tensor) -> InitialRows<'t> {
        InitialRows { table, num_rows: self.limits.model.vocab, indices: &self.tokens }
    }

    /// The input of the shared layers, if they have one of their own.
    pub(crate) fn shared(&self) -> Option<&ForwardInput> {
        self.shared.as_deref()
    }

    /// The rows of the residual stream `[T, hidden]` after the shared layers, which have an input of
    /// their own.
    pub(crate) fn rows_of_shared<'t>(&'t self, x: &'t Tensor) -> InitialRows<'t> {
        let num_rows = self.shape.shared.map_or(0, |shared| shared.num_tokens);
        InitialRows { table: x, num_rows, indices: &self.shared_index }
    }

    pub(crate) fn shape(&self) -> ForwardShape {
        self.shape
    }

    pub(crate) fn sampling(&self) -> SamplingOptions {
        self.sampling
    }

    pub(super) fn limits(&self) -> &InputLimits {
        &self.limits
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: InputLimits = InputLimits { model: KernelShape::TWO_TOKEN_TILES, num_rows: 3, capacity: 32 };

    fn token(id: i32, position: usize) -> InputToken {
        InputToken { id, position, visible: u64::MAX, draw: None, is_adapted: false }
    }

    #[test]
    fn rows_are_packed_one_after_another_and_cut_into_tiles() {
        let shape = ForwardShape { num_tokens: 8, num_outputs: 8, num_tiles: 5, has_adapted: true, shared: None };
        let layout = InputLayout::new(shape);
        let mut ints = vec![7; layout.len()];
        let mut writer = InputWriter::new(&mut ints, shape, LIMITS);
        let window = [(11, 4), (12, 5), (13, 6)];
        let draw = Some(Draw { inverse_temperature: 1.0, top_p: 0.5, key: 9 << 32 | 1 });
        let with_key = |(id, position)| InputToken { draw, is_adapted: position > 4, ..token(id, position) };
        writer.push_row(0, 4, window.map(with_key)).unwrap();
        writer.push_row(2, 0, [(21, 0), (22, 1), (23, 2)].map(|(id, position)| token(id, position))).unwrap();
        assert_eq!(ints[layout.tokens], [11, 12, 13, 21, 22, 23, 0, 0]);
        assert_eq!(ints[layout.row], [0, 0, 0, 2, 2, 2, -1, -1]);
        assert_eq!(ints[layout.slot], [4, 5, 6, 0, 1, 2, 0, 0]);
        assert_eq!(ints[layout.position], [4, 5, 6, 0, 1, 2, 0, 0]);
        assert_eq!(ints[layout.adapted], [0, 1, 1, 0, 0, 0, 0, 0]);
        assert_eq!(ints[layout.visible.start..layout.visible.start + 12], [-1; 12]);
        assert_eq!(ints[layout.keys.start..layout.keys.start + 6], [1, 9, 1, 9, 1, 9]);
        let floats = |range: Range<usize>| ints[range].iter().map(|&bits| f32::from_bits(bits.cast_unsigned()));
        assert!(floats(layout.inverse_temperatures).eq([1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]));
        assert!(floats(layout.top_ps).eq([0.5, 0.5, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]));
        assert_eq!(ints[layout.tile_row], [0, 0, 2, 2, -1]);
        assert_eq!(ints[layout.tile_first_token.start..layout.tile_first_token.start + 4], [0, 2, 3, 5]);
        assert_eq!(ints[layout.tile_length.start..layout.tile_length.start + 4], [2, 1, 2, 1]);
        assert_eq!(ints[layout.tile_window.start..layout.tile_window.start + 4], [4, 4, 0, 0]);
    }

    #[test]
    fn shared_layers_read_a_token_once_that_later_layers_read_twice() {
        let shared = SharedShape { num_tokens: 8, num_tiles: 4 };
        let shape =
            ForwardShape { num_tokens: 9, num_outputs: 9, num_tiles: 6, has_adapted: true, shared: Some(shared) };
        let layout = InputLayout::new(shape);
        let mut ints = vec![7; layout.len()];
        let mut writer = InputWriter::new(&mut ints, shape, LIMITS);
        let draw = Some(Draw { inverse_temperature: 1.0, top_p: 1.0, key: 9 });
        let doubled = [(11, 4, 0b1), (12, 5, 0b11), (11, 4, 0b100), (12, 5, 0b1100)].map(|(id, position, visible)| {
            InputToken { draw, visible, is_adapted: visible > 0b11, ..token(id, position) }
        });
        writer.push_row(0, 4, doubled).unwrap();
        writer.push_row(2, 0, [(21, 0), (22, 1), (23, 2)].map(|(id, position)| token(id, position))).unwrap();
        assert_eq!(ints[layout.tokens], [11, 12, 11, 12, 21, 22, 23, 0, 0]);
        assert_eq!(ints[layout.shared_index], [0, 1, 0, 1, 2, 3, 4, 0, 0]);
        let (of_shared, ints) = (InputLayout::new(shared.as_forward()), &ints[layout.shared]);
        assert_eq!(ints[of_shared.tokens], [11, 12, 21, 22, 23, 0, 0, 0]);
        assert_eq!(ints[of_shared.row], [0, 0, 2, 2, 2, -1, -1, -1]);
        assert_eq!(ints[of_shared.slot], [4, 5, 0, 1, 2, 0, 0, 0]);
        assert_eq!(ints[of_shared.position], [4, 5, 0, 1, 2, 0, 0, 0]);
        assert_eq!(ints[of_shared.adapted], [0; 8]);
        assert_eq!(ints[of_shared.tile_row], [0, 2, 2, -1]);
        assert_eq!(ints[of_shared.tile_length.start..of_shared.tile_length.start + 3], [2, 2, 1]);
    }

    #[test]
    fn adapted_tokens_that_are_no_copies_are_refused() {
        let shared = Some(SharedShape { num_tokens: 4, num_tiles: 4 });
        let shape = ForwardShape { num_tokens: 4, num_outputs: 4, num_tiles: 4, has_adapted: true, shared };
        let plain = InputToken { visible: 0b1, ..token(1, 4) };
        let copy = InputToken { visible: 0b10, is_adapted: true, ..plain };
        for tokens in [
            vec![copy],
            vec![plain, InputToken { id: 2, ..copy }],
            vec![plain, InputToken { position: 5, ..copy }],
            vec![plain, InputToken { visible: 0b11, ..copy }],
            vec![copy, plain],
            vec![plain, InputToken { visible: 0b11, ..plain }, copy],
        ] {
            let mut ints = vec![7; InputLayout::new(shape).len()];
            let error = InputWriter::new(&mut ints, shape, LIMITS).push_row(0, 4, tokens).unwrap_err();
            assert!(error.to_string().contains("no copies"), "{error}");
        }
    }

    #[test]
    fn tokens_that_do_not_fit_are_refused_and_leave_a_valid_input() {
        let shape = ForwardShape { num_tokens: 4, num_outputs: 1, num_tiles: 1, has_adapted: false, shared: None };
        let layout = InputLayout::new(shape);
        for (row, start, tokens) in [
            (0, 0, vec![token(100, 0)]),
            (0, 0, vec![token(-1, 0)]),
            (3, 0, vec![token(1, 0)]),
            (0, 32, vec![token(1, 0)]),
            (0, 31, vec![token(1, 31), token(1, 31)]),
            (0, 0, vec![token(1, 32)]),
            (
                0,
                0,
                vec![
                    token(1, 0),
                    InputToken { draw: Some(Draw { inverse_temperature: 0.0, top_p: 1.0, key: 1 }), ..token(1, 1) },
                ],
            ),
            (0, 0, vec![InputToken { is_adapted: true, ..token(1, 0) }]),
            (0, 0, (0..5).map(|position| token(1, position)).collect()),
            // One tile of two tokens is not enough.
            (0, 0, (0..3).map(|position| token(1, position)).collect()),
        ] {
            let mut ints = vec![i32::MAX; layout.len()];
            let error = InputWriter::new(&mut ints, shape, LIMITS).push_row(row, start, tokens).unwrap_err();
            assert!(matches!(error, Error::Internal(_)), "{error}");
            let within =
                |field: &Range<usize>, valid: Range<i32>| ints[field.clone()].iter().all(|n| valid.contains(n));
            assert!(within(&layout.tokens, 0..100) && within(&layout.row, -1..3), "{error}");
            assert!(within(&layout.slot, 0..32) && within(&layout.position, 0..32), "{error}");
        }
    }
}
