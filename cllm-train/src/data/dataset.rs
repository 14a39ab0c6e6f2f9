//! Reads the data sets of a run into memory: references of prompt sets for sft, trajectories for
//! consistency.

use std::path::Path;

use cllm_core::chat_template::RenderingRecord;
use cllm_core::model::ModelConfig;
use cllm_core::progress::count;
use cllm_core::prompt_set::Turns;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Reader, Trajectory};
use cllm_core::{Error, Result, interrupt, progress, prompt_set};
use serde_json::json;

use super::turns;
use crate::data::state_sampling::num_noisy_states;
use crate::settings::{BlockContext, ConsistencySettings, LabelSource, Objective, Settings};

/// One response to learn from, with its prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Example {
    /// Also seeds the random draws for this example.
    pub id: String,
    pub prompt_ids: Vec<i32>,
    /// EOS included. With several turns it goes through the end of the last, and holds the user's
    /// turns between them.
    pub response_ids: Vec<i32>,
    /// Sorted by their start.
    pub blocks: Vec<Block>,
    /// For each token of the response, whether the autoregressive loss teaches it.
    pub labelled: Vec<bool>,
}

/// One block of a response.
#[derive(Debug, Clone, PartialEq)]
pub struct Block {
    /// Position of its first token in the response.
    pub start: usize,
    /// Token ids of each state; the last is the fixed point.
    pub states: Vec<Vec<i32>>,
    /// Whether `augment` changed each state; empty if it changed none.
    pub augmented: Vec<bool>,
}

impl Block {
    /// The state that decoding reached from `state`. `None` if `augment` changed either of them,
    /// because decoding never took that step.
    pub(crate) fn next_state(&self, state: usize) -> Option<&[i32]> {
        let is_augmented = |state: usize| self.augmented.get(state).is_some_and(|&augmented| augmented);
        let is_adjacent = !is_augmented(state) && !is_augmented(state + 1);
        self.states.get(state + 1).filter(|_| is_adjacent).map(Vec::as_slice)
    }
}

impl Example {
    /// Bytes of memory that it takes.
    pub fn num_bytes(&self) -> u64 {
        let ids = |ids: &Vec<i32>| size_of::<Vec<i32>>() + ids.len() * size_of::<i32>();
        let block = |block: &Block| size_of::<Block>() + block.states.iter().map(ids).sum::<usize>();
        let rest = size_of::<Self>() + self.id.len() + self.labelled.len();
        (rest + ids(&self.prompt_ids) + ids(&self.response_ids) + self.blocks.iter().map(block).sum::<usize>()) as u64
    }

    /// A response that the autoregressive loss teaches.
    pub(crate) fn labelled(id: String, prompt_ids: Vec<i32>, response_ids: Vec<i32>) -> Self {
        Example { id, prompt_ids, labelled: vec![true; response_ids.len()], response_ids, blocks: Vec::new() }
    }

    fn from_trajectory(row: Trajectory, has_labels: bool) -> Self {
        let augmented = row.augmented.unwrap_or_default().into_iter().chain(std::iter::repeat(Vec::new()));
        let blocks = row.blocks.into_iter().zip(augmented).map(|(block, augmented)| Block {
            start: block.start as usize,
            states: block.states,
            augmented,
        });
        Example {
            blocks: blocks.filter(|block| block.start < row.response_ids.len()).collect(),
            id: row.sample_id,
            prompt_ids: row.prompt_ids,
            labelled: vec![has_labels; row.response_ids.len()],
            response_ids: row.response_ids,
        }
    }

    /// Tokens of the prompt and the response.
    pub fn num_clean_tokens(&self) -> usize {
        self.prompt_ids.len() + self.response_ids.len()
    }

    /// The maximum number of tokens in its noisy blocks. With local consistency, the next states
    /// add as many again.
    pub fn max_noisy_tokens(&self, consistency: &ConsistencySettings) -> usize {
        let mut num_draws: Vec<usize> =
            self.candidate_blocks(consistency).into_iter().map(|index| self.num_draws(index, consistency)).collect();
        num_draws.sort_unstable_by(|one, other| other.cmp(one));
        num_draws.truncate(consistency.max_blocks.unwrap_or(usize::MAX));
        num_draws.iter().sum::<usize>() * self.blocks.first().map_or(0, |block| block.states[0].len())
    }

    /// How many states of a block are trained in one pass over the data. A noisy window needs all
    /// its blocks each time.
    pub(crate) fn num_draws(&self, block_index: usize, consistency: &ConsistencySettings) -> usize {
        match consistency.context {
            BlockContext::Clean => consistency.states_per_block.min(num_noisy_states(&self.blocks[block_index].states)),
            BlockContext::NoisyWindow => consistency.states_per_block,
        }
    }

    /// The maximum number of tokens in its packed sequence.
    pub fn max_packed_tokens(&self, consistency: &ConsistencySettings) -> usize {
        let num_noisy_streams = if consistency.local_weight > 0.0 { 2 } else { 1 };
        self.num_clean_tokens() + self.max_noisy_tokens(consistency) * num_noisy_streams
    }

    /// Where the run of adjacent blocks that this block belongs to starts in the response, and the
    /// index of the block in the run. Only tokens that closed a thought separate two runs.
    pub(crate) fn contiguous_run(&self, block_index: usize) -> (usize, usize) {
        let is_first = |&index: &usize| {
            let (before, block) = (&self.blocks[index - 1], &self.blocks[index]);
            before.start + before.states[0].len() < block.start
        };
        let first = (1..=block_index).rfind(is_first).unwrap_or(0);
        (self.blocks[first].start, block_index - first)
    }

    /// Indices of the blocks that may be trained. A block that was correct from its first state has
    /// nothing to learn, but in a noisy window the later blocks attend to it.
    pub(crate) fn candidate_blocks(&self, consistency: &ConsistencySettings) -> Vec<usize> {
        let needs_all = consistency.context == BlockContext::NoisyWindow;
        (0..self.blocks.len()).filter(|&index| needs_all || self.blocks[index].states.len() > 1).collect()
    }
}

/// Reads all data sets of a run. Examples longer than the model's context are excluded, and counted
/// on stderr.
///
/// # Errors
/// Bad files, a data set of another tokenizer, chat template or larger vocabulary, no examples that fit.
pub fn read(settings: &Settings, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<Vec<Example>> {
    let mut examples = Vec::new();
    for path in &settings.datasets {
        match settings.objective {
            Objective::Sft => {
                let max_tokens = config.max_positions.min(settings.max_example_tokens);
                examples.extend(read_references(path, tokenizer, settings.sft.turns, max_tokens)?);
            }
            Objective::Consistency => {
                examples.extend(read_trajectories(path, tokenizer, config, settings.consistency.labels, usize::MAX)?);
            }
        }
    }
    if !examples.is_empty() && examples.iter().all(|example| !example.labelled.contains(&true)) {
        let message = "consistency.labels is dataset, but no row of the data has a reference: collect from prompts that \
                       have one, or set it to teacher";
        return Err(Error::usage(message));
    }
    let num_read = examples.len();
    examples.retain(|example: &Example| example.num_clean_tokens() <= config.max_positions);
    let num_excluded = num_read - examples.len();
    let max_positions = config.max_positions;
    if examples.is_empty() {
        let reason = match num_read {
            0 => String::new(),
            _ => {
                format!(
                    ": all {num_read} are longer than the model's context of {max_positions} tokens, prompts included"
                )
            }
        };
        return Err(Error::usage(format!("datasets: no examples to learn from in {:?}{reason}", settings.datasets)));
    }
    if num_excluded > 0 {
        progress::log(format!(
            "excluded {}: longer than the model's context of {max_positions} tokens, prompt included",
            count(num_excluded, "example")
        ));
    }
    Ok(examples)
}

fn read_references(path: &Path, tokenizer: &Tokenizer, turns: Turns, max_tokens: usize) -> Result<Vec<Example>> {
    let mut examples = Vec::new();
    let samples = prompt_set::read(path)?;
    let num_samples = samples.len();
    let mut num_excluded = 0;
    for sample in samples {
        interrupt::check()?;
        let of_sample =
            turns::examples(&sample, turns, tokenizer, max_tokens).map_err(|error| error.in_row(path, &sample.id))?;
        num_excluded += usize::from(of_sample.is_empty());
        examples.extend(of_sample);
    }
    if num_excluded > 0 {
        progress::log(format!(
            "{}: excluded {num_excluded} of {} for lack of a reference",
            path.display(),
            count(num_samples, "prompt")
        ));
    }
    Ok(examples)
}

/// Reads the first rows of a trajectory data set, at most `max_rows`. If the labels are the data
/// set's own answers, each of those is an example of its own next to its trajectory, which then has
/// no labels; rows without one are counted on stderr.
///
/// # Errors
/// As [`read`], except that a data set may be empty.
pub fn read_trajectories(
    path: &Path,
    tokenizer: &Tokenizer,
    config: &ModelConfig,
    labels: LabelSource,
    max_rows: usize,
) -> Result<Vec<Example>> {
    let reader = Reader::open(path)?;
    reader.check_tokenizer(tokenizer.fingerprint())?;
    check_rendering(path, &reader.provenance().rendering, &tokenizer.rendering_record())?;
    // The teacher's vocabulary may be larger than this model's.
    let mut provenance = reader.provenance().clone();
    provenance.vocab_size = provenance.vocab_size.min(config.vocab_size as usize);
    let mut examples = Vec::new();
    let (mut num_rows, mut num_unlabelled) = (0, 0);
    for row in reader.unchecked_rows().take(max_rows) {
        interrupt::check()?;
        let mut row = row?;
        row.check(&provenance).map_err(|message| Error::file(path, format!("row `{}`: {message}", row.sample_id)))?;
        num_rows += 1;
        if labels == LabelSource::Dataset {
            match reference_ids(&mut row, tokenizer)? {
                Some(ids) => examples.push(Example::labelled(row.sample_id.clone(), row.prompt_ids.clone(), ids)),
                None => num_unlabelled += 1,
            }
        }
        examples.push(Example::from_trajectory(row, labels == LabelSource::Teacher));
    }
    if num_unlabelled > 0 {
        progress::log(format!(
            "{}: {num_unlabelled} of {} have no reference that continues the prompt and are not in the autoregressive \
             loss",
            path.display(),
            count(num_rows, "row")
        ));
    }
    Ok(examples)
}

/// Refuses data that another chat template rendered: the student would be saved without the one that
/// it learned. Other variables of the template are told, for they change only what validation
/// decodes. A date in the prompts may be another than today's.
fn check_rendering(path: &Path, of_data: &RenderingRecord, of_run: &RenderingRecord) -> Result<()> {
    if of_data.chat_template.is_none() {
        return Ok(());
    }
    if of_data.chat_template != of_run.chat_template {
        let message = "was rendered with another chat template than the model of this run has: set chat_template as \
                       collect had it, so that the student is saved with the template that it learns";
        return Err(Error::file(path, message));
    }
    let (theirs, ours) = (&of_data.chat_template_kwargs, &of_run.chat_template_kwargs);
    if theirs != ours {
        progress::log(format!(
            "{}: was rendered with chat_template_kwargs={}, and prompts of this run are rendered with {}: set \
             chat_template_kwargs as collect had it",
            path.display(),
            json!(theirs),
            json!(ours)
        ));
    }
    Ok(())
}

/// The tokens of a row's reference. Data sets of older versions hold its text alone.
fn reference_ids(row: &mut Trajectory, tokenizer: &Tokenizer) -> Result<Option<Vec<i32>>> {
    match (row.reference_ids.take(), &row.reference) {
        (Some(ids), _) => Ok(Some(ids).filter(|ids| !ids.is_empty())),
        (None, Some(reference)) => tokenizer.encode_target(reference).map(Some),
        (None, None) => Ok(None),
    }
}
