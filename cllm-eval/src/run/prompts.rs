//! The examples as a model reads them: rendered with its chat template, and tokenized.

use std::path::Path;

use cllm_core::chat_template::Rendering;
use cllm_core::decode::{Request, StopConditions, check_fits_context};
use cllm_core::prompt_set::Sample;
use cllm_core::thought::{ThoughtLimit, ThoughtTokens};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Result, checkpoint};

use crate::config::RunSettings;
use crate::mt_bench_turns;
use crate::records::AnswerRecord;

pub(super) struct Prompts {
    pub(super) tokenizer: Tokenizer,
    /// The tokens around thoughts, if the model thinks.
    pub(super) thought_tokens: Option<ThoughtTokens>,
    pub(super) stop: StopConditions,
    /// One for each example.
    rendered: Vec<RenderedPrompt>,
}

pub(super) struct RenderedPrompt {
    pub(super) text: String,
    pub(super) request: Request,
}

impl RenderedPrompt {
    fn new(tokenizer: &Tokenizer, sample: &Sample) -> Result<Self> {
        let (text, prompt_ids) = tokenizer.encode_prompt(&sample.prompt)?;
        Ok(RenderedPrompt { text, request: Request { sample_id: sample.id.clone(), prompt_ids } })
    }

    pub(super) fn num_tokens(&self) -> usize {
        self.request.prompt_ids.len()
    }
}

impl Prompts {
    /// Whether the prompts have the same tokens as those of another model, and their answers end at the
    /// same ones.
    pub(super) fn equal(&self, other: &Prompts) -> bool {
        let mut pairs = self.rendered.iter().zip(&other.rendered);
        self.stop.eos_ids == other.stop.eos_ids
            && pairs.all(|(one, other)| one.request.prompt_ids == other.request.prompt_ids)
    }

    /// Renders the examples before any weights are loaded, so that a prompt that does not fit is
    /// reported before hours of work.
    ///
    /// # Errors
    /// When a file of the tokenizer is missing or broken, its template refuses a prompt, or a
    /// prompt does not fit the context.
    pub(super) fn render(
        folder: &Path,
        samples: &[Sample],
        settings: &RunSettings,
        rendering: &Rendering,
    ) -> Result<Self> {
        let config = checkpoint::load_config(folder)?;
        let tokenizer = Tokenizer::load_for(folder, rendering)?;
        let tokenizer = tokenizer.with_eos_ids(settings.eos_ids.as_deref(), folder, config.vocab_size)?;
        let new_limit = |max| ThoughtLimit::new(&tokenizer, max, settings.max_new_tokens);
        let thought_limit = settings.max_thinking_tokens.map(new_limit).transpose()?;
        let stop = StopConditions {
            thought_limit,
            ..StopConditions::new(settings.max_new_tokens, tokenizer.eos_ids().to_vec())
        };
        let render = |sample: &Sample| {
            let prompt = RenderedPrompt::new(&tokenizer, sample);
            let prompt = prompt.map_err(|error| match settings.prompts.as_ref().or(settings.data.as_ref()) {
                Some(path) => error.in_row(path, &sample.id),
                None => error,
            })?;
            // The prompt of a second turn will contain the answer to the first.
            let num_answers = if mt_bench_turns::is_second(sample) { 2 } else { 1 };
            let max_new_tokens = stop.max_new_tokens.saturating_mul(num_answers);
            let room = StopConditions { max_new_tokens, ..stop.clone() };
            let fits = check_fits_context(&prompt.request, &room, config.max_positions);
            fits.map_err(|error| settings.in_prompts(error))?;
            Ok(prompt)
        };
        let rendered = samples.iter().map(render).collect::<Result<_>>()?;
        Ok(Prompts { thought_tokens: ThoughtTokens::find(&tokenizer)?, tokenizer, stop, rendered })
    }

    pub(super) fn get(&self, index: usize) -> &RenderedPrompt {
        &self.rendered[index]
    }

    pub(super) fn max_prompt_tokens(&self) -> usize {
        self.rendered.iter().map(RenderedPrompt::num_tokens).max().unwrap_or(0)
    }

    /// Puts answers to first turns of MT-bench into the prompts of their second turns.
    ///
    /// # Errors
    /// When the template refuses a prompt.
    pub(super) fn fill_second_turns<'r>(
        &mut self,
        samples: &[Sample],
        answers: impl Iterator<Item = &'r AnswerRecord>,
    ) -> Result<()> {
        for first in answers {
            let index = first.index + 1;
            if let Some(second) = samples.get(index).filter(|sample| mt_bench_turns::is_second(sample)) {
                let prompt = mt_bench_turns::conversation(second, &first.text)?;
                self.rendered[index] = RenderedPrompt::new(&self.tokenizer, &Sample { prompt, ..second.clone() })?;
            }
        }
        Ok(())
    }
}
