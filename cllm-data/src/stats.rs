//! `stats`: what a data set holds, and the paper's profile of its blocks (CLLM, table 3).

use std::path::Path;

use cllm_core::program::{Outcome, print, print_json};
use cllm_core::trajectory::{FinishReason, INCOMPLETE_DATA_SET, Profile, Reader};
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

/// Prints the figures of a data set.
///
/// # Errors
/// When it cannot be read.
pub fn run(data: &Path, as_json: bool) -> Result<Outcome> {
    let reader = Reader::open_incomplete(data)?;
    if !reader.is_complete() {
        progress::log(format!("{} {INCOMPLETE_DATA_SET}", data.display()));
    }
    let mut stats = Stats { schema_version: 1, ..Default::default() };
    let mut forwards = Some(0);
    let (mut states, mut profile) = (0, Profile::default());
    for row in reader.rows() {
        interrupt::check()?;
        let row = row?;
        stats.rows += 1;
        stats.unfinished += usize::from(row.finish_reason == FinishReason::Length);
        stats.prompt_tokens += row.prompt_ids.len();
        stats.response_tokens += row.response_ids.len();
        stats.blocks += row.blocks.len();
        states += row.blocks.iter().map(|block| block.states.len()).sum::<usize>();
        forwards = forwards.filter(|_| row.augmented.is_none()).map(|sum| sum + row.num_forwards());
        // Augmented states never occurred in decoding; a block cut by the end of the answer did not converge to n tokens.
        if row.augmented.is_none() {
            row.block_profiles().filter(|&(_, whole)| whole).for_each(|(of_block, _)| profile += of_block);
        }
    }
    let ratio = |a: usize, b: usize| a as f64 / (b as f64).max(1.0);
    stats.states_per_block = ratio(states, stats.blocks);
    stats.tokens_per_forward = forwards.map(|forwards| ratio(stats.response_tokens, forwards));
    stats.fast_forwarded = profile.fast_forwarded_per_iteration();
    stats.stationary = profile.stationary_per_block();
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
