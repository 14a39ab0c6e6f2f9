//! Which recorded state of a block is trained in a pass.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::settings::{ConsistencySettings, StateSampling};

/// The number of the state that a pass takes of block `index` of a response; `states` ends with the fixed point, which is
/// taken only where there is no other.
pub fn choose(states: &[Vec<i32>], index: usize, consistency: &ConsistencySettings, rng: &mut ChaCha8Rng) -> usize {
    let noisy = (states.len() - 1).max(1);
    match consistency.states {
        StateSampling::Uniform => rng.random_range(0..noisy),
        StateSampling::Progressive => {
            let wanted = noise_ratio(index, consistency.window_blocks);
            let shares = shares_wrong(states);
            let distance = |state: usize| (shares[state] - wanted).abs();
            let least = (0..noisy).map(distance).fold(f64::INFINITY, f64::min);
            // StateSampling may be equally near; a draw lets each have its turn over the epochs.
            let nearest: Vec<usize> = (0..noisy).filter(|&state| distance(state) <= least).collect();
            nearest[rng.random_range(0..nearest.len())]
        }
    }
}

/// The share of wrong tokens that block `index` of a response should have: it rises linearly from 0 in the first block of a
/// window to 1 in its last, and starts anew with the next window (Jacobi Forcing, arXiv 2512.14681). A window of one block
/// has all noise.
fn noise_ratio(index: usize, window: usize) -> f64 {
    if window < 2 { 1.0 } else { (index % window) as f64 / (window - 1) as f64 }
}

/// Of each state, the share of its tokens that differ from the fixed point, the last state.
fn shares_wrong(states: &[Vec<i32>]) -> Vec<f64> {
    let fixed_point = states.last().map(Vec::as_slice).unwrap_or_default();
    let wrong = |state: &Vec<i32>| state.iter().zip(fixed_point).filter(|(token, right)| token != right).count();
    states.iter().map(|state| wrong(state) as f64 / state.len().max(1) as f64).collect()
}

#[cfg(test)]
mod tests {
    use cllm_core::fingerprint;

    use super::*;

    /// A block of 4 tokens whose states have 4, 3, 3, 1 and 0 wrong tokens.
    fn block() -> Vec<Vec<i32>> {
        [[9, 9, 9, 9], [1, 9, 9, 9], [9, 2, 9, 9], [1, 2, 9, 4], [1, 2, 3, 4]].map(Vec::from).into()
    }

    fn chosen(index: usize, window: usize, epoch: u64) -> usize {
        let consistency = ConsistencySettings {
            states: StateSampling::Progressive,
            window_blocks: window,
            ..ConsistencySettings::default()
        };
        choose(&block(), index, &consistency, &mut fingerprint::derive_rng(1, "a", epoch))
    }

    #[test]
    fn noise_rises_over_a_window_and_starts_anew_with_the_next() {
        let ratios: Vec<f64> = (0..6).map(|index| noise_ratio(index, 3)).collect();
        assert_eq!(ratios, [0.0, 0.5, 1.0, 0.0, 0.5, 1.0]);
        assert_eq!((noise_ratio(0, 1), noise_ratio(5, 1), noise_ratio(3, 2)), (1.0, 1.0, 1.0));
    }

    #[test]
    fn a_block_takes_the_state_whose_share_of_wrong_tokens_is_nearest() {
        assert_eq!(shares_wrong(&block()), [1.0, 0.75, 0.75, 0.25, 0.0]);
        // Ratios 0, 1/3, 2/3, 1: the fixed point, which has the first of them, is not taken.
        let window = [0, 1, 3].map(|index| chosen(index, 4, 0));
        assert_eq!(window, [3, 3, 0]);
        assert_eq!([4, 5, 7].map(|index| chosen(index, 4, 0)), window);
        let fixed_point_alone =
            choose(&block()[4..], 3, &ConsistencySettings::default(), &mut fingerprint::derive_rng(1, "a", 0));
        assert_eq!(fixed_point_alone, 0);
    }

    #[test]
    fn states_that_are_equally_near_take_turns_the_same_way_each_time() {
        let drawn: Vec<usize> = (0..32).map(|epoch| chosen(2, 4, epoch)).collect();
        assert!(drawn.iter().all(|state| [1, 2].contains(state)), "{drawn:?}");
        assert!(drawn.contains(&1) && drawn.contains(&2), "{drawn:?}");
        assert_eq!(drawn, (0..32).map(|epoch| chosen(2, 4, epoch)).collect::<Vec<_>>());
    }
}
