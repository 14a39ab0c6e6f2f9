//! The benchmark `perplexity`: the models read texts in windows and generate nothing.
//!
//! Windows overlap by half, as in Hugging Face's guide "Perplexity of fixed-length models": every
//! token of a text but its first is scored once, with at least half a window of context before it,
//! except in the text's first window.

use std::collections::HashSet;
use std::path::Path;

use cllm_core::checkpoint;
use cllm_core::model::Transformer;
use cllm_core::progress::Progress;
use cllm_core::prompt_set::Sample;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device, interrupt};
use tch::{Kind, Tensor};

use super::models::IdentifiedModel;
use super::session::Session;
use crate::records::WindowRecord;

/// A model with a shorter context uses windows of the length of its context.
const MAX_WINDOW_TOKENS: usize = 1024;
/// Number of positions whose logits are in memory at once. The logits of a whole window with a
/// large vocabulary would need more memory than the model.
const MAX_LOGIT_POSITIONS: usize = 256;

/// A stretch of a text that a model reads in one forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Window {
    start: usize,
    end: usize,
    /// Number of tokens to score, which are the last ones of the window.
    num_scored: usize,
}

/// The windows of a text. Its first token is not scored, since nothing precedes it.
fn windows(num_tokens: usize, window_tokens: usize) -> Vec<Window> {
    let (mut windows, mut start, mut scored_end) = (Vec::new(), 0, 1);
    while scored_end < num_tokens {
        let end = (start + window_tokens).min(num_tokens);
        windows.push(Window { start, end, num_scored: end - scored_end });
        (start, scored_end) = (start + window_tokens / 2, end);
    }
    windows
}

/// Texts, tokenized for one model.
pub(super) struct Texts {
    /// Tokens of each text.
    ids: Vec<Vec<i32>>,
    window_tokens: usize,
}

impl Texts {
    /// Tokenizes the texts for a model, before its weights are loaded.
    ///
    /// # Errors
    /// When a file of the tokenizer is missing or broken, or no text has two tokens.
    pub(super) fn tokenize(folder: &Path, samples: &[Sample]) -> Result<Self> {
        let tokenizer = Tokenizer::load(folder)?;
        let window_tokens = MAX_WINDOW_TOKENS.min(checkpoint::load_config(folder)?.max_positions);
        let ids: Vec<Vec<i32>> =
            samples.iter().map(|sample| Ok(tokenizer.encode_prompt(&sample.prompt)?.1)).collect::<Result<_>>()?;
        if window_tokens < 2 || ids.iter().all(|ids| ids.len() < 2) {
            let folder = folder.display();
            return Err(Error::usage(format!(
                "perplexity needs a text of at least 2 tokens and a model with a context of at least 2: the longest \
                 text here has fewer tokens for {folder}, or its context of {window_tokens} is too short"
            )));
        }
        Ok(Texts { ids, window_tokens })
    }

    /// All windows, each with the index of its text.
    fn windows(&self) -> Vec<(usize, Window)> {
        let of_text = |(index, ids): (usize, &Vec<i32>)| {
            windows(ids.len(), self.window_tokens).into_iter().map(move |window| (index, window))
        };
        self.ids.iter().enumerate().flat_map(of_text).collect()
    }
}

/// Measures a model on the windows that the journal does not contain yet.
///
/// # Errors
/// When the model cannot be loaded, its likelihoods are not finite, or writing fails. Finished
/// windows are in the journal.
pub(super) fn measure(session: &mut Session<'_>, model: &IdentifiedModel, texts: &Texts) -> Result<()> {
    let role = model.role;
    let done: HashSet<(usize, usize)> =
        session.journal.records().windows_of(role).map(|record| (record.index, record.start)).collect();
    let all = texts.windows();
    if done.len() == all.len() {
        return Ok(());
    }
    let (folder, device) = (&model.folder, session.device);
    let transformer = checkpoint::load(folder, device, device::default_kind(device))?;
    let mut progress = Progress::new(&format!("{role} perplexity"), done.len() as u64, all.len() as u64);
    for (index, window) in all.into_iter().filter(|(index, window)| !done.contains(&(*index, window.start))) {
        interrupt::check()?;
        let Window { start, end, num_scored } = window;
        let nll = negative_log_likelihood(&transformer, &texts.ids[index][start..end], num_scored)?;
        let id = session.samples[index].id.clone();
        if !nll.is_finite() {
            let folder = folder.display();
            return Err(Error::usage(format!(
                "{folder}: its logits in the window at token {start} of `{id}` are not finite: the weights are broken"
            )));
        }
        session.journal.append_window(WindowRecord { role, index, id, start, tokens: num_scored, nll })?;
        progress.advance(1);
    }
    progress.finish();
    Ok(())
}

/// Sum of the negative log-likelihoods of the last `num_scored` tokens, in nats. The softmax is
/// computed in float32.
fn negative_log_likelihood(model: &Transformer, ids: &[i32], num_scored: usize) -> Result<f64> {
    let _no_grad = tch::no_grad_guard();
    let tokens = Tensor::from_slice(ids).to_kind(Kind::Int64).to_device(model.device());
    let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, model.device()));
    let hidden = model.forward(&tokens.unsqueeze(0), &positions.unsqueeze(0)).squeeze_dim(0);
    let mut sum = 0.0;
    for start in (ids.len() - num_scored..ids.len()).step_by(MAX_LOGIT_POSITIONS) {
        let (start, count) = (start as i64, MAX_LOGIT_POSITIONS.min(ids.len() - start) as i64);
        // The logits at a position predict the token after it.
        let logits = model.compute_logits(&hidden.narrow(0, start - 1, count))?;
        let targets = tokens.narrow(0, start, count).unsqueeze(1);
        let likelihoods = logits.log_softmax(-1, Kind::Float).gather(1, &targets, false);
        sum -= likelihoods.sum(Kind::Double).double_value(&[]);
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use cllm_core::model::ModelConfig;
    use tch::Device;

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
        let window = |start, end, num_scored| Window { start, end, num_scored };
        assert_eq!(windows(0, 8), []);
        assert_eq!(windows(1, 8), []);
        assert_eq!(windows(2, 8), [window(0, 2, 1)]);
        assert_eq!(windows(8, 8), [window(0, 8, 7)]);
        assert_eq!(windows(9, 8), [window(0, 8, 7), window(4, 9, 1)]);
        assert_eq!(windows(14, 8), [window(0, 8, 7), window(4, 12, 4), window(8, 14, 2)]);
        for (tokens, size) in [(100, 2), (100, 3), (101, 8), (1000, 17)] {
            let windows = windows(tokens, size);
            let scored: Vec<usize> = windows.iter().flat_map(|one| one.end - one.num_scored..one.end).collect();
            assert_eq!(scored, (1..tokens).collect::<Vec<_>>());
            assert!(windows.iter().skip(1).all(|one| one.end - one.num_scored - one.start >= size / 2));
        }
    }

    #[test]
    fn the_likelihood_of_a_window_is_that_of_its_tokens_one_by_one() {
        let model = model(3);
        // More positions than fit in memory at once.
        let ids: Vec<i32> = (0..600).map(|position| position * position % 47).collect();
        let scored = 550;
        let mut by_hand = 0.0;
        let tokens = Tensor::from_slice(&ids).to_kind(Kind::Int64).unsqueeze(0);
        let positions = Tensor::arange(600, (Kind::Int64, Device::Cpu)).unsqueeze(0);
        let logits = tch::no_grad(|| model.compute_logits(&model.forward(&tokens, &positions))).unwrap().squeeze_dim(0);
        for position in 600 - scored..600 {
            let row: Vec<f64> = Vec::try_from(logits.get(position as i64 - 1).to_kind(Kind::Double)).unwrap();
            let total: f64 = row.iter().map(|logit| logit.exp()).sum();
            by_hand -= (row[ids[position] as usize].exp() / total).ln();
        }
        let nll = negative_log_likelihood(&model, &ids, scored).unwrap();
        assert!((nll - by_hand).abs() < 1e-3, "{nll} {by_hand}");
        // A likelihood depends on the tokens before, not on those after.
        let cut = negative_log_likelihood(&model, &ids[..599], scored - 1).unwrap();
        let last = negative_log_likelihood(&model, &ids, 1).unwrap();
        assert!((cut + last - nll).abs() < 1e-3, "{cut} {last} {nll}");
        assert!((negative_log_likelihood(&model, &ids[300..], 1).unwrap() - last).abs() > 1e-6);
    }

    #[test]
    fn a_model_without_knowledge_gives_every_token_the_same_likelihood() {
        let model = model(3);
        let head = model.named_parameters().into_iter().find(|(name, _)| name == "lm_head.weight").unwrap().1;
        let _ = tch::no_grad(|| head.shallow_clone().zero_());
        let ids: Vec<i32> = (0..40).collect();
        let nll = negative_log_likelihood(&model, &ids, 39).unwrap();
        // Its vocabulary has 50 tokens.
        assert!(((nll / 39.0).exp() - 50.0).abs() < 1e-4, "{nll}");
    }
}
