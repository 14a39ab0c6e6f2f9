//! A cache of the beginnings of prompts, which chats and benchmarks repeat. Keys and values are kept
//! in blocks of some tokens, in rows of the KV cache that no sequence runs in. A block belongs to
//! its tokens and to the block before it, so prompts share the blocks of their common beginning.
//! Where there is no room, the blocks go that have not been used for the longest time.

use std::collections::HashMap;

use crate::model::SlotCopy;

/// Tokens of a block.
pub(super) const BLOCK_TOKENS: usize = 32;

/// The blocks that are in the cache.
pub(super) struct PrefixCache {
    blocks: HashMap<BlockKey, Block>,
    places: BlockPlaces,
    /// Places without a block.
    free: Vec<usize>,
    clock: u64,
}

/// The number of the block before, 0 for none, and the tokens of the block itself.
type BlockKey = (u64, Vec<i32>);

struct Block {
    /// Never given twice, so that what follows a block that is gone is never found again.
    number: u64,
    place: usize,
    last_used: u64,
}

/// Where blocks are: in rows from `first_row` on, one after another.
#[derive(Clone, Copy)]
struct BlockPlaces {
    first_row: usize,
    blocks_per_row: usize,
}

impl BlockPlaces {
    /// Row and first slot of a place.
    fn slot(self, place: usize) -> (usize, usize) {
        (self.first_row + place / self.blocks_per_row, place % self.blocks_per_row * BLOCK_TOKENS)
    }
}

impl PrefixCache {
    /// An empty cache in `num_rows` rows of `capacity` slots, from `first_row` on.
    pub(super) fn new(first_row: usize, num_rows: usize, capacity: usize) -> Self {
        let places = BlockPlaces { first_row, blocks_per_row: capacity / BLOCK_TOKENS };
        let free = (0..num_rows * places.blocks_per_row).rev().collect();
        PrefixCache { blocks: HashMap::new(), places, free, clock: 0 }
    }

    /// The copies that bring the longest cached beginning of `tokens` into a row.
    pub(super) fn load(&mut self, tokens: &[i32], row: usize) -> Vec<SlotCopy> {
        let mut found = Vec::new();
        let mut before = 0;
        for tokens in tokens.chunks_exact(BLOCK_TOKENS) {
            let key = (before, tokens.to_vec());
            let Some(block) = self.blocks.get(&key) else { break };
            before = block.number;
            found.push((key, block.place));
        }
        // The first block is the last to go: those after it cannot be found without it.
        for (key, _) in found.iter().rev() {
            self.clock += 1;
            if let Some(block) = self.blocks.get_mut(key) {
                block.last_used = self.clock;
            }
        }
        let copies = found.iter().enumerate();
        copies.map(|(index, (_, place))| copy_of_block(self.places.slot(*place), (row, index * BLOCK_TOKENS))).collect()
    }

    /// Adds the blocks of `tokens`, which are in the leading slots of a row, and returns the copies
    /// that bring the new ones into the cache.
    pub(super) fn store(&mut self, tokens: &[i32], row: usize) -> Vec<SlotCopy> {
        let num_blocks = tokens.len() / BLOCK_TOKENS;
        let (started, mut before, mut copies) = (self.clock, 0, Vec::new());
        self.clock += num_blocks as u64;
        for (index, tokens) in tokens.chunks_exact(BLOCK_TOKENS).enumerate() {
            let (key, last_used) = ((before, tokens.to_vec()), started + (num_blocks - index) as u64);
            if let Some(block) = self.blocks.get_mut(&key) {
                block.last_used = last_used;
                before = block.number;
                continue;
            }
            let Some(place) = self.free.pop().or_else(|| self.evict_before(started)) else { break };
            copies.push(copy_of_block((row, index * BLOCK_TOKENS), self.places.slot(place)));
            self.clock += 1;
            before = self.clock;
            self.blocks.insert(key, Block { number: self.clock, place, last_used });
        }
        copies
    }

    /// Drops the block that has not been used for the longest time, if it was not used after
    /// `started`, and returns its place.
    fn evict_before(&mut self, started: u64) -> Option<usize> {
        let oldest = self.blocks.iter().min_by_key(|(_, block)| block.last_used);
        let key = oldest.filter(|(_, block)| block.last_used <= started)?.0.clone();
        self.blocks.remove(&key).map(|block| block.place)
    }

    /// The part of the cache that has blocks.
    pub(super) fn use_ratio(&self) -> f64 {
        let num_blocks = self.blocks.len();
        num_blocks as f64 / (num_blocks + self.free.len()).max(1) as f64
    }
}

fn copy_of_block(from: (usize, usize), to: (usize, usize)) -> SlotCopy {
    SlotCopy { from, to, num_slots: BLOCK_TOKENS }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(of_blocks: &[i32]) -> Vec<i32> {
        of_blocks.iter().flat_map(|&token| [token; BLOCK_TOKENS]).collect()
    }

    /// Slots in blocks: the row, and the number of the block in it.
    fn in_blocks(copies: &[SlotCopy]) -> Vec<[(usize, usize); 2]> {
        copies.iter().map(|copy| [copy.from, copy.to].map(|(row, slot)| (row, slot / BLOCK_TOKENS))).collect()
    }

    #[test]
    fn prompts_share_the_blocks_of_their_common_beginning() {
        let mut cache = PrefixCache::new(5, 2, 2 * BLOCK_TOKENS + 7);
        assert_eq!(in_blocks(&cache.store(&tokens(&[1, 2]), 0)), [[(0, 0), (5, 0)], [(0, 1), (5, 1)]]);
        assert_eq!(in_blocks(&cache.store(&tokens(&[1, 3]), 4)), [[(4, 1), (6, 0)]]);
        assert_eq!(in_blocks(&cache.load(&tokens(&[1, 3, 4]), 2)), [[(5, 0), (2, 0)], [(6, 0), (2, 1)]]);
        // The same tokens after others are another block, and so is a part of a block.
        assert!(cache.load(&tokens(&[2]), 2).is_empty());
        assert!(cache.load(&tokens(&[1])[..BLOCK_TOKENS - 1], 2).is_empty());
        assert_eq!(cache.use_ratio(), 0.75);
    }

    #[test]
    fn the_least_recently_used_blocks_go_and_the_first_of_a_prompt_goes_last() {
        let mut cache = PrefixCache::new(0, 1, 3 * BLOCK_TOKENS);
        cache.store(&tokens(&[1, 2, 3]), 1);
        assert_eq!(cache.store(&tokens(&[4]), 1).len(), 1);
        assert_eq!(cache.load(&tokens(&[1, 2, 3]), 1).len(), 2);
        assert_eq!(cache.store(&tokens(&[5]), 1).len(), 1);
        assert_eq!(cache.load(&tokens(&[4]), 1).len(), 0, "the block of 4 was the oldest");
        assert_eq!(cache.load(&tokens(&[1, 2]), 1).len(), 2);
    }

    #[test]
    fn a_prompt_that_is_longer_than_the_cache_keeps_its_beginning() {
        let mut cache = PrefixCache::new(0, 1, 2 * BLOCK_TOKENS);
        cache.store(&tokens(&[9]), 1);
        assert_eq!(cache.store(&tokens(&[1, 2, 3]), 1).len(), 2);
        assert_eq!(cache.load(&tokens(&[1, 2, 3]), 1).len(), 2);
    }
}
