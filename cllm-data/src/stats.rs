//! `stats`: counts of a data set, and the convergence profile of its blocks (CLLM, table 3).

use std::path::PathBuf;

use clap::Args;
use cllm_core::program::{Outcome, print, print_json};
use cllm_core::progress::{self, count};
use cllm_core::trajectory::{FinishReason, INCOMPLETE_DATA_SET, Profile, Reader, Trajectory};
use cllm_core::{Result, interrupt};
use serde::Serialize;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Folder of the data set, or one of its shards.
    data: PathBuf,
    /// Print the result as one JSON document on stdout.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Stats {
    schema_version: u32,
    rows: usize,
    /// Responses that reached the length limit.
    unfinished: usize,
    /// Responses whose thought was closed at its limit.
    closed_thoughts: usize,
    prompt_tokens: usize,
    response_tokens: usize,
    blocks: usize,
    /// Mean number of states per block, first draft and fixed point included.
    states_per_block: f64,
    /// Decoded response tokens per forward, derived from the states; null if any states were augmented.
    tokens_per_forward: Option<f64>,
    /// Mean number of tokens by which an iteration extends the converged prefix of a whole block;
    /// null if all rows were augmented.
    fast_forwarded: Option<f64>,
    /// Mean number of stationary tokens per whole block; null if all rows were augmented.
    stationary: Option<f64>,
}

/// Sums over the rows of a data set.
#[derive(Default)]
struct Sums {
    num_rows: usize,
    num_unfinished: usize,
    num_closed_thoughts: usize,
    num_prompt_tokens: usize,
    num_response_tokens: usize,
    num_decoded_tokens: usize,
    num_blocks: usize,
    num_states: usize,
    num_forwards: usize,
    num_augmented_rows: usize,
    /// Profile of the whole blocks of rows that were not augmented.
    profile: Profile,
}

/// Prints the statistics of a data set.
///
/// # Errors
/// When the data set cannot be read.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let reader = Reader::open_incomplete(&arguments.data)?;
    if !reader.is_complete() {
        progress::log(format!("{} {INCOMPLETE_DATA_SET}", arguments.data.display()));
    }
    let mut sums = Sums::default();
    for row in reader.rows() {
        interrupt::check()?;
        sums.add(&row?);
    }
    let stats = sums.stats();
    if arguments.json {
        print_json(&stats)?;
    } else {
        print(&stats.text())?;
    }
    Ok(Outcome::Done)
}

impl Sums {
    fn add(&mut self, row: &Trajectory) {
        self.num_rows += 1;
        self.num_unfinished += usize::from(row.finish_reason == FinishReason::Length);
        self.num_closed_thoughts += usize::from(!row.forced_tokens().is_empty());
        self.num_prompt_tokens += row.prompt_ids.len();
        self.num_response_tokens += row.response_ids.len();
        self.num_decoded_tokens += row.num_decoded_tokens();
        self.num_blocks += row.blocks.len();
        self.num_states += row.blocks.iter().map(|block| block.states.len()).sum::<usize>();
        // Augmented states never occurred in decoding, so they tell nothing about it.
        if row.augmented.is_some() {
            self.num_augmented_rows += 1;
            return;
        }
        self.num_forwards += row.num_forwards();
        // A block that EOS cuts short did not converge to n tokens.
        for block in row.block_profiles().filter(|block| block.is_whole) {
            self.profile += block.profile;
        }
    }

    fn stats(&self) -> Stats {
        let ratio = |a: usize, b: usize| a as f64 / (b as f64).max(1.0);
        let tokens_per_forward = ratio(self.num_decoded_tokens, self.num_forwards);
        Stats {
            schema_version: 1,
            rows: self.num_rows,
            unfinished: self.num_unfinished,
            closed_thoughts: self.num_closed_thoughts,
            prompt_tokens: self.num_prompt_tokens,
            response_tokens: self.num_response_tokens,
            blocks: self.num_blocks,
            states_per_block: ratio(self.num_states, self.num_blocks),
            tokens_per_forward: (self.num_augmented_rows == 0).then_some(tokens_per_forward),
            fast_forwarded: self.profile.fast_forwarded_per_iteration(),
            stationary: self.profile.stationary_per_block(),
        }
    }
}

impl Stats {
    fn text(&self) -> String {
        let fast_forwarded = self.fast_forwarded.map(|mean| format!("{mean:.2} tokens fast-forwarded per iteration"));
        let stationary = self.stationary.map(|mean| format!("{mean:.2} stationary tokens per block"));
        let means: Vec<String> = fast_forwarded.into_iter().chain(stationary).collect();
        let profile = match &means[..] {
            [] => "no convergence profile: no row that was not augmented has a whole block".to_owned(),
            means => format!("whole blocks: {}", means.join(", ")),
        };
        let thoughts = match self.closed_thoughts {
            0 => String::new(),
            closed => format!(", {} closed at the limit", count(closed, "thought")),
        };
        format!(
            "{} ({} unfinished{thoughts}): {}, {}\n{}, {:.2} states per block\n{profile}",
            count(self.rows, "response"),
            self.unfinished,
            count(self.prompt_tokens, "prompt token"),
            count(self.response_tokens, "response token"),
            count(self.blocks, "block"),
            self.states_per_block,
        )
    }
}
