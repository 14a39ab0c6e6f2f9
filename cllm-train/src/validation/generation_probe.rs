//! Answers the validation prompts with the model in training, and scores the answers.

use std::path::PathBuf;

use cllm_core::Result;
use cllm_core::decode::{Answer, DecodeOptions, Request, StopConditions, check_fits_context, decode, required_slots};
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::prompt_set::{self, Sample};
use cllm_core::task::{ScoreContext, Task, Verdict};
use cllm_core::thought::ThoughtTokens;
use cllm_core::tokenizer::Tokenizer;

use crate::settings::Settings;
use crate::validation::metrics::GenerationMetrics;

/// The prompts, and how to answer them.
pub struct GenerationProbe<'t> {
    tokenizer: &'t Tokenizer,
    /// The tokens around thoughts, if the model thinks.
    thought_tokens: Option<ThoughtTokens>,
    samples: Vec<Sample>,
    /// One for each of `samples`.
    requests: Vec<Request>,
    stop: StopConditions,
    options: DecodeOptions,
    /// Folder of the benchmark's files.
    data: Option<PathBuf>,
}

/// The sizes of a probe that determine its memory.
#[derive(Debug, Clone, Copy)]
pub struct ProbeSize {
    pub num_prompts: usize,
    /// Tokens of all prompts.
    pub num_prompt_tokens: usize,
    /// Tokens of the longest.
    pub max_prompt_tokens: usize,
    /// Slots of the KV cache for each prompt with its answer.
    pub slots: usize,
}

impl ProbeSize {
    /// That of at most so many of the prompts, of the same mean length.
    pub fn of_at_most(self, num_prompts: usize) -> Self {
        let num_prompts = num_prompts.min(self.num_prompts);
        let num_prompt_tokens = self.num_prompt_tokens * num_prompts / self.num_prompts.max(1);
        ProbeSize { num_prompts, num_prompt_tokens, ..self }
    }
}

impl<'t> GenerationProbe<'t> {
    /// Reads the prompts of a run, if it has any, and checks that each fits into the context and
    /// can be scored.
    ///
    /// # Errors
    /// Bad prompt sets; prompts that are too long or whose score needs files that are missing.
    pub fn load(settings: &Settings, tokenizer: &'t Tokenizer, config: &ModelConfig) -> Result<Option<Self>> {
        let validation = &settings.validation;
        let Some(path) = &validation.prompts else { return Ok(None) };
        let stop = StopConditions::new(validation.max_new_tokens, tokenizer.eos_ids().to_vec());
        let mut samples = prompt_set::read(path)?;
        samples.truncate(validation.num_examples);
        let mut requests = Vec::new();
        for sample in &samples {
            let encoded = tokenizer.encode_prompt(&sample.prompt);
            let (_, prompt_ids) = encoded.map_err(|error| error.in_row(path, &sample.id))?;
            let request = Request { prompt_ids, sample_id: sample.id.clone() };
            let context = ScoreContext { data: validation.data.as_deref(), ..ScoreContext::default() };
            check_fits_context(&request, &stop, config.max_positions)
                .and_then(|()| Task::from_source(&sample.source).check_scorable(context, sample))
                .map_err(|error| error.in_file(path))?;
            requests.push(request);
        }
        let options = DecodeOptions::greedy(settings.probe_strategy(), settings.seed);
        let thought_tokens = ThoughtTokens::find(tokenizer)?;
        let data = validation.data.clone();
        Ok(Some(GenerationProbe { tokenizer, thought_tokens, samples, requests, stop, options, data }))
    }

    /// Answers the prompts by Jacobi decoding with adapters merged, or by gated decoding with adapters
    /// that act on draft tokens alone.
    ///
    /// # Errors
    /// [`Error::Interrupted`]; [`Error::Torch`], for example when memory runs out.
    pub fn run(&self, model: &Transformer) -> Result<GenerationMetrics> {
        let merged = model.to_merged()?;
        let model = merged.as_ref().unwrap_or(model);
        let (answers, _) = decode(model, &self.requests, &self.stop, self.options)?;
        let scored = answers.iter().enumerate().map(|(index, answer)| Ok((answer, self.score(index, answer)?)));
        Ok(GenerationMetrics::from_answers(&scored.collect::<Result<Vec<_>>>()?))
    }

    pub fn size(&self) -> ProbeSize {
        let lengths = self.requests.iter().map(|request| request.prompt_ids.len());
        let max_prompt_tokens = lengths.clone().max().unwrap_or(0);
        ProbeSize {
            num_prompts: self.requests.len(),
            num_prompt_tokens: lengths.sum(),
            max_prompt_tokens,
            slots: required_slots(max_prompt_tokens, &self.stop, self.options.strategy),
        }
    }

    fn score(&self, index: usize, answer: &Answer) -> Result<Verdict> {
        let (sample, request) = (&self.samples[index], &self.requests[index]);
        let text = self.tokenizer.decode_answer(&request.prompt_ids, &answer.response_ids)?;
        let context = ScoreContext { data: self.data.as_deref(), ..ScoreContext::default() };
        let is_open = |tokens: &ThoughtTokens| tokens.is_open(&request.prompt_ids, &answer.response_ids);
        let is_open = self.thought_tokens.as_ref().is_some_and(is_open);
        let task = Task::from_source(&sample.source);
        Ok(task.score(context, sample, &text, answer.finish_reason, is_open)?.verdict)
    }
}
