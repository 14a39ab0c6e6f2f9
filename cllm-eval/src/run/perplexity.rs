//! Perplexity: how well a model predicts each token of a text from those before it. Nothing is generated.
//!
//! Windows overlap by half, as in Hugging Face's guide "Perplexity of fixed-length models": every token of a text but its first is
//! scored once, with at least half a window before it, except in the text's first window.

use std::collections::HashSet;
use std::path::Path;

use cllm_core::checkpoint;
use cllm_core::model::Transformer;
use cllm_core::progress::Progress;
use cllm_core::prompt_set::Sample;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device, interrupt};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::records::{Journal, Line, Records, WindowRecord};
use crate::role::Role;
use crate::statistics::bootstrap;

/// Most tokens of a window; a model of a shorter context has windows of that.
const WINDOW: usize = 1024;
/// Places whose logits are held at once: of a whole window and a large vocabulary they would take more memory than the model.
const PLACES: usize = 256;

/// The perplexity of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// e to the power of `nll`.
    pub value: f64,
    /// Its 95 % interval, by a bootstrap over the windows; none for a single window.
    pub ci95: Option<[f64; 2]>,
    /// Mean negative log-likelihood of a token, in nats.
    pub nll: f64,
    /// Tokens that were scored.
    pub tokens: usize,
    /// Windows that they stand in.
    pub windows: usize,
}

impl Perplexity {
    /// Of a model's windows; none without any.
    pub fn of(windows: &[&WindowRecord]) -> Option<Self> {
        let mean = |chosen: &mut dyn Iterator<Item = usize>| {
            let (mut nll, mut tokens) = (0.0, 0);
            for index in chosen {
                nll += windows[index].nll;
                tokens += windows[index].tokens;
            }
            (nll / tokens as f64, tokens)
        };
        if windows.is_empty() {
            return None;
        }
        let (nll, tokens) = mean(&mut (0..windows.len()));
        let resampled = || bootstrap(windows.len(), |drawn| Some(mean(&mut drawn.iter().copied()).0.exp()));
        let ci95 = if windows.len() > 1 { resampled() } else { None };
        Some(Perplexity { value: nll.exp(), ci95, nll, tokens, windows: windows.len() })
    }
}

/// A stretch of a text that a model reads at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    start: usize,
    end: usize,
    /// So many of its last tokens are scored.
    scored: usize,
}

/// The windows of a text of so many tokens; a first token, which nothing precedes, is not scored.
fn windows(tokens: usize, size: usize) -> Vec<Window> {
    let (mut found, mut start, mut done) = (Vec::new(), 0, 1);
    while done < tokens {
        let end = (start + size).min(tokens);
        found.push(Window { start, end, scored: end - done });
        (start, done) = (start + size / 2, end);
    }
    found
}

/// Texts as a model reads them.
pub struct Texts {
    each: Vec<Vec<i32>>,
    window: usize,
}

impl Texts {
    /// Tokenizes the texts for a model, before its weights are loaded.
    ///
    /// # Errors
    /// When a file of the tokenizer is missing or broken, or no text has two tokens.
    pub fn tokenize(folder: &Path, samples: &[Sample]) -> Result<Self> {
        let tokenizer = Tokenizer::load(folder)?;
        let window = WINDOW.min(checkpoint::load_config(folder)?.max_positions);
        let each: Vec<Vec<i32>> =
            samples.iter().map(|sample| Ok(tokenizer.encode_prompt(&sample.prompt)?.1)).collect::<Result<_>>()?;
        if window < 2 || each.iter().all(|ids| ids.len() < 2) {
            let folder = folder.display();
            return Err(Error::usage(format!(
                "perplexity needs a text of 2 tokens and a model that reads as many: {folder} makes fewer of each text here, or reads \
                 no more than {window}"
            )));
        }
        Ok(Texts { each, window })
    }

    fn windows(&self) -> Vec<(usize, Window)> {
        let of = |(index, ids): (usize, &Vec<i32>)| {
            windows(ids.len(), self.window).into_iter().map(move |window| (index, window))
        };
        self.each.iter().enumerate().flat_map(of).collect()
    }
}

/// Measures a model on every window; those that `records` has already are left.
///
/// # Errors
/// When the model cannot be loaded, its likelihoods are no numbers, or writing fails; what was finished is kept.
pub fn measure(
    role: Role,
    folder: &Path,
    texts: &Texts,
    samples: &[Sample],
    device: Device,
    records: &mut Records,
    journal: &mut Journal,
) -> Result<()> {
    let mine = |record: &&WindowRecord| record.role == role;
    let done: HashSet<(usize, usize)> =
        records.windows.iter().filter(mine).map(|record| (record.index, record.start)).collect();
    let all = texts.windows();
    if done.len() == all.len() {
        return Ok(());
    }
    let model = checkpoint::load(folder, device, device::default_kind(device))?;
    let title = format!("{} perplexity", role.name());
    let mut progress = Progress::new(&title, done.len() as u64, all.len() as u64);
    for (index, window) in all.into_iter().filter(|(index, window)| !done.contains(&(*index, window.start))) {
        interrupt::check()?;
        let nll = negative_log_likelihood(&model, &texts.each[index][window.start..window.end], window.scored)?;
        let id = samples[index].id.clone();
        if !nll.is_finite() {
            let (start, folder) = (window.start, folder.display());
            return Err(Error::usage(format!(
                "{folder}: in the window at token {start} of `{id}` its logits are not finite: the weights are broken"
            )));
        }
        let record = WindowRecord { role, index, id, start: window.start, tokens: window.scored, nll };
        journal.append(&[Line::Window(record.clone())])?;
        records.windows.push(record);
        progress.advance(1);
    }
    progress.finish();
    Ok(())
}

/// Of the last `scored` of some tokens, summed, in nats; softmax in float32.
fn negative_log_likelihood(model: &Transformer, ids: &[i32], scored: usize) -> Result<f64> {
    let _no_grad = tch::no_grad_guard();
    let tokens = Tensor::from_slice(ids).to_kind(Kind::Int64).to_device(model.device());
    let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, model.device()));
    let hidden = model.forward(&tokens.unsqueeze(0), &positions.unsqueeze(0)).squeeze_dim(0);
    let mut sum = 0.0;
    for start in (ids.len() - scored..ids.len()).step_by(PLACES) {
        let (start, places) = (start as i64, PLACES.min(ids.len() - start) as i64);
        // A place's logits are about the token after it.
        let logits = model.compute_logits(&hidden.narrow(0, start - 1, places))?;
        let targets = tokens.narrow(0, start, places).unsqueeze(1);
        let likelihoods = logits.log_softmax(-1, Kind::Float).gather(1, &targets, false);
        sum -= likelihoods.sum(Kind::Double).double_value(&[]);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use cllm_core::model::ModelConfig;

    use super::*;

    fn model(seed: u64) -> Transformer {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "tie_word_embeddings": false,
        });
        Transformer::random(ModelConfig::from_json(&config).unwrap(), seed, Device::Cpu, Kind::Float)
    }

    #[test]
    fn every_token_but_the_first_is_scored_once_with_half_a_window_before_it() {
        let window = |start, end, scored| Window { start, end, scored };
        assert_eq!(windows(0, 8), []);
        assert_eq!(windows(1, 8), []);
        assert_eq!(windows(2, 8), [window(0, 2, 1)]);
        assert_eq!(windows(8, 8), [window(0, 8, 7)]);
        assert_eq!(windows(9, 8), [window(0, 8, 7), window(4, 9, 1)]);
        assert_eq!(windows(14, 8), [window(0, 8, 7), window(4, 12, 4), window(8, 14, 2)]);
        for (tokens, size) in [(100, 2), (100, 3), (101, 8), (1000, 17)] {
            let found = windows(tokens, size);
            let scored: Vec<usize> = found.iter().flat_map(|one| one.end - one.scored..one.end).collect();
            assert_eq!(scored, (1..tokens).collect::<Vec<_>>());
            assert!(found.iter().skip(1).all(|one| one.end - one.scored - one.start >= size / 2));
        }
    }

    #[test]
    fn the_likelihood_of_a_window_is_that_of_its_tokens_one_by_one() {
        let model = model(3);
        // More places than are held at once.
        let ids: Vec<i32> = (0..600).map(|place| place * place % 47).collect();
        let scored = 550;
        let mut by_hand = 0.0;
        let tokens = Tensor::from_slice(&ids).to_kind(Kind::Int64).unsqueeze(0);
        let positions = Tensor::arange(600, (Kind::Int64, Device::Cpu)).unsqueeze(0);
        let logits = tch::no_grad(|| model.compute_logits(&model.forward(&tokens, &positions))).unwrap().squeeze_dim(0);
        for place in 600 - scored..600 {
            let row: Vec<f64> = Vec::try_from(logits.get(place as i64 - 1).to_kind(Kind::Double)).unwrap();
            let total: f64 = row.iter().map(|logit| logit.exp()).sum();
            by_hand -= (row[ids[place] as usize].exp() / total).ln();
        }
        let found = negative_log_likelihood(&model, &ids, scored).unwrap();
        assert!((found - by_hand).abs() < 1e-3, "{found} {by_hand}");
        // What precedes the scored tokens counts, what follows a token does not.
        let cut = negative_log_likelihood(&model, &ids[..599], scored - 1).unwrap();
        let last = negative_log_likelihood(&model, &ids, 1).unwrap();
        assert!((cut + last - found).abs() < 1e-3, "{cut} {last} {found}");
        assert!((negative_log_likelihood(&model, &ids[300..], 1).unwrap() - last).abs() > 1e-6);
    }

    #[test]
    fn a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() {
        let model = model(3);
        let head = model.named_parameters().into_iter().find(|(name, _)| name == "lm_head.weight").unwrap().1;
        let _ = tch::no_grad(|| head.shallow_clone().zero_());
        let record =
            |start, tokens, nll| WindowRecord { role: Role::Teacher, index: 0, id: "a".into(), start, tokens, nll };
        let ids: Vec<i32> = (0..40).collect();
        let uniform = record(0, 39, negative_log_likelihood(&model, &ids, 39).unwrap());
        let found = Perplexity::of(&[&uniform]).unwrap();
        assert!((found.value - 50.0).abs() < 1e-4, "{found:?}");
        assert_eq!((found.ci95, found.tokens, found.windows), (None, 39, 1));
        assert_eq!(Perplexity::of(&[]), None);
        // Tokens weigh alike, not windows: (3 · 1 + 1 · 3) / 4.
        let (many, few) = (record(0, 3, 3.0), record(2, 1, 3.0));
        let found = Perplexity::of(&[&many, &few]).unwrap();
        assert!((found.nll - 1.5).abs() < 1e-12 && (found.value - 1.5f64.exp()).abs() < 1e-12, "{found:?}");
        let [low, high] = found.ci95.unwrap();
        assert!((low - 1f64.exp()).abs() < 1e-9 && (high - 3f64.exp()).abs() < 1e-9, "{low} {high}");
    }
}
