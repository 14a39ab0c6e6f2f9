//! The prompts to answer: reads and checks them, divides them among processes, and renders them.

use std::path::Path;

use cllm_core::decode::Request;
use cllm_core::distributed::ProcessEnv;
use cllm_core::progress::{self, count};
use cllm_core::prompt_set::{self, PromptSet, ReadOptions, Sample};
use cllm_core::task::{ScoreContext, Task};
use cllm_core::{Error, Result};

use super::settings::Settings;
use super::teacher::Teacher;

/// A prompt as the teacher reads it.
pub(super) struct RenderedPrompt {
    pub(super) sample: Sample,
    /// The prompt after the chat template.
    pub(super) text: String,
    pub(super) ids: Vec<i32>,
    /// The reference as the chat template renders it; empty if it does not continue the prompt.
    pub(super) reference_ids: Option<Vec<i32>>,
}

impl RenderedPrompt {
    pub(super) fn request(&self) -> Request {
        Request { sample_id: self.sample.id.clone(), prompt_ids: self.ids.clone() }
    }
}

/// Reads the prompt set, and checks before the long work that the answers can be scored.
pub(super) fn read(settings: &Settings) -> Result<PromptSet> {
    let mut set = prompt_set::read_with(&settings.prompts, &ReadOptions::default())?;
    prompt_set::apply_limit(&mut set.samples, settings.limit, "limit");
    let context = ScoreContext { data: settings.data.as_deref(), ..ScoreContext::default() };
    for sample in &set.samples {
        Task::from_source(&sample.source).check_scorable(context, sample)?;
    }
    Ok(set)
}

/// The samples that this process answers, all of them or every `world_size`-th one, and those that
/// the others answer.
pub(super) fn divide(samples: Vec<Sample>, process: Option<&ProcessEnv>) -> (Vec<Sample>, Vec<Sample>) {
    let (rank, world_size) = process.map_or((0, 1), |process| (process.rank, process.world_size));
    let (own, others): (Vec<_>, Vec<_>) =
        samples.into_iter().enumerate().partition(|(index, _)| index % world_size == rank);
    let samples = |numbered: Vec<(usize, Sample)>| numbered.into_iter().map(|(_, sample)| sample).collect();
    (samples(own), samples(others))
}

/// Renders and tokenizes the prompts. Returns those that are empty or too long for the context
/// separately.
pub(super) fn render(
    samples: Vec<Sample>,
    teacher: &Teacher,
    settings: &Settings,
) -> Result<(Vec<RenderedPrompt>, Vec<Sample>)> {
    let (mut prompts, mut skipped) = (Vec::new(), Vec::new());
    let (mut num_unlearnable, mut first_problem) = (0, None);
    for sample in samples {
        let encoded = teacher.tokenizer.encode_prompt(&sample.prompt);
        let (text, ids) = encoded.map_err(|error| error.in_row(&settings.prompts, &sample.id))?;
        if !teacher.can_answer(&ids, settings.max_new_tokens) {
            skipped.push(sample);
        } else {
            let encode =
                |reference: &String| teacher.tokenizer.encode_reference_after(&sample.prompt, &text, &ids, reference);
            let reference_ids = sample.reference.as_ref().map(encode).map(|encoded| match encoded {
                Ok(reference_ids) => reference_ids,
                Err(error) => {
                    num_unlearnable += 1;
                    first_problem.get_or_insert_with(|| format!("`{}`: {error}", sample.id));
                    Vec::new()
                }
            });
            prompts.push(RenderedPrompt { sample, text, ids, reference_ids });
        }
    }
    if let Some(problem) = first_problem {
        let references = count(num_unlearnable, "reference");
        progress::log(format!(
            "{references} cannot be learned with consistency.labels=dataset; the first is {problem}"
        ));
    }
    Ok((prompts, skipped))
}

/// Saves the skipped prompts as `skipped.jsonl` beside the shards.
pub(super) fn save_skipped(skipped: &[Sample], output: &Path) -> Result<()> {
    if skipped.is_empty() {
        return Ok(());
    }
    let prompts = count(skipped.len(), "prompt");
    progress::log(format!("skipping {prompts}, empty or too long for the context: see skipped.jsonl"));
    prompt_set::write(&output.join("skipped.jsonl"), skipped)
}

/// Refuses a prompt set in which no prompt can be answered, when this process has none that can: the
/// prompts of `others` may. Then this process has nothing to do.
///
/// # Errors
/// [`Error::Usage`] that says what prompts can be answered.
pub(super) fn expect_answerable(others: &[Sample], teacher: &Teacher, settings: &Settings) -> Result<()> {
    for sample in others {
        let encoded = teacher.tokenizer.encode_prompt(&sample.prompt);
        let (_, ids) = encoded.map_err(|error| error.in_row(&settings.prompts, &sample.id))?;
        if teacher.can_answer(&ids, settings.max_new_tokens) {
            return Ok(());
        }
    }
    Err(Error::usage(format!(
        "no prompt of {} fits the context of {} tokens: with max_new_tokens={} a prompt may have at most {}; lower \
         max_new_tokens",
        settings.prompts.display(),
        teacher.config.max_positions,
        settings.max_new_tokens,
        teacher.max_prompt_tokens(settings.max_new_tokens)
    )))
}
