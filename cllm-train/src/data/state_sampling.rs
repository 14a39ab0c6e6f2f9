//! Draws the recorded state of each block that a pass over the data trains.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::settings::{ConsistencySettings, StateSampling};

/// The index of a state to train for block `block_index` of a response, which is none of those that
/// were `drawn` before unless there is no other. The last of the `states` is the fixed point, which
/// is drawn only if it is the only one.
pub fn sample_state(
    states: &[Vec<i32>],
    drawn: &[usize],
    block_index: usize,
    consistency: &ConsistencySettings,
    rng: &mut ChaCha8Rng,
) -> usize {
    let noisy = 0..num_noisy_states(states);
    let mut left: Vec<usize> = noisy.clone().filter(|state| !drawn.contains(state)).collect();
    if left.is_empty() {
        left = noisy.collect();
    }
    if consistency.states == StateSampling::Progressive {
        let target = target_noise(block_index, consistency.window_blocks);
        let fractions = incorrect_fractions(states);
        let distance = |state: usize| (fractions[state] - target).abs();
        let min_distance = left.iter().map(|&state| distance(state)).fold(f64::INFINITY, f64::min);
        // Ties are broken at random, so that over the epochs each of the tied states is trained.
        left.retain(|&state| distance(state) <= min_distance);
    }
    left[rng.random_range(0..left.len())]
}

/// How many tokens of the state that was drawn are trained: all, or a random number that includes the
/// first incorrect one.
pub fn sample_num_tokens(
    states: &[Vec<i32>],
    drawn: usize,
    consistency: &ConsistencySettings,
    rng: &mut ChaCha8Rng,
) -> usize {
    let state = &states[drawn];
    let Some(min_tokens) = consistency.min_block_tokens else { return state.len() };
    let fixed_point = states.last().unwrap_or(state);
    let first_incorrect = state.iter().zip(fixed_point).position(|(token, correct)| token != correct).unwrap_or(0);
    rng.random_range(min_tokens.max(first_incorrect + 1).min(state.len())..=state.len())
}

/// Number of states that can be drawn.
pub fn num_noisy_states(states: &[Vec<i32>]) -> usize {
    (states.len() - 1).max(1)
}

/// The fraction of incorrect tokens that block `block_index` of a response should have: it rises
/// linearly from 0 in the first block of a window to 1 in the last, and starts over with the next
/// window (Jacobi Forcing, arXiv 2512.14681). In a window of one block it is 1.
fn target_noise(block_index: usize, window_blocks: usize) -> f64 {
    if window_blocks < 2 { 1.0 } else { (block_index % window_blocks) as f64 / (window_blocks - 1) as f64 }
}

/// For each state, the fraction of its tokens that differ from the fixed point, which is the last
/// state.
fn incorrect_fractions(states: &[Vec<i32>]) -> Vec<f64> {
    let fixed_point = states.last().expect("a block has at least one state");
    let num_incorrect =
        |state: &Vec<i32>| state.iter().zip(fixed_point).filter(|(token, correct)| token != correct).count();
    states.iter().map(|state| num_incorrect(state) as f64 / state.len().max(1) as f64).collect()
}

#[cfg(test)]
mod tests {
    use cllm_core::fingerprint;

    use super::*;
    use crate::settings::Settings;

    /// A block of 4 tokens whose states have 4, 3, 3, 1 and 0 incorrect tokens.
    fn states() -> Vec<Vec<i32>> {
        [[9, 9, 9, 9], [1, 9, 9, 9], [9, 2, 9, 9], [1, 2, 9, 4], [1, 2, 3, 4]].map(Vec::from).into()
    }

    fn sampled(block_index: usize, window_blocks: usize, epoch: u64) -> usize {
        let consistency =
            ConsistencySettings { states: StateSampling::Progressive, window_blocks, ..Settings::plain().consistency };
        sample_state(&states(), &[], block_index, &consistency, &mut fingerprint::derive_rng(1, "a", epoch))
    }

    #[test]
    fn states_are_drawn_again_only_when_all_were_drawn() {
        for states_drawn in [StateSampling::Uniform, StateSampling::Progressive] {
            let consistency = ConsistencySettings { states: states_drawn, ..Settings::plain().consistency };
            let mut rng = fingerprint::derive_rng(1, "a", 0);
            let mut drawn = Vec::new();
            for _ in 0..5 {
                drawn.push(sample_state(&states(), &drawn, 1, &consistency, &mut rng));
            }
            let last = drawn.pop().unwrap();
            assert!(last < 4, "the fixed point is not drawn");
            drawn.sort_unstable();
            assert_eq!(drawn, [0, 1, 2, 3], "{states_drawn:?}");
        }
    }

    #[test]
    fn blocks_are_cut_at_random_but_not_before_their_first_incorrect_token() {
        let lengths = |state: usize, min_block_tokens: Option<usize>| {
            let consistency = ConsistencySettings { min_block_tokens, ..Settings::plain().consistency };
            let mut rng = fingerprint::derive_rng(1, "a", 0);
            let drawn = (0..64).map(|_| sample_num_tokens(&states(), state, &consistency, &mut rng));
            drawn.collect::<std::collections::BTreeSet<_>>()
        };
        assert_eq!(lengths(0, None), [4].into());
        assert_eq!(lengths(0, Some(2)), [2, 3, 4].into());
        assert_eq!(lengths(3, Some(2)), [3, 4].into(), "its third token is the first incorrect one");
        assert_eq!(lengths(0, Some(9)), [4].into());
    }

    #[test]
    fn noise_rises_over_a_window_and_starts_over_with_the_next() {
        let noise: Vec<f64> = (0..6).map(|index| target_noise(index, 3)).collect();
        assert_eq!(noise, [0.0, 0.5, 1.0, 0.0, 0.5, 1.0]);
        assert_eq!((target_noise(0, 1), target_noise(5, 1), target_noise(3, 2)), (1.0, 1.0, 1.0));
    }

    #[test]
    fn progressive_sampling_takes_the_state_nearest_to_the_target_noise() {
        assert_eq!(incorrect_fractions(&states()), [1.0, 0.75, 0.75, 0.25, 0.0]);
        // The targets are 0, 1/3, 2/3 and 1. The fixed point is the nearest to the first, but it is
        // never drawn.
        let window = [0, 1, 3].map(|index| sampled(index, 4, 0));
        assert_eq!(window, [3, 3, 0]);
        assert_eq!([4, 5, 7].map(|index| sampled(index, 4, 0)), window);
        let mut rng = fingerprint::derive_rng(1, "a", 0);
        let fixed_point_only = sample_state(&states()[4..], &[], 3, &Settings::plain().consistency, &mut rng);
        assert_eq!(fixed_point_only, 0);
    }

    #[test]
    fn tied_states_take_turns_reproducibly() {
        let drawn: Vec<usize> = (0..32).map(|epoch| sampled(2, 4, epoch)).collect();
        assert!(drawn.iter().all(|state| [1, 2].contains(state)), "{drawn:?}");
        assert!(drawn.contains(&1) && drawn.contains(&2), "{drawn:?}");
        assert_eq!(drawn, (0..32).map(|epoch| sampled(2, 4, epoch)).collect::<Vec<_>>());
    }
}
