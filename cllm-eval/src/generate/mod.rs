//! `generate`: autoregressive beside Jacobi decoding, of one prompt or in a chat.

mod chat;
mod columns;
mod visible;

use std::io::IsTerminal;
use std::path::Path;

use cllm_core::checkpoint::{self, hub};
use cllm_core::decode::{
    Answer, DecodeOptions, Decoder, Request, StopConditions, Strategy, Timing, check_fits_context, required_slots,
};
use cllm_core::model::ModelConfig;
use cllm_core::prompt_set::Prompt;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device, progress};
use serde_json::{Value, json};

use crate::detokenize::Detokenizer;
use crate::eos_ids;
use crate::statistics::ratio;
pub use chat::chat;
use columns::{COLOURS, PLAIN};
pub use visible::visible;

/// How to generate.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Folder or id.
    pub model: String,
    /// Take a prompt as it is, without the chat template.
    pub raw: bool,
    /// Tokens of a Jacobi block.
    pub n: usize,
    /// Most tokens.
    pub max_new_tokens: usize,
    /// Ids that end the answer, in place of the model's own.
    pub eos_ids: Option<Vec<i32>>,
    /// Where.
    pub device: String,
    /// Of the first guesses.
    pub seed: u64,
}

impl GenerateOptions {
    fn stop_conditions(&self, tokenizer: &Tokenizer, folder: &Path, config: &ModelConfig) -> Result<StopConditions> {
        let (new, context) = (self.max_new_tokens, config.max_positions);
        if new >= context {
            return Err(Error::usage(format!(
                "--max-new-tokens {new}: with a prompt it does not fit the model's context of {context}; give fewer"
            )));
        }
        Ok(StopConditions {
            max_new_tokens: new,
            eos_ids: eos_ids::resolve(self.eos_ids.as_deref(), tokenizer, folder, config)?,
        })
    }
}

/// Answers the prompt both ways; what becomes final is shown on stderr as it does, unless quiet. Each answer is made
/// twice: watched, which also warms up, and then timed without a watcher.
///
/// # Errors
/// When the model cannot be loaded or the prompt does not fit.
pub fn generate(prompt: &str, how: &GenerateOptions, show: bool) -> Result<Value> {
    let device = device::parse(&how.device)?;
    let folder = hub::locate(&how.model)?;
    let tokenizer = Tokenizer::load(&folder)?;
    let asked = if how.raw { Prompt::Text(prompt.to_owned()) } else { Prompt::question(prompt) };
    let (_, prompt_ids) = tokenizer.encode_prompt(&asked)?;
    let config = checkpoint::load_config(&folder)?;
    let stop = how.stop_conditions(&tokenizer, &folder, &config)?;
    let requests = [Request { sample_id: "generate".to_owned(), prompt_ids }];
    check_fits_context(&requests[0], &stop, config.max_positions)?;
    let model = checkpoint::load(&folder, device, device::default_kind(device))?;
    let jacobi = Strategy::Jacobi { n: how.n };
    let mut decoder = Decoder::new(&model, 1, required_slots(requests[0].prompt_ids.len(), &stop, jacobi))?;
    let mut runs = Vec::new();
    for strategy in [Strategy::Ar, jacobi] {
        let options = DecodeOptions::greedy(strategy, how.seed);
        if show {
            progress::log(format!("{}:", strategy.to_string()));
        }
        let mut screen = Screen::new(&tokenizer, show);
        let mut watch = |_: usize, ids: &[i32]| screen.add(ids);
        decoder.answer(&requests, &stop, options, Some(&mut watch))?;
        screen.end()?;
        let (mut answers, timing) = decoder.answer(&requests, &stop, options, None)?;
        let answer = answers.pop().ok_or_else(|| Error::internal("decoding gave no answer"))?;
        let run = describe(&tokenizer, strategy, &answer, timing)?;
        if show {
            progress::log(line(&run));
        }
        runs.push((answer, run));
    }
    let equal = runs[0].0.response_ids == runs[1].0.response_ids;
    let speed = |index: usize| runs[index].1["tokens_per_second"].as_f64();
    let speedup = ratio(speed(1), speed(0));
    if show {
        let verdict = if equal { "the same" } else { "not the same" };
        progress::log(format!("Jacobi gives {verdict} tokens, {:.2} times as fast", speedup.unwrap_or(0.0)));
    }
    let runs: Vec<Value> = runs.into_iter().map(|(_, run)| run).collect();
    Ok(json!({ "schema_version": 1, "prompt": prompt, "equal": equal, "speedup": speedup, "strategies": runs }))
}

fn describe(tokenizer: &Tokenizer, strategy: Strategy, answer: &Answer, timing: Timing) -> Result<Value> {
    let tokens = answer.response_ids.len();
    Ok(json!({
        "name": strategy.name(),
        "n": (strategy != Strategy::Ar).then(|| strategy.max_window_tokens()),
        "text": tokenizer.decode(&answer.response_ids)?,
        "response_ids": answer.response_ids,
        "finish_reason": answer.finish_reason,
        "tokens": tokens,
        "forwards": answer.num_forwards,
        "accepted": answer.num_new_tokens,
        "prefill_seconds": timing.prefill_seconds,
        "seconds": timing.decode_seconds,
        "tokens_per_second": ratio(tokens as f64, timing.decode_seconds),
    }))
}

fn line(run: &Value) -> String {
    format!(
        "{} tokens in {} forwards, {:.1} tokens/s without prefill ({:.3} s)",
        run["tokens"],
        run["forwards"],
        run["tokens_per_second"].as_f64().unwrap_or(0.0),
        run["prefill_seconds"].as_f64().unwrap_or(0.0)
    )
}

/// Text that appears as it becomes final, each forward in another colour.
struct Screen<'t> {
    writer: Detokenizer<'t>,
    show: bool,
    colour: bool,
    forwards: usize,
    failure: Option<Error>,
}

impl<'t> Screen<'t> {
    fn new(tokenizer: &'t Tokenizer, show: bool) -> Self {
        let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Screen { writer: Detokenizer::new(tokenizer), show, colour, forwards: 0, failure: None }
    }

    fn add(&mut self, ids: &[i32]) {
        if !self.show || self.failure.is_some() {
            return;
        }
        match self.writer.push(ids) {
            Ok(piece) if self.colour => {
                progress::write_stderr(&format!(
                    "{}{}{PLAIN}",
                    COLOURS[self.forwards % COLOURS.len()],
                    visible(&piece)
                ));
            }
            Ok(piece) => progress::write_stderr(&visible(&piece)),
            Err(error) => self.failure = Some(error),
        }
        self.forwards += 1;
    }

    fn end(self) -> Result<()> {
        if let Some(error) = self.failure {
            return Err(error);
        }
        if self.show {
            progress::write_stderr(&format!("{}\n", visible(&self.writer.finish()?)));
        }
        Ok(())
    }
}
