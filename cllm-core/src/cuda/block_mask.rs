//! Block masks: which tiles of keys a tile of queries attends to, so that attention skips the
//! others.

/// The tokens that a token attends to: ranges `start..end` of tokens of a packed batch, disjoint,
/// empty if `start >= end`. They are part of its own sequence and contain the token itself.
pub type AttentionRanges = [(i32, i32); 3];

/// For each tile, the tiles of the other kind (keys for queries, or queries for keys) that it is
/// paired with.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct BlockMask {
    /// The pairs of tile i are `blocks[offsets[i]..offsets[i + 1]]`.
    pub(super) offsets: Vec<i32>,
    /// Twice the index of the other tile, plus 1 if every query of the pair attends to every key.
    pub(super) blocks: Vec<i32>,
}

/// The block masks of the tiles of queries and of the tiles of keys. The number of queries is a
/// multiple of both tile sizes.
pub(super) fn block_masks(
    ranges: &[AttentionRanges],
    query_tile_tokens: usize,
    key_tile_tokens: usize,
) -> (BlockMask, BlockMask) {
    let num_key_tiles = ranges.len() / key_tile_tokens;
    let (mut offsets, mut blocks) = (vec![0], Vec::new());
    let mut query_tiles_of_keys: Vec<Vec<i32>> = vec![Vec::new(); num_key_tiles];
    // For each tile of keys: how many queries of the current tile attend to some of it, and to all
    // of it.
    let (mut num_some, mut num_all) = (vec![0; num_key_tiles], vec![0; num_key_tiles]);
    for (query_tile, queries) in ranges.chunks(query_tile_tokens).enumerate() {
        let mut key_tiles = Vec::new();
        for &(start, end) in queries.iter().flatten().filter(|(start, end)| start < end) {
            let (start, end) = (start as usize, end as usize);
            for key_tile in start / key_tile_tokens..end.div_ceil(key_tile_tokens) {
                if num_some[key_tile] == 0 {
                    key_tiles.push(key_tile);
                }
                num_some[key_tile] += 1;
                let covers = start <= key_tile * key_tile_tokens && (key_tile + 1) * key_tile_tokens <= end;
                num_all[key_tile] += usize::from(covers);
            }
        }
        key_tiles.sort_unstable();
        for key_tile in key_tiles {
            let is_full = i32::from(num_all[key_tile] == queries.len());
            blocks.push(key_tile as i32 * 2 + is_full);
            query_tiles_of_keys[key_tile].push(query_tile as i32 * 2 + is_full);
            (num_some[key_tile], num_all[key_tile]) = (0, 0);
        }
        offsets.push(blocks.len() as i32);
    }
    let ends = query_tiles_of_keys.iter().scan(0, |end, tiles| {
        *end += tiles.len() as i32;
        Some(*end)
    });
    let key_offsets = std::iter::once(0).chain(ends).collect();
    (BlockMask { offsets, blocks }, BlockMask { offsets: key_offsets, blocks: query_tiles_of_keys.concat() })
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

    #[test]
    fn tiles_are_paired_if_a_query_attends_to_a_key_and_full_if_every_query_attends_to_every_key() {
        // Three sequences. The second has a clean part of 9 tokens, then two blocks of 4 that
        // attend to some of it.
        let noisy = (9..13)
            .map(|token| [(0, 8), (9, token + 1), (0, 0)])
            .chain((13..17).map(|token| [(0, 8), (9, 13), (13, token + 1)]));
        let ranges = [shifted(0, causal(13)), shifted(13, causal(9).chain(noisy)), shifted(30, causal(2))].concat();
        let dense = dense(&ranges);
        for (query_tile_tokens, key_tile_tokens) in [(4, 4), (8, 4), (4, 8), (32, 32)] {
            let (queries, keys) = block_masks(&ranges, query_tile_tokens, key_tile_tokens);
            let mut num_pairs = 0;
            for query in 0..32 / query_tile_tokens {
                for key in 0..32 / key_tile_tokens {
                    let rows = &dense[query * query_tile_tokens..(query + 1) * query_tile_tokens];
                    let columns = key * key_tile_tokens..(key + 1) * key_tile_tokens;
                    let cells: Vec<bool> = rows.iter().flat_map(|row| row[columns.clone()].to_vec()).collect();
                    let listed = |mask: &BlockMask, tile: usize, other: usize| {
                        let blocks = &mask.blocks[mask.offsets[tile] as usize..mask.offsets[tile + 1] as usize];
                        blocks.iter().find(|block| **block as usize / 2 == other).map(|block| block % 2 == 1)
                    };
                    let expected = cells.contains(&true).then(|| !cells.contains(&false));
                    assert_eq!(listed(&queries, query, key), expected, "{query} {key}");
                    assert_eq!(listed(&keys, key, query), expected, "{query} {key}");
                    num_pairs += usize::from(expected.is_some());
                }
            }
            assert_eq!((queries.blocks.len(), keys.blocks.len()), (num_pairs, num_pairs));
        }
    }
}
