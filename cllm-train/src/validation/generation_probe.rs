//! Speed, accuracy and losses on held-out data, during training.

use std::path::PathBuf;

use cllm_core::decode::{Answer, DecodeOptions, Request, StopConditions, Strategy, check_fits_context, decode};
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::prompt_set::{self, Sample};
use cllm_core::task::{ScoreContext, Task, Verdict};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::FinishReason;
use cllm_core::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::settings::Settings;
use crate::step::Models;
use crate::validation::losses::HeldOut;

/// What a run probes with.
pub struct Probe<'t> {
    prompts: Option<Prompts<'t>>,
    trajectories: Option<HeldOut>,
}

/// Prompts to answer, and how.
struct Prompts<'t> {
    tokenizer: &'t Tokenizer,
    samples: Vec<Sample>,
    requests: Vec<Request>,
    stop: StopConditions,
    options: DecodeOptions,
    /// Folder of the benchmark's files.
    data: Option<PathBuf>,
}

/// What the answers of a probe amount to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// Of all answers.
    pub tokens_per_forward: f64,
    /// Of the answers that ended with EOS, if any did: what loops until the length limit decodes fast, and flatters the whole.
    pub tokens_per_forward_finished: Option<f64>,
    /// Answers that hit the length limit.
    pub unfinished: usize,
    /// Share of right answers among those that have a score, if any have; an answer that hit the length limit is never right.
    pub accuracy: Option<f64>,
}

impl<'t> Probe<'t> {
    /// The probe of a run, if it has one. What it takes is read and measured before the first step: a prompt that does not
    /// fit ends no run midway.
    pub fn of(settings: &Settings, tokenizer: &'t Tokenizer, config: &ModelConfig) -> Result<Option<Self>> {
        let prompts = Prompts::of(settings, tokenizer, config)?;
        let trajectories = HeldOut::of(settings, tokenizer, config)?;
        Ok((prompts.is_some() || trajectories.is_some()).then_some(Probe { prompts, trajectories }))
    }

    /// Answers the prompts, takes the losses of the trajectories. Gives what the answers amount to, and all of it as
    /// metrics name it.
    pub fn run(&self, models: &Models, settings: &Settings) -> Result<(Option<Found>, Map<String, Value>)> {
        let found = self.prompts.as_ref().map(|prompts| prompts.run(&models.student)).transpose()?;
        let answers = found.as_ref().map(Found::line).unwrap_or_default();
        let losses = self.trajectories.as_ref().map(|held_out| held_out.losses(models, settings)).transpose()?;
        let lines = [answers, losses.unwrap_or_default()].into_iter();
        let fields = lines.filter_map(|line| if let Value::Object(fields) = line { Some(fields) } else { None });
        Ok((found, fields.flatten().collect()))
    }
}

impl<'t> Prompts<'t> {
    fn of(settings: &Settings, tokenizer: &'t Tokenizer, config: &ModelConfig) -> Result<Option<Self>> {
        let probe = &settings.validation;
        let Some(prompts) = &probe.prompts else { return Ok(None) };
        let stop = StopConditions { max_new_tokens: probe.max_new_tokens, eos_ids: tokenizer.eos_ids().to_vec() };
        let mut samples = prompt_set::read(prompts)?;
        samples.truncate(probe.num_examples);
        let request = |sample: &Sample| {
            let (_, prompt_ids) = tokenizer.encode_prompt(&sample.prompt)?;
            let request = Request { prompt_ids, sample_id: sample.id.clone() };
            check_fits_context(&request, &stop, config.max_positions)?;
            let judge = ScoreContext { data: probe.data.as_deref(), sandbox: None };
            Task::from_source(&sample.source).check_scorable(judge, sample)?;
            Ok(request)
        };
        let requests: Vec<Request> = samples.iter().map(request).collect::<Result<_>>()?;
        if requests.is_empty() {
            let message = "holds no prompts to probe with: leave probe.prompts out, or fill it";
            return Err(Error::file(prompts, message));
        }
        let options = DecodeOptions::greedy(Strategy::Jacobi { n: probe.n }, settings.seed);
        Ok(Some(Prompts { tokenizer, samples, requests, stop, options, data: probe.data.clone() }))
    }

    /// Decodes the prompts, with adapters merged.
    fn run(&self, model: &Transformer) -> Result<Found> {
        let merged = model.to_merged()?;
        let model = merged.as_ref().unwrap_or(model);
        let (answers, _) = decode(model, &self.requests, &self.stop, self.options)?;
        let judged =
            self.samples.iter().zip(&answers).map(|(sample, answer)| Ok((answer, self.judge(sample, answer)?)));
        Ok(Found::of(&judged.collect::<Result<Vec<_>>>()?))
    }

    fn judge(&self, sample: &Sample, answer: &Answer) -> Result<Verdict> {
        let text = self.tokenizer.decode(&answer.response_ids)?;
        let judge = ScoreContext { data: self.data.as_deref(), sandbox: None };
        Task::from_source(&sample.source).score(judge, sample, &text, answer.finish_reason)
    }
}

impl Found {
    fn of(answers: &[(&Answer, Verdict)]) -> Self {
        let rate = |finished_only: bool| {
            let counted = answers.iter().map(|(answer, _)| answer);
            let counted = counted.filter(|answer| !finished_only || answer.finish_reason == FinishReason::Eos);
            let sum = |sum: (usize, usize), answer: &&Answer| {
                (sum.0 + answer.response_ids.len(), sum.1 + answer.num_forwards)
            };
            let (tokens, forwards) = counted.fold((0, 0), sum);
            (forwards > 0).then(|| tokens as f64 / forwards as f64)
        };
        let count = |verdict: Verdict| answers.iter().filter(|(_, found)| *found == verdict).count();
        let (right, scored) = (count(Verdict::Correct), answers.len() - count(Verdict::Unscored));
        Found {
            tokens_per_forward: rate(false).unwrap_or(0.0),
            tokens_per_forward_finished: rate(true),
            unfinished: answers.iter().filter(|(answer, _)| answer.finish_reason == FinishReason::Length).count(),
            accuracy: (scored > 0).then(|| right as f64 / scored as f64),
        }
    }

    fn line(&self) -> Value {
        json!({
            "probe_tokens_per_forward": self.tokens_per_forward,
            "probe_tokens_per_forward_finished": self.tokens_per_forward_finished,
            "probe_unfinished": self.unfinished, "probe_accuracy": self.accuracy,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_never_end_and_those_without_a_score_are_told_apart() {
        let answer = |tokens: usize, forwards: usize, finish_reason| Answer {
            response_ids: vec![1; tokens],
            num_forwards: forwards,
            finish_reason,
            num_new_tokens: Vec::new(),
            blocks: Vec::new(),
        };
        let (short, long) = (answer(10, 5, FinishReason::Eos), answer(20, 10, FinishReason::Eos));
        let looping = answer(90, 10, FinishReason::Length);
        let sound = Found::of(&[(&short, Verdict::Correct), (&long, Verdict::Unscored)]);
        let expected = Found {
            tokens_per_forward: 2.0,
            tokens_per_forward_finished: Some(2.0),
            unfinished: 0,
            accuracy: Some(1.0),
        };
        assert_eq!(sound, expected);
        let found = Found::of(&[(&short, Verdict::Correct), (&looping, Verdict::Incorrect)]);
        assert_eq!((found.tokens_per_forward_finished, found.unfinished, found.accuracy), (Some(2.0), 1, Some(0.5)));
        assert!(found.tokens_per_forward > 6.0);
        let none = Found::of(&[(&looping, Verdict::Unscored)]);
        assert_eq!((none.tokens_per_forward_finished, none.accuracy), (None, None));
    }
}
