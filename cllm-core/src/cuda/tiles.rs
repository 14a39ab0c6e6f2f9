//! How the attention of a decoding step is cut into tiles, one per cluster of thread blocks. The
//! host writes the tiles into a forward's input, and the kernels are compiled for them.

use super::shape::KernelShape;

/// Up to this number of tokens, the attention kernel also rotates queries and keys and fills the
/// cache.
pub(super) const MAX_SMALL_STEP_TOKENS: usize = 32;
/// Query vectors that a warp of the attention kernel processes.
pub(super) const WARP_QUERIES: usize = 16;
/// Maximum number of query vectors in a tile, so at least the number of query heads that share a head
/// of keys.
pub(super) const MAX_TILE_QUERIES: usize = 64;
/// Attention reads this many slots of the cache at a time, so the capacity of a row is a multiple
/// of it.
pub const SLOTS_PER_READ: usize = 32;

/// Maximum number of tokens in a tile, in a step of `num_tokens`.
pub(super) fn tile_tokens(shape: &KernelShape, num_tokens: usize) -> usize {
    if num_tokens <= MAX_SMALL_STEP_TOKENS {
        // Tiles of one warp's queries let more multiprocessors share few tokens.
        (WARP_QUERIES / shape.group()).max(1)
    } else {
        // A power of two, as are most windows.
        1 << (MAX_TILE_QUERIES / shape.group()).ilog2()
    }
}

/// Maximum number of tiles in a step of `num_tokens` that belong to at most `num_rows` rows.
pub fn max_tiles(shape: &KernelShape, num_tokens: usize, num_rows: usize) -> usize {
    let tile_tokens = tile_tokens(shape, num_tokens);
    ((num_tokens + num_rows * (tile_tokens - 1)) / tile_tokens).min(num_tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_as_many_as_the_least_favorable_rows_need() {
        // A token has 3 query vectors for each head of keys, so tiles have 5 or 16 tokens.
        let max_tiles = |num_tokens, num_rows| max_tiles(&KernelShape::SMOLLM2, num_tokens, num_rows);
        assert_eq!([1, 5, 16, 64].map(|num_tokens| max_tiles(num_tokens, 1)), [1, 1, 4, 4]);
        // Three rows of 17 tokens need two tiles each, and one of 16 a single one.
        assert_eq!(max_tiles(67, 4), 7);
        assert_eq!(max_tiles(8, 512), 8);
    }
}
