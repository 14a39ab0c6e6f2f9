//! How the attention of a decoding step is cut into tiles, one per thread block. The host writes the
//! tiles into a forward's input, and the kernels are compiled for them.

use super::shape::KernelShape;

/// Up to this number of tokens, the attention kernel also rotates queries and keys and fills the
/// cache.
pub(super) const MAX_SMALL_STEP_TOKENS: usize = 32;
/// Query vectors that a warp of the attention kernel processes.
pub(super) const WARP_QUERIES: usize = 16;
/// Attention reads this many slots of the cache at a time, so the capacity of a row is a multiple
/// of it.
pub const SLOTS_PER_READ: usize = 32;

/// Maximum number of tokens in a tile of queries, in a step of `num_tokens`. Its query vectors must
/// fit the warps of a block.
pub fn tile_tokens(shape: &KernelShape, num_tokens: usize) -> usize {
    if num_tokens <= MAX_SMALL_STEP_TOKENS {
        // Small tiles let more multiprocessors share few tokens.
        (WARP_QUERIES / shape.group()).max(1)
    } else {
        (WARP_QUERIES * attention_warps(shape) / shape.group()).min(16)
    }
}

/// Warps of a block of the attention.
pub(super) fn attention_warps(shape: &KernelShape) -> usize {
    // A thread needs more registers for wide heads.
    if shape.head_dim <= 64 { 16 } else { 8 }
}
