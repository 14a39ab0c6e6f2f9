//! Trajectories made up for measurements: the time of a training step depends on their lengths
//! alone.

use cllm_core::fingerprint;
use garde::Validate;
use rand::RngExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::dataset::{Block, Example};

/// Random tokens in the lengths of real trajectories. The defaults are those of SmolLM2-135M on
/// GSM8K.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SyntheticSettings {
    /// Number of responses.
    #[garde(range(min = 1, max = 10_000_000))]
    pub num_responses: usize,
    /// Shortest and longest prompt, in tokens.
    #[garde(custom(is_range))]
    pub prompt_tokens: [usize; 2],
    /// Shortest and longest response, in tokens.
    #[garde(custom(is_range))]
    pub response_tokens: [usize; 2],
    /// Tokens per block.
    #[garde(range(min = 2, max = 1024))]
    pub n: usize,
}

impl Default for SyntheticSettings {
    fn default() -> Self {
        SyntheticSettings { num_responses: 2000, prompt_tokens: [60, 110], response_tokens: [128, 256], n: 16 }
    }
}

const MAX_TOKENS: usize = 1 << 20;

fn is_range([shortest, longest]: &[usize; 2], _: &()) -> garde::Result {
    if (1..=*longest).contains(shortest) && *longest <= MAX_TOKENS {
        return Ok(());
    }
    let message = format!("expected the shortest length, at least 1, and then the longest, at most {MAX_TOKENS}");
    Err(garde::Error::new(message))
}

/// Draws the examples. In each block, every state has one correct token more than the state before
/// it, as in a model that was not trained for Jacobi decoding.
pub(super) fn examples(settings: &SyntheticSettings, vocab_size: i64, seed: u64) -> Vec<Example> {
    (0..settings.num_responses).map(|index| example(settings, vocab_size as i32, seed, index)).collect()
}

fn example(settings: &SyntheticSettings, vocab_size: i32, seed: u64, index: usize) -> Example {
    let mut rng = fingerprint::derive_rng(seed, "synthetic", index as u64);
    let mut length = |[shortest, longest]: [usize; 2]| rng.random_range(shortest..=longest);
    let (num_prompt_tokens, num_response_tokens) = (length(settings.prompt_tokens), length(settings.response_tokens));
    let mut draw = |count: usize| -> Vec<i32> { (0..count).map(|_| rng.random_range(0..vocab_size)).collect() };
    let prompt_ids = draw(num_prompt_tokens);
    // The last block may run past the end of the response.
    let tokens = draw(num_response_tokens.next_multiple_of(settings.n));
    let blocks = tokens.chunks(settings.n).enumerate().map(|(number, fixed_point)| {
        let states = (1..=settings.n).map(|num_correct| {
            let (correct, wrong) = (&fixed_point[..num_correct], draw(settings.n - num_correct));
            [correct, &wrong].concat()
        });
        Block { start: number * settings.n, states: states.collect(), augmented: Vec::new() }
    });
    let blocks = blocks.collect();
    let response_ids = tokens[..num_response_tokens].to_vec();
    Example { blocks, ..Example::labelled(format!("synthetic-{index}"), prompt_ids, response_ids) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Settings;

    #[test]
    fn examples_have_the_lengths_that_were_asked_for_and_a_block_converges_token_by_token() {
        let settings = SyntheticSettings { num_responses: 200, ..SyntheticSettings::default() };
        let drawn = examples(&settings, 49_152, 1);
        assert_eq!(drawn, examples(&settings, 49_152, 1));
        let tokens = |example: &Example| example.max_packed_tokens(&Settings::plain().consistency);
        let mean = drawn.iter().map(tokens).sum::<usize>() as f64 / 200.0;
        assert!((450.0..500.0).contains(&mean), "{mean}");
        for example in &drawn {
            assert!((128..=256).contains(&example.response_ids.len()));
            let Block { start, states, .. } = example.blocks.last().unwrap();
            assert!(*start < example.response_ids.len() && states.len() == 16);
            assert!(states[15].starts_with(&example.response_ids[*start..]));
            assert_eq!((&states[3][..4], states[3].len()), (&states[15][..4], 16));
        }
    }
}
