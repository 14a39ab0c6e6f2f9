//! Decoding: autoregressive, Jacobi and rolling behind one engine. Autoregressive decoding is Jacobi decoding with n = 1.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod cached_model;
mod row;

use std::time::Instant;

use crate::model::Transformer;
use crate::trajectory::{Block, FinishReason};
use crate::{Error, Result, device, interrupt};

use cached_model::CachedModel;
use row::Row;

/// How tokens are chosen and verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// One token a forward.
    Ar,
    /// Fixed blocks of n tokens, iterated to their fixed point (Song et al., arXiv 2002.03629; CLLM, 2403.00835).
    Jacobi {
        /// Tokens of a block, at least 2.
        n: usize,
    },
    /// A window that rolls on: what a forward made final leaves it at once, and n - 1 guesses stay in flight, the
    /// predictions of the forward before among them.
    Rolling {
        /// Tokens of the window, at least 2.
        n: usize,
    },
}

/// One prompt to answer.
#[derive(Debug, Clone)]
pub struct Request {
    /// Names the randomness of the first guesses.
    pub sample_id: String,
    /// Token ids, at least one.
    pub prompt_ids: Vec<i32>,
}

/// When an answer ends.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most tokens of an answer, EOS included.
    pub max_new_tokens: usize,
    /// Ids that end an answer.
    pub eos_ids: Vec<i32>,
}

/// An answer and how it came.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Token ids through EOS or the limit.
    pub response_ids: Vec<i32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Forwards of this row after prefill; prefill covers all but the last prompt token, so autoregressive decoding
    /// needs exactly one forward a token.
    pub forwards: usize,
    /// Tokens that each forward made final, in order (cut at the end of the answer); they sum to the response.
    pub accepted: Vec<u32>,
    /// The trajectory, when it was asked for and the strategy has blocks.
    pub blocks: Vec<Block>,
}

/// What a batch of answers took.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timing {
    /// Seconds of the prompts' forward.
    pub prefill_seconds: f64,
    /// Seconds of everything after it.
    pub decode_seconds: f64,
}

/// Tokens that became final in one forward of one row, for those who watch: row index and the new tokens.
pub type Watcher<'w> = &'w mut dyn FnMut(usize, &[i32]);

/// Options of one call of [`decode`].
#[derive(Debug, Clone, Copy)]
pub struct DecodeOptions {
    /// How.
    pub strategy: Strategy,
    /// Seed of the first guesses.
    pub seed: u64,
    /// Keep the trajectory of each block ([`Strategy::Jacobi`]).
    pub record: bool,
}

/// Answers all requests as one batch, each row at its own position and finishing on its own.
///
/// # Errors
/// [`Error::Usage`] when a prompt and its answer do not fit the model's context; libtorch's errors; interruption.
pub fn decode(
    model: &Transformer,
    requests: &[Request],
    limits: &Limits,
    options: DecodeOptions,
    watcher: Option<Watcher<'_>>,
) -> Result<(Vec<Answer>, Timing)> {
    let longest = requests.iter().map(|request| request.prompt_ids.len()).max().unwrap_or(0);
    for request in requests {
        check_length(request, limits, model.config().max_positions)?;
    }
    let _no_grad = tch::no_grad_guard();
    let capacity = longest + limits.max_new_tokens + options.strategy.block_size();
    let mut greedy = CachedModel::new(model, requests.len(), capacity);
    let place = model.device();
    device::synchronize(place);
    let started = Instant::now();
    greedy.prefill(&requests.iter().map(|request| request.prompt_ids.as_slice()).collect::<Vec<_>>());
    device::synchronize(place);
    let prefill_seconds = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let answers = converge(&mut greedy, requests, limits, options, watcher)?;
    Ok((answers, Timing { prefill_seconds, decode_seconds: started.elapsed().as_secs_f64() }))
}

impl Strategy {
    /// Tokens of a block or window: 1 for autoregressive decoding.
    pub fn block_size(self) -> usize {
        match self {
            Strategy::Ar => 1,
            Strategy::Jacobi { n } | Strategy::Rolling { n } => n,
        }
    }
}

/// Checks that a prompt is not empty and fits the model's context with its answer; for those who ask before a long run.
///
/// # Errors
/// [`Error::Usage`] naming the sample.
pub fn check_length(request: &Request, limits: &Limits, max_positions: usize) -> Result<()> {
    let prompt = request.prompt_ids.len();
    let new = limits.max_new_tokens;
    if prompt == 0 {
        return Err(Error::usage(format!("sample `{}` has an empty prompt: nothing to continue", request.sample_id)));
    }
    if prompt.saturating_add(new) > max_positions {
        return Err(Error::usage(format!(
            "sample `{}`: {prompt} prompt tokens and up to {new} new ones do not fit the model's context of \
             {max_positions}; lower max_new_tokens or leave the sample out",
            request.sample_id
        )));
    }
    Ok(())
}

/// What decoding asks of a model: greedy predictions for one window of tokens a row.
trait Greedy {
    /// The most likely next token after each token of each window. A window starts with the row's last known token.
    fn predict(&mut self, windows: &[Window<'_>]) -> Result<Vec<Vec<i32>>>;

    /// Keeps only these rows, in this order.
    fn keep(&mut self, rows: &[usize]);
}

/// The tokens of a row to forward: the last known one and the guesses after it.
struct Window<'r> {
    /// Position of `known` in the sequence.
    start: usize,
    known: i32,
    guesses: &'r [i32],
}

fn converge(
    model: &mut impl Greedy,
    requests: &[Request],
    limits: &Limits,
    options: DecodeOptions,
    mut watcher: Option<Watcher<'_>>,
) -> Result<Vec<Answer>> {
    let mut answers: Vec<Option<Answer>> = requests.iter().map(|_| None).collect();
    let mut rows: Vec<(usize, Row<'_>)> =
        requests.iter().map(|request| Row::new(request, limits, options)).enumerate().collect();
    while !rows.is_empty() {
        interrupt::check()?;
        let windows: Vec<_> = rows.iter().map(|(_, row)| row.window()).collect();
        let predictions = model.predict(&windows)?;
        for ((index, row), predicted) in rows.iter_mut().zip(&predictions) {
            let new = row.accept(predicted);
            if let Some(watcher) = &mut watcher {
                watcher(*index, new);
            }
        }
        if rows.iter().all(|(_, row)| !row.finished()) {
            continue;
        }
        let kept: Vec<usize> = (0..rows.len()).filter(|&slot| !rows[slot].1.finished()).collect();
        let (going, done): (Vec<_>, Vec<_>) = rows.into_iter().partition(|(_, row)| !row.finished());
        rows = going;
        for (index, row) in done {
            answers[index] = Some(row.into_answer());
        }
        model.keep(&kept);
    }
    Ok(answers.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests;
