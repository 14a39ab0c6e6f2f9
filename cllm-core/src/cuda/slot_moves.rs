//! Moves between slots of the KV cache, checked where the host writes them.

use tch::{Device, Tensor};

use super::forward_input::InputLimits;
use super::graphs;
use crate::{Error, Result};

/// Moves of keys and values to other slots of their row, on a device.
pub(crate) struct SlotMoves {
    pub(super) limits: InputLimits,
    /// `[rows + 1]`: the moves of a row begin at its number and end before the next.
    pub(super) first_move: Tensor,
    /// `[moves]`
    pub(super) from: Tensor,
    /// `[moves]`
    pub(super) to: Tensor,
}

impl SlotMoves {
    /// Starts to send moves: a row, and its slots from and to. Rows ascend, and so do the slots of a
    /// row that are read; each is moved to a lower one.
    ///
    /// # Errors
    /// [`Error::Internal`] for other moves and those outside of the cache, else [`Error::Torch`].
    pub(crate) fn new(
        moves: impl Iterator<Item = (usize, usize, usize)>,
        limits: InputLimits,
        device: Device,
    ) -> Result<Self> {
        let parts = parts(moves, limits)?;
        let sent = graphs::sent(&parts.concat(), device)?;
        let mut parts = sent.f_split_with_sizes(parts.each_ref().map(|part| part.len() as i64), 0)?.into_iter();
        let mut next = || parts.next().ok_or_else(|| Error::internal("a tensor was not split"));
        Ok(SlotMoves { limits, first_move: next()?, from: next()?, to: next()? })
    }

    pub(super) fn len(&self) -> usize {
        self.from.numel()
    }
}

/// The contents of the three tensors.
fn parts(moves: impl Iterator<Item = (usize, usize, usize)>, limits: InputLimits) -> Result<[Vec<i32>; 3]> {
    let InputLimits { num_rows, capacity, .. } = limits;
    let [mut first_move, mut from, mut to] = [vec![0; num_rows + 1], Vec::new(), Vec::new()];
    let mut last = None;
    for (row, source, target) in moves {
        let fits = row < num_rows && source < capacity && target < source;
        if !fits || last >= Some((row, source)) {
            return Err(Error::internal(format!(
                "slot {source} of row {row} cannot move to {target} after {last:?}, in {num_rows} rows of {capacity}"
            )));
        }
        last = Some((row, source));
        first_move[row + 1..].iter_mut().for_each(|first| *first += 1);
        from.push(source as i32);
        to.push(target as i32);
    }
    Ok([first_move, from, to])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::shape::KernelShape;

    const LIMITS: InputLimits = InputLimits { model: KernelShape::TWO_TOKEN_TILES, num_rows: 4, capacity: 32 };

    #[test]
    fn moves_are_grouped_by_row() {
        let moves = [(0, 7, 5), (0, 9, 6), (2, 31, 30)];
        let [first_move, from, to] = parts(moves.into_iter(), LIMITS).unwrap();
        assert_eq!((first_move, from, to), (vec![0, 2, 2, 3, 3], vec![7, 9, 31], vec![5, 6, 30]));
    }

    #[test]
    fn moves_that_a_group_could_not_read_first_or_outside_of_the_cache_are_refused() {
        for moves in [
            vec![(4, 7, 5)],
            vec![(0, 32, 5)],
            vec![(0, 5, 5)],
            vec![(0, 5, 6)],
            vec![(0, 7, 5), (0, 7, 6)],
            vec![(0, 9, 6), (0, 7, 5)],
            vec![(1, 7, 5), (0, 9, 6)],
        ] {
            assert!(matches!(parts(moves.clone().into_iter(), LIMITS), Err(Error::Internal(_))), "{moves:?}");
        }
    }
}
