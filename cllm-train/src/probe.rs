//! Tokens per forward on held-out prompts, during training.

use cllm_core::decode::{DecodeOptions, Limits, Request, Strategy, check_length, decode};
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::FinishReason;
use cllm_core::{Error, Result, prompt_set};
use serde::{Deserialize, Serialize};

use crate::settings::Settings;

/// Prompts to decode, and how.
pub struct Probe {
    requests: Vec<Request>,
    limits: Limits,
    options: DecodeOptions,
}

/// What a probe found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Found {
    /// Of all answers.
    pub tokens_per_forward: f64,
    /// Of the answers that ended with EOS, if any did: what loops until the length limit decodes fast, and flatters the whole.
    pub tokens_per_forward_finished: Option<f64>,
    /// Answers that hit the length limit.
    pub unfinished: usize,
}

impl Probe {
    /// The probe of a run, if it has one. Its prompts are read and measured before the first step: one that does not fit ends
    /// no run midway.
    pub fn of(settings: &Settings, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<Option<Self>> {
        let probe = &settings.probe;
        if probe.prompts.as_os_str().is_empty() {
            return Ok(None);
        }
        let limits = Limits { max_new_tokens: probe.max_new_tokens, eos_ids: tokenizer.eos_ids().to_vec() };
        let samples = prompt_set::read(&probe.prompts)?.into_iter().take(probe.count);
        let requests: Vec<Request> = samples
            .map(|sample| {
                let request = Request { prompt_ids: tokenizer.prompt(&sample.prompt)?.1, sample_id: sample.id };
                check_length(&request, &limits, config.max_positions)?;
                Ok(request)
            })
            .collect::<Result<_>>()?;
        if requests.is_empty() {
            let message = "holds no prompts to probe with: leave probe.prompts out, or fill it";
            return Err(Error::file(&probe.prompts, message));
        }
        let options = DecodeOptions::greedy(Strategy::Jacobi { n: probe.n }, settings.seed);
        Ok(Some(Probe { requests, limits, options }))
    }

    /// Decodes the prompts, with adapters merged.
    pub fn run(&self, model: &Transformer) -> Result<Found> {
        let merged = model.merged()?;
        let model = merged.as_ref().unwrap_or(model);
        let (answers, _) = decode(model, &self.requests, &self.limits, self.options, None)?;
        let figures = answers.iter().map(|answer| (answer.response_ids.len(), answer.forwards, answer.finish_reason));
        Ok(Found::of(&figures.collect::<Vec<_>>()))
    }
}

impl Found {
    /// Of tokens, forwards and end of each answer.
    fn of(answers: &[(usize, usize, FinishReason)]) -> Self {
        let rate = |finished_only: bool| {
            let counted = answers.iter().filter(|(.., reason)| !finished_only || *reason == FinishReason::Eos);
            let (tokens, forwards) = counted.fold((0, 0), |sum, answer| (sum.0 + answer.0, sum.1 + answer.1));
            (forwards > 0).then(|| tokens as f64 / forwards as f64)
        };
        Found {
            tokens_per_forward: rate(false).unwrap_or(0.0),
            tokens_per_forward_finished: rate(true),
            unfinished: answers.iter().filter(|(.., reason)| *reason == FinishReason::Length).count(),
        }
    }

    /// The figure by which it is the best so far, if it is: that of the finished answers.
    pub fn beats(&self, best: Option<f64>) -> Option<f64> {
        self.tokens_per_forward_finished.filter(|&rate| best.is_none_or(|best| rate > best))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_never_end_do_not_make_a_probe_the_best() {
        let (eos, length) = (FinishReason::Eos, FinishReason::Length);
        let sound = Found::of(&[(10, 5, eos), (20, 10, eos)]);
        assert_eq!(
            (sound.tokens_per_forward, sound.tokens_per_forward_finished, sound.unfinished),
            (2.0, Some(2.0), 0)
        );
        let looping = Found::of(&[(10, 5, eos), (90, 10, length)]);
        assert!(looping.tokens_per_forward > 6.0 && looping.unfinished == 1);
        assert_eq!(
            (sound.beats(None), looping.beats(Some(2.0)), looping.beats(Some(1.9))),
            (Some(2.0), None, Some(2.0))
        );
        assert_eq!(Found::of(&[(90, 10, length)]).beats(None), None);
    }
}
