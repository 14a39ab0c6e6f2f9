//! `stats`: what a data set holds, and the paper's profile of its blocks (CLLM, table 3).

use std::path::Path;

use cllm_core::program::{Outcome, print, print_json};
use cllm_core::trajectory::{Block, FinishReason, Reader, Trajectory, UNFINISHED_DATA};
use cllm_core::{Result, interrupt, progress};
use serde::Serialize;

/// Figures of a data set.
#[derive(Debug, Default, Serialize)]
pub struct Stats {
    /// Version of this document.
    pub schema_version: u32,
    /// Responses.
    pub rows: usize,
    /// Responses that hit the length limit.
    pub unfinished: usize,
    /// Tokens of the prompts.
    pub prompt_tokens: usize,
    /// Tokens of the responses.
    pub response_tokens: usize,
    /// Blocks.
    pub blocks: usize,
    /// Mean number of states of a block, first guess and fixed point counted.
    pub states_per_block: f64,
    /// Response tokens over forwards, as the states tell them; none where augment changed states.
    pub tokens_per_forward: Option<f64>,
    /// Mean number of tokens that an iteration adds to the right prefix, in whole blocks; none where augment changed all.
    pub fast_forwarded: Option<f64>,
    /// Mean number of tokens of a whole block that were right before their turn and stayed right; likewise.
    pub stationary: Option<f64>,
}

/// Iterations, fast-forwarded and stationary tokens of one block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Profile {
    /// Iterations from the first guess to the fixed point.
    pub iterations: usize,
    /// Tokens that these added to the right prefix.
    pub fast_forwarded: usize,
    /// Tokens right before their turn that stayed right.
    pub stationary: usize,
}

/// Forwards that a response took: one for its first token; in a block one for each state after the first, and one more
/// that finds the last state to be a fixed point and opens the next block, or ends the answer.
pub(crate) fn forwards_of(row: &Trajectory) -> usize {
    let in_block = |block: &Block| {
        let last = block.states.len() - 1;
        let answer = block.states[last].len().min(row.response_ids.len() - block.start as usize);
        // Tokens known once the last state stands: a forward knows the guesses that it confirms and one more.
        let mut known = 1;
        for pair in block.states.windows(2) {
            known += (known..pair[0].len()).take_while(|&at| pair[0][at] == pair[1][at]).count() + 1;
        }
        let opens_next = (block.start as usize + block.states[last].len()) < row.response_ids.len();
        last + usize::from(known < answer || opens_next)
    };
    usize::from(!row.response_ids.is_empty()) + row.blocks.iter().map(in_block).sum::<usize>()
}

/// The profile of a block, by the definitions of the reference implementation.
pub fn profile(block: &Block) -> Profile {
    let Some(fixed_point) = block.states.last() else {
        return Profile { iterations: 0, fast_forwarded: 0, stationary: 0 };
    };
    let right = |state: &[i32], position: usize| state[position] == fixed_point[position];
    let prefix = |state: &[i32]| (0..state.len()).take_while(|&position| right(state, position)).count();
    let prefixes: Vec<usize> = block.states.iter().map(|state| prefix(state)).collect();
    let first = prefixes[0];
    let is_stationary = |&position: &usize| {
        let turn = prefixes.iter().position(|&prefix| prefix > position).unwrap_or(0);
        // Right in some state before its turn, and in every one from there on.
        turn > 0 && right(&block.states[turn - 1], position)
    };
    Profile {
        iterations: block.states.len() - 1,
        fast_forwarded: fixed_point.len() - first,
        stationary: (first..fixed_point.len()).filter(is_stationary).count(),
    }
}

/// Prints the figures of a data set.
///
/// # Errors
/// When it cannot be read.
pub fn run(data: &Path, as_json: bool) -> Result<Outcome> {
    let reader = Reader::open_unfinished(data)?;
    if !reader.is_complete() {
        progress::say(format!("{} {UNFINISHED_DATA}", data.display()));
    }
    let mut stats = Stats { schema_version: 1, ..Default::default() };
    let mut forwards = Some(0);
    let (mut states, mut whole_blocks, mut iterations, mut fast_forwarded, mut stationary) = (0, 0, 0, 0, 0);
    for row in reader.rows() {
        interrupt::check()?;
        let row = row?;
        stats.rows += 1;
        stats.unfinished += usize::from(row.finish_reason == FinishReason::Length);
        stats.prompt_tokens += row.prompt_ids.len();
        stats.response_tokens += row.response_ids.len();
        stats.blocks += row.blocks.len();
        // Augmented states never occurred in decoding; a block cut by the end of the answer did not converge to n tokens.
        let whole = |block: &&Block| {
            row.augmented.is_none() && block.start as usize + reader.provenance().n <= row.response_ids.len()
        };
        states += row.blocks.iter().map(|block| block.states.len()).sum::<usize>();
        forwards = forwards.filter(|_| row.augmented.is_none()).map(|sum| sum + forwards_of(&row));
        for profile in row.blocks.iter().filter(whole).map(profile) {
            whole_blocks += 1;
            iterations += profile.iterations;
            fast_forwarded += profile.fast_forwarded;
            stationary += profile.stationary * usize::from(profile.iterations > 0);
        }
    }
    let ratio = |a: usize, b: usize| a as f64 / (b as f64).max(1.0);
    stats.states_per_block = ratio(states, stats.blocks);
    stats.tokens_per_forward = forwards.map(|forwards| ratio(stats.response_tokens, forwards));
    stats.fast_forwarded = (iterations > 0).then(|| ratio(fast_forwarded, iterations));
    stats.stationary = (whole_blocks > 0).then(|| ratio(stationary, whole_blocks));
    if as_json {
        print_json(&stats)?;
    } else {
        let known = |figure: Option<f64>| figure.map_or("unknown".to_owned(), |figure| format!("{figure:.2}"));
        print(&format!(
            "{} responses ({} unfinished), {} prompt tokens, {} response tokens\n{} blocks, {:.2} states a block; in whole \
             blocks as they were decoded, tokens fast-forwarded an iteration: {}, stationary a block: {}",
            stats.rows,
            stats.unfinished,
            stats.prompt_tokens,
            stats.response_tokens,
            stats.blocks,
            stats.states_per_block,
            known(stats.fast_forwarded),
            known(stats.stationary)
        ))?;
    }
    Ok(Outcome::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profile_counts_what_the_paper_counts() {
        // Iteration 1 fixes one token; token 3 is right from then on, before its turn; iteration 2 fixes the rest.
        let block = Block { start: 0, states: vec![vec![1, 9, 9, 9], vec![1, 2, 8, 4], vec![1, 2, 3, 4]] };
        assert_eq!(profile(&block), Profile { iterations: 2, fast_forwarded: 3, stationary: 1 });
        let at_once = Block { start: 0, states: vec![vec![1, 2]] };
        assert_eq!(profile(&at_once), Profile { iterations: 0, fast_forwarded: 0, stationary: 0 });
    }
}
