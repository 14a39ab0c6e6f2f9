//! `generate` answers one prompt autoregressively and with drafts, one after the other;
//! without a prompt it is a chat that shows both side by side.

mod chat;
mod columns;
mod decoding;
mod keys;

use std::path::Path;

use cllm_core::chat_template::{Message, RenderSettings};
use cllm_core::checkpoint::{self, hub};
use cllm_core::decode::{
    Answer, DecodeOptions, Decoder, Request, Sampling, StopConditions, Strategy, Timing, check_fits_context,
    required_slots,
};
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::printable::{shows_colour, to_printable};
use cllm_core::progress::count;
use cllm_core::prompt_set::Prompt;
use cllm_core::tokenizer::{DecodeStream, Tokenizer};
use cllm_core::trajectory::FinishReason;
use cllm_core::{Error, Result, chat_template, device, progress};
use serde::Serialize;

use crate::statistics::ratio;
pub use chat::chat;
use columns::{COLOURS, RESET_COLOUR};
use decoding::parse_seed;
pub(crate) use decoding::{parse_strategy, parse_temperature};

/// The arguments of `generate`, except the prompt.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Folder or id.
    pub model: String,
    /// Whether prompts are used as they are, without the chat template.
    pub raw: bool,
    /// The system message.
    pub system: Option<String>,
    /// How the second answer is decoded; `None` chooses a strategy that suits the model.
    pub strategy: Option<Strategy>,
    /// Tokens of the window of that strategy.
    pub n: usize,
    /// 0 chooses the likeliest token.
    pub temperature: f64,
    pub max_new_tokens: usize,
    /// Ids that end an answer; `None` for the model's own.
    pub eos_ids: Option<Vec<i32>>,
    pub device: String,
    /// Seed of the first draft tokens.
    pub seed: u64,
    /// How prompts are rendered.
    pub rendering: RenderSettings,
}

impl GenerateOptions {
    /// The options of the first and the second answer of a model.
    fn decode_options(&self, model: &Transformer) -> [DecodeOptions; 2] {
        let suitable = || Strategy::suitable(self.n, model.adapts_drafts());
        let sampling = Sampling::from_temperature(self.temperature);
        [Strategy::Ar, self.strategy.unwrap_or_else(suitable)]
            .map(|strategy| DecodeOptions { sampling, ..DecodeOptions::greedy(strategy, self.seed) })
    }

    fn load_tokenizer(&self, folder: &Path, config: &ModelConfig) -> Result<Tokenizer> {
        let tokenizer = Tokenizer::load_for(folder, &self.rendering.resolve(chat_template::today())?)?;
        tokenizer.with_eos_ids(self.eos_ids.as_deref(), folder, config.vocab_size)
    }

    /// The messages of a conversation, after the system message.
    fn conversation(&self, turns: &[Message]) -> Prompt {
        let system = self.system.iter().map(|text| Message::new("system", text));
        Prompt::Conversation(system.chain(turns.iter().cloned()).collect::<Vec<_>>().into())
    }

    fn stop_conditions(&self, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<StopConditions> {
        let (max_new_tokens, context) = (self.max_new_tokens, config.max_positions);
        if max_new_tokens >= context {
            return Err(Error::usage(format!(
                "--max-new-tokens {max_new_tokens} leaves no room for a prompt in the model's context of {context} \
                 tokens: use a lower number"
            )));
        }
        Ok(StopConditions::new(max_new_tokens, tokenizer.eos_ids().to_vec()))
    }
}

/// Both answers to a prompt: the document of `generate --json`.
#[derive(Debug, Serialize)]
pub struct Generation {
    pub schema_version: u32,
    pub prompt: String,
    /// Whether both answers have the same tokens.
    pub equal: bool,
    /// Tokens per second of the second answer over those of the first, excluding prefill.
    pub speedup: Option<f64>,
    /// The autoregressive answer, then the one with drafts.
    pub strategies: [GeneratedAnswer; 2],
}

/// One answer with its timings.
#[derive(Debug, Serialize)]
pub struct GeneratedAnswer {
    /// Name of the strategy.
    pub name: String,
    /// Size of the strategy's window; 1 for `ar`.
    pub max_tokens_per_forward: usize,
    pub text: String,
    pub response_ids: Vec<i32>,
    pub finish_reason: FinishReason,
    pub tokens: usize,
    pub forwards: usize,
    /// Tokens that each forward accepted.
    pub accepted: Vec<u32>,
    pub prefill_seconds: f64,
    /// Seconds after prefill.
    pub seconds: f64,
    /// `tokens` over `seconds`.
    pub tokens_per_second: Option<f64>,
}

/// Answers a prompt both ways. Each answer is generated twice: first as a warm-up, during which
/// `show` displays it on stderr, and then timed without a watcher.
///
/// # Errors
/// When the model cannot be loaded or the prompt does not fit its context.
pub fn generate(prompt: &str, options: &GenerateOptions, show: bool) -> Result<Generation> {
    let device = device::parse(&options.device)?;
    let folder = hub::locate(&options.model)?;
    let config = checkpoint::load_config(&folder)?;
    let tokenizer = options.load_tokenizer(&folder, &config)?;
    let question = match options.raw {
        true => Prompt::Text(prompt.to_owned()),
        false => options.conversation(&[Message::new("user", prompt)]),
    };
    let (_, prompt_ids) = tokenizer.encode_prompt(&question)?;
    let stop = options.stop_conditions(&tokenizer, &config)?;
    let request = Request { sample_id: "generate".to_owned(), prompt_ids };
    check_fits_context(&request, &stop, config.max_positions)?;
    let model = checkpoint::load(&folder, device, device::default_kind(device))?;
    let [first, second] = options.decode_options(&model);
    let num_slots = required_slots(request.prompt_ids.len(), &stop, second.strategy);
    let decoder = Decoder::new(&model, 1, num_slots)?;
    let mut generator = Generator { tokenizer: &tokenizer, decoder, request, stop, show };
    let strategies = [generator.answer(first)?, generator.answer(second)?];
    let equal = strategies[0].response_ids == strategies[1].response_ids;
    let speedup = ratio(strategies[1].tokens_per_second, strategies[0].tokens_per_second);
    if show {
        progress::log(compared(equal, second.strategy, speedup));
    }
    Ok(Generation { schema_version: 1, prompt: prompt.to_owned(), equal, speedup, strategies })
}

/// Says how the answer with drafts compares with the autoregressive one.
fn compared(is_equal: bool, strategy: Strategy, speedup: Option<f64>) -> String {
    let tokens = if is_equal { "same tokens" } else { "different tokens" };
    match speedup {
        Some(speedup) => format!("{tokens}; {} is {speedup:.2}x as fast (excluding prefill)", strategy.name()),
        None => tokens.to_owned(),
    }
}

struct Generator<'m> {
    tokenizer: &'m Tokenizer,
    decoder: Decoder<'m>,
    request: Request,
    stop: StopConditions,
    /// Whether the answers are shown on stderr.
    show: bool,
}

impl Generator<'_> {
    fn answer(&mut self, options: DecodeOptions) -> Result<GeneratedAnswer> {
        let strategy = options.strategy;
        let requests = std::slice::from_ref(&self.request);
        if self.show {
            progress::log(format!("{strategy}:"));
        }
        let mut live_text = LiveText::new(self.tokenizer, &self.request.prompt_ids, self.show)?;
        let mut watch = |_: usize, ids: &[i32]| live_text.add(ids);
        self.decoder.answer(requests, &self.stop, options, Some(&mut watch))?;
        live_text.finish()?;
        let (mut answers, timing) = self.decoder.answer(requests, &self.stop, options, None)?;
        let answer = answers.pop().ok_or_else(|| Error::internal("decoding returned no answer"))?;
        let answer = GeneratedAnswer::new(self.tokenizer, &self.request, strategy, answer, timing)?;
        if self.show {
            progress::log(answer.summary());
        }
        Ok(answer)
    }
}

impl GeneratedAnswer {
    fn new(
        tokenizer: &Tokenizer,
        request: &Request,
        strategy: Strategy,
        answer: Answer,
        timing: Timing,
    ) -> Result<Self> {
        let num_tokens = answer.response_ids.len();
        Ok(GeneratedAnswer {
            name: strategy.name().to_owned(),
            max_tokens_per_forward: strategy.max_window_tokens(),
            text: tokenizer.decode_answer(&request.prompt_ids, &answer.response_ids)?,
            response_ids: answer.response_ids,
            finish_reason: answer.finish_reason,
            tokens: num_tokens,
            forwards: answer.num_forwards,
            accepted: answer.num_new_tokens,
            prefill_seconds: timing.prefill_seconds,
            seconds: timing.decode_seconds,
            tokens_per_second: ratio(num_tokens as f64, timing.decode_seconds),
        })
    }

    fn summary(&self) -> String {
        format!(
            "{} in {}, {:.0} tokens/s (prefill: {:.3} s, not counted)",
            count(self.tokens, "token"),
            count(self.forwards, "forward"),
            self.tokens_per_second.unwrap_or(0.0),
            self.prefill_seconds
        )
    }
}

/// An answer on stderr that grows with each forward, in alternating colours.
struct LiveText<'t> {
    text_stream: DecodeStream<'t>,
    show: bool,
    colour: bool,
    num_forwards: usize,
    /// An error to return later, because the watcher of a decoder cannot fail.
    error: Option<Error>,
}

impl<'t> LiveText<'t> {
    fn new(tokenizer: &'t Tokenizer, prompt_ids: &[i32], show: bool) -> Result<Self> {
        let colour = shows_colour(&std::io::stderr());
        let text_stream = tokenizer.decode_stream(prompt_ids)?;
        Ok(LiveText { text_stream, show, colour, num_forwards: 0, error: None })
    }

    fn add(&mut self, ids: &[i32]) {
        if !self.show || self.error.is_some() {
            return;
        }
        match self.text_stream.push(ids) {
            Ok(text) if self.colour => {
                let colour = COLOURS[self.num_forwards % COLOURS.len()];
                progress::write_stderr(&format!("{colour}{}{RESET_COLOUR}", to_printable(&text)));
            }
            Ok(text) => progress::write_stderr(&to_printable(&text)),
            Err(error) => self.error = Some(error),
        }
        self.num_forwards += 1;
    }

    fn finish(self) -> Result<()> {
        if let Some(error) = self.error {
            return Err(error);
        }
        if self.show {
            progress::write_stderr(&format!("{}\n", to_printable(&self.text_stream.finish()?)));
        }
        Ok(())
    }
}
