//! Which tiles of keys a tile of queries sees, so that attention passes over the rest.

/// The places that a token sees: ranges `start..end` of the stream, disjoint, empty where `start >= end`. They lie in its own
/// sequence and hold the token itself.
pub type AttentionRanges = [(i32, i32); 3];

/// For each tile of one kind, in order, the tiles of the other kind that it meets.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Meetings {
    /// Where the meetings of each tile begin in `with`, and their end: one number more than tiles.
    pub(crate) starts: Vec<i32>,
    /// Twice the number of the other tile, plus 1 where every query sees every key.
    pub(crate) with: Vec<i32>,
}

/// The meetings of query tiles, and those of key tiles. `seen`: of each query; its length is a multiple of both tiles.
pub(crate) fn meetings(seen: &[AttentionRanges], query_tile: usize, key_tile: usize) -> (Meetings, Meetings) {
    let key_tiles = seen.len() / key_tile;
    let (mut starts, mut with) = (vec![0], Vec::new());
    let mut of_keys: Vec<Vec<i32>> = vec![Vec::new(); key_tiles];
    // Of each key tile: how many queries of the tile at hand see some of it, and all of it.
    let (mut some, mut all) = (vec![0; key_tiles], vec![0; key_tiles]);
    for (query, tile) in seen.chunks(query_tile).enumerate() {
        let mut met = Vec::new();
        for &(start, end) in tile.iter().flatten().filter(|(start, end)| start < end) {
            let (start, end) = (start as usize, end as usize);
            for key in start / key_tile..end.div_ceil(key_tile) {
                if some[key] == 0 {
                    met.push(key);
                }
                some[key] += 1;
                all[key] += usize::from(start <= key * key_tile && (key + 1) * key_tile <= end);
            }
        }
        met.sort_unstable();
        for key in met {
            let full = i32::from(all[key] == tile.len());
            with.push(key as i32 * 2 + full);
            of_keys[key].push(query as i32 * 2 + full);
            (some[key], all[key]) = (0, 0);
        }
        starts.push(with.len() as i32);
    }
    let ends = of_keys.iter().scan(0, |end, met| {
        *end += met.len() as i32;
        Some(*end)
    });
    let key_starts = std::iter::once(0).chain(ends).collect();
    (Meetings { starts, with }, Meetings { starts: key_starts, with: of_keys.concat() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::PackedBatch;

    /// Whether each query sees each key.
    fn dense(seen: &[AttentionRanges]) -> Vec<Vec<bool>> {
        let sees = |ranges: &AttentionRanges, key: i32| ranges.iter().any(|&(start, end)| (start..end).contains(&key));
        seen.iter().map(|ranges| (0..seen.len() as i32).map(|key| sees(ranges, key)).collect()).collect()
    }

    #[test]
    fn tiles_meet_where_a_query_sees_a_key_and_are_full_where_every_one_does() {
        let mut stream = PackedBatch::default();
        stream.push_causal(&[1; 13]);
        // A clean part of 9 tokens, then two blocks of 4 that see some of it.
        let mut seen: Vec<AttentionRanges> = (0..9).map(|place| [(0, place + 1), (0, 0), (0, 0)]).collect();
        seen.extend((9..13).map(|place| [(0, 8), (9, place + 1), (0, 0)]));
        seen.extend((13..17).map(|place| [(0, 8), (9, 13), (13, place + 1)]));
        stream.push(&[2; 17], &[0; 17], &seen);
        stream.push_causal(&[3; 2]);
        let dense = dense(&stream.attention_ranges);
        for (query_tile, key_tile) in [(4, 4), (8, 4), (4, 8), (32, 32)] {
            let (queries, keys) = meetings(&stream.attention_ranges, query_tile, key_tile);
            let mut found = 0;
            for query in 0..32 / query_tile {
                for key in 0..32 / key_tile {
                    let rows = &dense[query * query_tile..(query + 1) * query_tile];
                    let cells: Vec<bool> =
                        rows.iter().flat_map(|row| row[key * key_tile..(key + 1) * key_tile].to_vec()).collect();
                    let listed = |meetings: &Meetings, of: usize, other: usize| {
                        let met = &meetings.with[meetings.starts[of] as usize..meetings.starts[of + 1] as usize];
                        met.iter().find(|met| **met as usize / 2 == other).map(|met| met % 2 == 1)
                    };
                    let expected = cells.contains(&true).then(|| !cells.contains(&false));
                    assert_eq!(listed(&queries, query, key), expected, "{query} {key}");
                    assert_eq!(listed(&keys, key, query), expected, "{query} {key}");
                    found += usize::from(expected.is_some());
                }
            }
            assert_eq!((queries.with.len(), keys.with.len()), (found, found));
        }
    }
}
