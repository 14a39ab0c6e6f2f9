//! Block masks: which tiles of keys a tile of queries attends to, so that attention skips the
//! others, and the bits of the tiles of which it attends to some keys only.

/// The tokens that a token attends to: ranges `start..end` of tokens of a packed batch, disjoint,
/// empty if `start >= end`. They are part of its own sequence and contain the token itself.
pub type AttentionRanges = [(i32, i32); 3];

/// Tokens of a tile, whether of queries or of keys.
pub(super) const TILE: usize = 64;
/// Numbers of an entry of a block mask.
pub(super) const ENTRY: usize = 4;
/// Tiles in a group, at most.
const MAX_PARTS: usize = ENTRY - 1;

/// How the tiles of a group pair with another tile. Otherwise, a number says where the 64 words of
/// bits start, in units of 64 words.
const ATTENDS_TO_ALL: i32 = -1;
const ATTENDS_TO_NONE: i32 = -2;

/// For each group of consecutive tiles, the tiles of the other kind (keys for queries, or queries
/// for keys) that one of them is paired with.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BlockMask {
    /// The pairs of group i are entries `offsets[i]..offsets[i + 1]`.
    pub(super) offsets: Vec<i32>,
    /// An entry: the index of the other tile, and a code for each tile of the group. Those that a
    /// group lacks attend to nothing.
    pub(super) entries: Vec<[i32; ENTRY]>,
}

/// The block masks of groups of queries and of keys.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BlockMasks {
    pub(super) of_queries: BlockMask,
    /// Those for the backward: of drafts alone, if they alone have gradients.
    pub(super) backward_of_queries: Option<BlockMask>,
    pub(super) of_keys: BlockMask,
    /// A word for each token of a tile that is paired partially; bit j stands for token j of the
    /// other tile.
    pub(super) bits: Vec<u64>,
}

/// A tile and another one that it is paired with, and the code.
type Pair = (usize, usize, i32);

/// The block masks for groups of `query_parts` tiles of queries and of `key_parts` tiles of keys,
/// at most 3. The number of tokens is a multiple of [`TILE`]. If only drafts have gradients,
/// `draft_tiles` says which tiles have some. In the backward, others are then paired with themselves
/// alone, since no group may be empty.
pub(super) fn block_masks(
    ranges: &[AttentionRanges],
    (query_parts, key_parts): (usize, usize),
    draft_tiles: Option<&[bool]>,
) -> BlockMasks {
    let num_tiles = ranges.len() / TILE;
    let (mut by_queries, mut by_keys, mut bits) = (Vec::new(), Vec::new(), Vec::new());
    // For each tile of keys: how many more queries of the current tile attend to some of it, and to
    // all of it, than to the tile before it.
    let (mut more_some, mut more_all) = (vec![0; num_tiles + 1], vec![0; num_tiles + 1]);
    for (query_tile, queries) in ranges.chunks(TILE).enumerate() {
        let mut attended = num_tiles..0;
        for &(start, end) in queries.iter().flatten().filter(|(start, end)| start < end) {
            let (start, end) = (start as usize, end as usize);
            let (some, all) = (start / TILE..end.div_ceil(TILE), start.div_ceil(TILE)..end / TILE);
            attended = attended.start.min(some.start)..attended.end.max(some.end);
            more_some[some.start] += 1;
            more_some[some.end] -= 1;
            if !all.is_empty() {
                more_all[all.start] += 1;
                more_all[all.end] -= 1;
            }
        }
        let (mut num_some, mut num_all) = (0, 0);
        for key_tile in attended.clone() {
            num_some += std::mem::take(&mut more_some[key_tile]);
            num_all += std::mem::take(&mut more_all[key_tile]);
            if num_some == 0 {
                continue;
            }
            let mut codes = [ATTENDS_TO_ALL; 2];
            if num_all < TILE as i32 {
                let words = words_of_queries(queries, key_tile);
                codes = [words, transposed(words)].map(|words| {
                    bits.extend(words);
                    (bits.len() / TILE - 1) as i32
                });
            }
            by_queries.push((query_tile, key_tile, codes[0]));
            by_keys.push((key_tile, query_tile, codes[1]));
        }
        (more_some[attended.end], more_all[attended.end]) = (0, 0);
    }
    let backward_of_queries = draft_tiles.map(|has_drafts| {
        by_keys.retain(|&(key, query, _)| key == query || has_drafts[key] && has_drafts[query]);
        let needed = by_queries.iter().copied().filter(|&(query, key, _)| key == query || has_drafts[query]);
        grouped(needed.collect(), num_tiles, query_parts)
    });
    let of_queries = grouped(by_queries, num_tiles, query_parts);
    BlockMasks { of_queries, backward_of_queries, of_keys: grouped(by_keys, num_tiles, key_parts), bits }
}

/// For each query of a tile, the keys of a tile that it attends to.
fn words_of_queries(queries: &[AttentionRanges], key_tile: usize) -> [u64; TILE] {
    let first_key = (key_tile * TILE) as i32;
    let keys_before = |end: i32| match (end - first_key).clamp(0, TILE as i32) {
        64 => u64::MAX,
        num_keys => (1 << num_keys) - 1,
    };
    let attends = |query: usize| {
        let ranges = queries[query].iter().filter(|(start, end)| start < end);
        ranges.fold(0, |word, &(start, end)| word | (keys_before(end) & !keys_before(start)))
    };
    std::array::from_fn(attends)
}

/// Bit i of word j becomes bit j of word i (Hacker's Delight, 7-3): swaps ever smaller blocks.
fn transposed(mut words: [u64; TILE]) -> [u64; TILE] {
    let (mut size, mut low_halves) = (TILE / 2, u64::MAX >> (TILE / 2));
    while size > 0 {
        for row in (0..TILE).filter(|row| row & size == 0) {
            let swapped = ((words[row] >> size) ^ words[row + size]) & low_halves;
            words[row] ^= swapped << size;
            words[row + size] ^= swapped;
        }
        size /= 2;
        low_halves ^= low_halves << size;
    }
    words
}

/// The block mask of groups of `parts` tiles.
fn grouped(mut pairs: Vec<Pair>, num_tiles: usize, parts: usize) -> BlockMask {
    assert!(parts <= MAX_PARTS, "an entry has no room for {parts} tiles");
    pairs.sort_unstable_by_key(|&(tile, other, _)| (tile / parts, other));
    let (mut offsets, mut entries) = (vec![0], Vec::<[i32; ENTRY]>::new());
    for pairs in (0..num_tiles.div_ceil(parts)).scan(&pairs[..], |rest, group| {
        let (pairs, others) = rest.split_at(rest.partition_point(|(tile, ..)| tile / parts == group));
        *rest = others;
        Some(pairs)
    }) {
        for pairs in pairs.chunk_by(|left, right| left.1 == right.1) {
            let mut entry = [ATTENDS_TO_NONE; ENTRY];
            entry[0] = pairs[0].1 as i32;
            for &(tile, _, code) in pairs {
                entry[1 + tile % parts] = code;
            }
            entries.push(entry);
        }
        offsets.push(entries.len() as i32);
    }
    BlockMask { offsets, entries }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ranges of a sequence that starts at `base`.
    fn shifted(base: i32, ranges: impl IntoIterator<Item = AttentionRanges>) -> Vec<AttentionRanges> {
        ranges.into_iter().map(|token| token.map(|(start, end)| (start + base, end + base))).collect()
    }

    fn causal(length: i32) -> impl Iterator<Item = AttentionRanges> {
        (0..length).map(|token| [(0, token + 1), (0, 0), (0, 0)])
    }

    /// Whether each query attends to each key.
    fn dense(ranges: &[AttentionRanges]) -> Vec<Vec<bool>> {
        let attends =
            |ranges: &AttentionRanges, key: i32| ranges.iter().any(|&(start, end)| (start..end).contains(&key));
        let row = |query| (0..ranges.len() as i32).map(|key| attends(query, key)).collect();
        ranges.iter().map(row).collect()
    }

    /// Whether each token of a batch is paired with each other, by a block mask.
    fn dense_of(mask: &BlockMask, bits: &[u64], num_tokens: usize, parts: usize) -> Vec<Vec<bool>> {
        let mut dense = vec![vec![false; num_tokens]; num_tokens];
        for (group, offsets) in mask.offsets.windows(2).enumerate() {
            for entry in &mask.entries[offsets[0] as usize..offsets[1] as usize] {
                let codes = entry[1..].iter().enumerate().filter(|(_, code)| **code != ATTENDS_TO_NONE);
                for (part, &code) in codes {
                    assert!(part < parts);
                    let rows = &mut dense[(group * parts + part) * TILE..][..TILE];
                    let columns = entry[0] as usize * TILE..(entry[0] as usize + 1) * TILE;
                    for (index, row) in rows.iter_mut().enumerate() {
                        let word = usize::try_from(code).map_or(u64::MAX, |code| bits[code * TILE + index]);
                        for (bit, cell) in row[columns.clone()].iter_mut().enumerate() {
                            assert!(!*cell, "a pair is listed twice");
                            *cell = word >> bit & 1 == 1;
                        }
                    }
                }
            }
        }
        dense
    }

    #[test]
    fn a_block_mask_lists_whom_each_token_attends_to() {
        // Three sequences. The second has a clean part of 150 tokens, then two blocks of 16 that
        // attend to some of it.
        let noisy = (150..166)
            .map(|token| [(0, 130), (150, token + 1), (0, 0)])
            .chain((166..182).map(|token| [(0, 130), (150, 166), (166, token + 1)]));
        let ranges =
            [shifted(0, causal(200)), shifted(200, causal(150).chain(noisy)), shifted(382, causal(66))].concat();
        let expected = dense(&ranges);
        let transposed: Vec<Vec<bool>> =
            (0..ranges.len()).map(|key| expected.iter().map(|row| row[key]).collect()).collect();
        for (query_parts, key_parts) in [(1, 1), (3, 2), (2, 3)] {
            let masks = block_masks(&ranges, (query_parts, key_parts), None);
            let BlockMasks { of_queries, of_keys, bits, .. } = &masks;
            assert!(
                dense_of(of_queries, bits, ranges.len(), query_parts) == expected,
                "{query_parts} tiles of queries"
            );
            assert!(dense_of(of_keys, bits, ranges.len(), key_parts) == transposed, "{key_parts} tiles of keys");
        }
        // Only pairs that are neither whole nor empty have bits, once in each direction.
        let masks = block_masks(&ranges, (1, 1), None);
        let codes: Vec<i32> = masks.of_queries.entries.iter().map(|entry| entry[1]).collect();
        assert!(masks.of_queries.entries.iter().all(|entry| entry[2..] == [ATTENDS_TO_NONE; 2]));
        let num_partial = codes.iter().filter(|code| **code >= 0).count();
        assert_eq!(masks.bits.len(), num_partial * 2 * TILE);
        let is_empty = |code: &&i32| masks.bits[**code as usize * TILE..][..TILE].iter().all(|word| *word == 0);
        let is_whole = |code: &&i32| masks.bits[**code as usize * TILE..][..TILE].iter().all(|word| *word == u64::MAX);
        assert_eq!(codes.iter().filter(|code| **code >= 0).filter(|code| is_empty(code) || is_whole(code)).count(), 0);
        assert!(num_partial < codes.len(), "some tiles attend to all");
    }

    #[test]
    fn without_gradients_a_tile_is_paired_with_itself_alone() {
        // 192 clean tokens, and 64 drafts that attend to 130 of them.
        let drafts = (192..256).map(|token| [(0, 130), (192, token + 1), (0, 0)]);
        let ranges: Vec<AttentionRanges> = causal(192).chain(drafts).collect();
        let expected = dense(&ranges);
        let (all, draft_tiles) = (block_masks(&ranges, (2, 2), None), [false, false, false, true]);
        let masks = block_masks(&ranges, (2, 2), Some(&draft_tiles));
        assert_eq!((&masks.of_queries, &masks.bits), (&all.of_queries, &all.bits));
        let kept = |is_kept: fn(usize, usize) -> bool| -> Vec<Vec<bool>> {
            let is_kept = |row: usize, column: usize| expected[row][column] && is_kept(row / TILE, column / TILE);
            (0..256).map(|row| (0..256).map(|column| is_kept(row, column)).collect()).collect()
        };
        let of_queries = masks.backward_of_queries.unwrap();
        assert!(dense_of(&of_queries, &masks.bits, 256, 2) == kept(|query, key| query == key || query == 3));
        let of_keys = dense_of(&masks.of_keys, &masks.bits, 256, 2);
        let transposed = kept(|query, key| query == key);
        assert!((0..256).all(|key| (0..256).all(|query| of_keys[key][query] == transposed[query][key])));
    }

    #[test]
    fn bits_are_transposed() {
        let words: [u64; TILE] = std::array::from_fn(|row| (row as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let bit = |words: &[u64; TILE], row: usize, column: usize| words[row] >> column & 1;
        let turned = transposed(words);
        assert!(
            (0..TILE * TILE)
                .all(|cell| bit(&words, cell / TILE, cell % TILE) == bit(&turned, cell % TILE, cell / TILE))
        );
    }
}
