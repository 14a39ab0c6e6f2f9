//! What a run learns from, in memory: references of prompt sets or trajectories.

use std::path::Path;

use cllm_core::model::ModelConfig;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Reader, Trajectory};
use cllm_core::{Error, Result, interrupt, progress, prompt_set};
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::data::packing::{NoisyBlock, Packed};
use crate::data::state_sampling as states;
use crate::settings::{BlockContext, ConsistencySettings, LabelSource, Objective, Settings};

/// One response to learn from.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Names the randomness.
    pub id: String,
    /// Token ids of the prompt.
    pub prompt: Vec<i32>,
    /// Token ids of the response, EOS included.
    pub response: Vec<i32>,
    /// In the order of their starts.
    pub blocks: Vec<Block>,
    /// Whether the autoregressive loss teaches the response.
    pub labels: bool,
}

/// One block of a response.
#[derive(Debug, Clone, PartialEq)]
pub struct Block {
    /// Position of its first token in the response.
    pub start: usize,
    /// Its states; the last is the fixed point.
    pub states: Vec<Vec<i32>>,
    /// Which of them `augment` changed; empty where it changed none.
    pub augmented: Vec<bool>,
}

/// Reads every data set of a run. What is longer than the model's context is left out, and counted on stderr.
///
/// # Errors
/// Bad files, a data set of another tokenizer or of a larger vocabulary, no rows that fit.
pub fn read(settings: &Settings, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<Vec<Example>> {
    let mut examples = Vec::new();
    for path in &settings.datasets {
        match settings.objective {
            Objective::Sft => examples.extend(references(path, tokenizer)?),
            Objective::Consistency => {
                examples.extend(trajectories(path, tokenizer, config, settings.consistency.labels, usize::MAX)?);
            }
        }
    }
    if !examples.is_empty() && examples.iter().all(|example| !example.labels) {
        let message = "consistency.labels is dataset, but no row of the data has a reference: collect from prompts that \
                       have one, or set it to teacher";
        return Err(Error::usage(message));
    }
    let all = examples.len();
    examples.retain(|example: &Example| example.prompt.len() + example.response.len() <= config.max_positions);
    let too_long = all - examples.len();
    let of_context = format!("longer, with their prompts, than the model's context of {}", config.max_positions);
    if examples.is_empty() {
        let why = if all == 0 { String::new() } else { format!(": all {all} are {of_context}") };
        return Err(Error::usage(format!("data: no responses to learn from in {:?}{why}", settings.datasets)));
    }
    if too_long > 0 {
        progress::log(format!("{too_long} responses are {of_context}: they are left out"));
    }
    Ok(examples)
}

fn references(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<Example>> {
    let samples = prompt_set::read(path)?;
    let all = samples.len();
    let with_reference: Vec<_> = samples
        .into_iter()
        .filter_map(|mut sample| {
            let reference = sample.reference.take()?;
            Some((sample, reference))
        })
        .collect();
    if with_reference.len() < all {
        let lacking = all - with_reference.len();
        progress::log(format!("{}: {lacking} of {all} prompts have no reference: they are left out", path.display()));
    }
    with_reference
        .into_iter()
        .map(|(sample, reference)| {
            interrupt::check()?;
            let (_, prompt) = tokenizer.encode_prompt(&sample.prompt)?;
            let response = tokenizer.encode_target(&reference)?;
            Ok(Example { id: sample.id, prompt, response, blocks: Vec::new(), labels: true })
        })
        .collect()
}

/// Reads the first rows of a data set, at most `most`. Where the labels are the data set's own answers, each is an example
/// of its own beside its trajectory, which then has none; rows without one are counted on stderr.
///
/// # Errors
/// As [`read`], but for there being no rows.
pub fn trajectories(
    path: &Path,
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    labels: LabelSource,
    most: usize,
) -> Result<Vec<Example>> {
    let reader = Reader::open(path)?;
    reader.check_tokenizer(tokenizer.fingerprint())?;
    // The teacher may have had ids that this model has not.
    let mut promised = reader.provenance().clone();
    promised.vocab_size = promised.vocab_size.min(config.vocab_size as usize);
    let mut examples = Vec::new();
    let (mut rows, mut lacking) = (0, 0);
    for row in reader.unchecked_rows().take(most) {
        interrupt::check()?;
        let mut row = row?;
        row.check(&promised).map_err(|message| Error::file(path, format!("row `{}`: {message}", row.sample_id)))?;
        rows += 1;
        match row.reference.take() {
            _ if labels == LabelSource::Teacher => {}
            None => lacking += 1,
            Some(reference) => examples.push(Example {
                id: row.sample_id.clone(),
                prompt: row.prompt_ids.clone(),
                response: tokenizer.encode_target(&reference)?,
                blocks: Vec::new(),
                labels: true,
            }),
        }
        examples.push(Example::of(row, labels == LabelSource::Teacher));
    }
    if lacking > 0 {
        let without = "have no reference: they are in no autoregressive loss";
        progress::log(format!("{}: {lacking} of {rows} rows {without}", path.display()));
    }
    Ok(examples)
}

impl Block {
    /// The state after one, where decoding went from the one to the other: a state that `augment` changed never was there.
    fn next(&self, state: usize) -> Option<&[i32]> {
        let changed = |state: usize| self.augmented.get(state).is_some_and(|&changed| changed);
        self.states.get(state + 1).filter(|_| !changed(state) && !changed(state + 1)).map(Vec::as_slice)
    }
}

impl Example {
    fn of(row: Trajectory, labels: bool) -> Self {
        let flags = row.augmented.unwrap_or_default().into_iter().chain(std::iter::repeat(Vec::new()));
        let blocks = row.blocks.into_iter().zip(flags).map(|(block, augmented)| Block {
            start: block.start as usize,
            states: block.states,
            augmented,
        });
        Example {
            blocks: blocks.filter(|block| block.start < row.response_ids.len()).collect(),
            id: row.sample_id,
            prompt: row.prompt_ids,
            response: row.response_ids,
            labels,
        }
    }

    /// Tokens of its noisy blocks in a pass, at most; with local consistency as many stand in the next states.
    pub fn noisy_len(&self, consistency: &ConsistencySettings) -> usize {
        let candidates = self.candidates(consistency).len();
        let chosen = consistency.max_blocks.map_or(candidates, |max| candidates.min(max));
        chosen * self.blocks.first().map_or(0, |block| block.states[0].len())
    }

    /// Tokens of its packed sequence, at most.
    pub fn packed_len(&self, consistency: &ConsistencySettings) -> usize {
        let streams = if consistency.local_weight > 0.0 { 2 } else { 1 };
        self.prompt.len() + self.response.len() + self.noisy_len(consistency) * streams
    }

    /// The blocks that a pass may hold. One that was right at once has nothing to learn, but in a window the blocks
    /// after it see it.
    fn candidates(&self, consistency: &ConsistencySettings) -> Vec<usize> {
        let all = consistency.context == BlockContext::NoisyWindow;
        (0..self.blocks.len()).filter(|&index| all || self.blocks[index].states.len() > 1).collect()
    }

    /// The packed sequence of one pass: blocks and, for each, one of its noisy states drawn with `rng`.
    pub fn pack(&self, consistency: &ConsistencySettings, rng: &mut ChaCha8Rng) -> Packed {
        let mut chosen = self.candidates(consistency);
        if let Some(max_blocks) = consistency.max_blocks {
            chosen.shuffle(rng);
            chosen.truncate(max_blocks);
            chosen.sort_unstable();
        }
        let noisy = chosen.into_iter().map(|index| {
            let block @ Block { start, states, .. } = &self.blocks[index];
            let drawn = states::choose(states, index, consistency, rng);
            let state = &states[drawn];
            let n = state.len();
            let window = match consistency.context {
                BlockContext::Clean => *start,
                BlockContext::NoisyWindow => start / (n * consistency.window_blocks) * (n * consistency.window_blocks),
            };
            let inside = n.min(self.response.len() - start);
            let next = match block.next(drawn) {
                Some(next) if consistency.local_weight > 0.0 => next[..inside].to_vec(),
                _ => Vec::new(),
            };
            NoisyBlock { start: *start, window, tokens: state[..inside].to_vec(), next }
        });
        let packed = Packed::new(&self.prompt, &self.response, noisy.collect());
        if self.labels { packed } else { packed.without_labels() }
    }
}
