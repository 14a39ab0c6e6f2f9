//! A chat in the terminal. Every question is answered twice at the same time, autoregressively and
//! with drafts, side by side, so that their speeds can be watched.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use cllm_core::chat_template::Message;
use cllm_core::checkpoint::{self, hub};
use cllm_core::decode::{
    DecodeOptions, Decoder, Request, RunningAnswer, Sampling, StopConditions, Strategy, check_fits_context,
    required_slots,
};
use cllm_core::model::Transformer;
use cllm_core::printable::{shows_colour, to_printable};
use cllm_core::progress::count;
use cllm_core::prompt_set::Prompt;
use cllm_core::tokenizer::{DecodeStream, Tokenizer};
use cllm_core::{Error, Result, device, interrupt, progress};
use console::Term;
use rustyline::DefaultEditor;

use super::GenerateOptions;
use super::columns::{Column, max_text_lines, side_by_side};
use super::decoding::sampling_text;
use super::keys::{self, Input};
use crate::statistics::ratio;

/// Minimum time between two frames on the screen.
const FRAME_TIME: Duration = Duration::from_millis(40);
/// Number of tokens in an answer that warms a decoder up.
const WARM_UP_TOKENS: usize = 8;

/// Reads questions and answers them until the user quits.
///
/// # Errors
/// Without a terminal, when the model cannot be loaded, or when decoding fails.
pub fn chat(options: &GenerateOptions) -> Result<()> {
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return Err(Error::usage("without a prompt, generate is a chat and needs a terminal: give a prompt"));
    }
    let device = device::parse(&options.device)?;
    let folder = hub::locate(&options.model)?;
    let config = checkpoint::load_config(&folder)?;
    let tokenizer = options.load_tokenizer(&folder, &config)?;
    let stop = options.stop_conditions(&tokenizer, &config)?;
    let model = checkpoint::load(&folder, device, device::default_kind(device))?;
    let mut chat = Chat::new(&model, tokenizer, stop, options)?;
    progress::log(format!("{}: ask a question, or type /help", options.model));
    let mut editor = DefaultEditor::new().map_err(terminal_error)?;
    loop {
        match keys::read_input(&mut editor).map_err(terminal_error)? {
            Input::Nothing => {}
            Input::Quit => return Ok(()),
            Input::Help => progress::log(keys::help()),
            Input::Reset => chat.history.clear(),
            Input::Trim => progress::log(chat.trim()),
            Input::Strategy(text) => chat.change(&text, |chat, text| chat.set_strategy(text))?,
            Input::Temperature(text) => chat.change(&text, |chat, text| chat.set_temperature(text))?,
            Input::Seed(text) => chat.change(&text, |chat, text| chat.set_seed(text))?,
            Input::Unknown(message) => progress::log(message),
            Input::Question(question) => {
                let _ = editor.add_history_entry(&question);
                chat.ask(question)?;
            }
        }
    }
}

fn terminal_error(error: impl std::fmt::Display) -> Error {
    Error::environment(format!("the terminal: {error}"))
}

struct Chat<'m> {
    model: &'m Transformer,
    tokenizer: Tokenizer,
    stop: StopConditions,
    /// Raw prompts skip the chat template; each is answered without the ones before it.
    given: &'m GenerateOptions,
    /// The options of the left and the right answer.
    options: [DecodeOptions; 2],
    decoders: [Decoder<'m>; 2],
    /// Cache slots of each decoder. They at least double when a conversation outgrows them.
    num_slots: usize,
    history: Vec<Message>,
}

impl<'m> Chat<'m> {
    fn new(
        model: &'m Transformer,
        tokenizer: Tokenizer,
        stop: StopConditions,
        options: &'m GenerateOptions,
    ) -> Result<Self> {
        let decode_options = options.decode_options(model);
        let num_slots = required_slots(1, &stop, decode_options[1].strategy).next_power_of_two();
        Ok(Chat {
            decoders: warm_decoders(model, &stop, decode_options, num_slots)?,
            model,
            tokenizer,
            stop,
            given: options,
            options: decode_options,
            num_slots,
            history: Vec::new(),
        })
    }

    /// Answers a question. Ctrl-C and a conversation that is too long end the answer, not the chat.
    fn ask(&mut self, question: String) -> Result<()> {
        self.history.push(Message::new("user", question.clone()));
        let prompt = if self.given.raw { Prompt::Text(question) } else { self.given.conversation(&self.history) };
        // A Ctrl-C pressed before the answer must not stop it.
        interrupt::clear_sigint();
        match self.answer(&prompt) {
            Ok(answer) => self.history.push(Message::new("assistant", answer)),
            Err(Error::Interrupted(_)) if interrupt::clear_sigint() => drop(self.history.pop()),
            Err(error @ Error::Usage(_)) => {
                self.history.pop();
                let advice = match self.history.is_empty() {
                    true => "ask a shorter question",
                    false => "/trim forgets the oldest question and its answer, /reset starts over",
                };
                progress::log(format!("{error}\n{advice}"));
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Forgets the oldest question and its answer, and says what is left.
    fn trim(&mut self) -> String {
        self.history.drain(..2.min(self.history.len()));
        match self.history.len() / 2 {
            0 => "the conversation is empty".to_owned(),
            left => format!("{} left", count(left, "question")),
        }
    }

    /// Changes the options of decoding; a mistake in them does not end the chat.
    fn change(&mut self, text: &str, change: impl FnOnce(&mut Self, &str) -> Result<()>) -> Result<()> {
        match change(self, text) {
            Err(error @ Error::Usage(_)) => progress::log(error.to_string()),
            other => other?,
        }
        let [_, right] = self.options;
        progress::log(format!("{}, {}, seed {}", right.strategy, sampling_text(right.sampling), right.seed));
        Ok(())
    }

    fn set_strategy(&mut self, text: &str) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let mut options = self.options;
        options[1].strategy = super::parse_strategy(text)?;
        let num_slots = required_slots(1, &self.stop, options[1].strategy).next_power_of_two().max(self.num_slots);
        self.decoders = warm_decoders(self.model, &self.stop, options, num_slots)?;
        (self.options, self.num_slots) = (options, num_slots);
        Ok(())
    }

    fn set_seed(&mut self, text: &str) -> Result<()> {
        let seed = super::parse_seed(text)?;
        self.options.iter_mut().for_each(|options| options.seed = seed);
        Ok(())
    }

    fn set_temperature(&mut self, text: &str) -> Result<()> {
        let temperature: f64 = super::parse_temperature(text)?;
        self.options.iter_mut().for_each(|options| options.sampling = Sampling::from_temperature(temperature));
        Ok(())
    }

    /// Shows both answers as they grow, and returns the text of the left one.
    fn answer(&mut self, prompt: &Prompt) -> Result<String> {
        let (_, prompt_ids) = self.tokenizer.encode_prompt(prompt)?;
        let request = Request { sample_id: "chat".to_owned(), prompt_ids };
        check_fits_context(&request, &self.stop, self.model.config().max_positions)?;
        self.reserve_slots(request.prompt_ids.len())?;
        let Chat { tokenizer, stop, options, decoders: [left, right], .. } = self;
        let text_stream = || tokenizer.decode_stream(&request.prompt_ids);
        let mut sides = [
            Side::new(left.start(request.clone(), stop, options[0])?, text_stream()?, options[0].strategy),
            Side::new(right.start(request.clone(), stop, options[1])?, text_stream()?, options[1].strategy),
        ];
        let mut screen = Screen { term: Term::stderr(), num_lines: 0, last_frame: None };
        let outcome = run_both(&mut sides, &mut screen);
        // Both answers stay on the screen in full, even after an error.
        screen.draw_all(&sides)?;
        outcome?;
        progress::log(comparison(&sides, self.options[1].strategy));
        tokenizer.decode_answer(&request.prompt_ids, &sides[0].ids)
    }

    fn reserve_slots(&mut self, num_prompt_tokens: usize) -> Result<()> {
        let needed = required_slots(num_prompt_tokens, &self.stop, self.options[1].strategy);
        if needed > self.num_slots {
            self.num_slots = needed.next_power_of_two();
            self.decoders = warm_decoders(self.model, &self.stop, self.options, self.num_slots)?;
        }
        Ok(())
    }
}

/// Creates both decoders and warms them up. On a GPU the first steps of each size are captured as
/// CUDA graphs, which must not slow down the first answer.
fn warm_decoders<'m>(
    model: &'m Transformer,
    stop: &StopConditions,
    options: [DecodeOptions; 2],
    num_slots: usize,
) -> Result<[Decoder<'m>; 2]> {
    let mut decoders = [Decoder::new(model, 1, num_slots)?, Decoder::new(model, 1, num_slots)?];
    let start = stop.eos_ids.first().copied().unwrap_or(0);
    let request = Request { sample_id: "chat".to_owned(), prompt_ids: vec![start] };
    let stop = StopConditions::new(stop.max_new_tokens.min(WARM_UP_TOKENS), Vec::new());
    for (decoder, options) in decoders.iter_mut().zip(options) {
        for _ in 0..2 {
            decoder.answer(std::slice::from_ref(&request), &stop, options, None)?;
        }
    }
    Ok(decoders)
}

/// One of the two answers while it grows.
struct Side<'t> {
    running: RunningAnswer<'t>,
    /// `None` once the answer has ended.
    text_stream: Option<DecodeStream<'t>>,
    ids: Vec<i32>,
    num_forwards: usize,
    column: Column,
}

/// Runs the forwards of both answers in turns.
fn run_both(sides: &mut [Side<'_>; 2], screen: &mut Screen) -> Result<()> {
    while let Some(side) = next_side(sides) {
        side.step()?;
        screen.draw(sides)?;
    }
    Ok(())
}

/// The unfinished answer whose forwards have taken less time so far.
fn next_side<'s, 't>(sides: &'s mut [Side<'t>; 2]) -> Option<&'s mut Side<'t>> {
    let unfinished = sides.iter_mut().filter(|side| side.text_stream.is_some());
    unfinished.min_by(|a, b| a.seconds().total_cmp(&b.seconds()))
}

fn comparison(sides: &[Side<'_>; 2], strategy: Strategy) -> String {
    let [left, right] = sides.each_ref().map(Side::tokens_per_second);
    super::compared(sides[0].ids == sides[1].ids, strategy, ratio(right, left))
}

impl<'t> Side<'t> {
    fn new(running: RunningAnswer<'t>, text_stream: DecodeStream<'t>, strategy: Strategy) -> Self {
        let column = Column { title: strategy.to_string(), ..Column::default() };
        Side { running, text_stream: Some(text_stream), ids: Vec::new(), num_forwards: 0, column }
    }

    fn seconds(&self) -> f64 {
        let timing = self.running.timing();
        timing.prefill_seconds + timing.decode_seconds
    }

    fn tokens_per_second(&self) -> Option<f64> {
        ratio(self.ids.len() as f64, self.running.timing().decode_seconds)
    }

    fn step(&mut self) -> Result<()> {
        match (self.running.step()?, &mut self.text_stream) {
            (None, text_stream) => {
                let rest = text_stream.take().map(DecodeStream::finish).transpose()?;
                self.column.texts.extend(rest.map(|text| to_printable(&text)));
            }
            (Some(ids), Some(text_stream)) if !ids.is_empty() => {
                self.num_forwards += 1;
                self.column.texts.push(to_printable(&text_stream.push(&ids)?));
                self.ids.extend(ids);
            }
            (Some(_), _) => {}
        }
        let num_tokens = self.ids.len();
        self.column.status = format!(
            "{num_tokens} tokens, {:.0}/s, {:.2} per forward",
            self.tokens_per_second().unwrap_or(0.0),
            ratio(num_tokens as f64, self.num_forwards as f64).unwrap_or(0.0)
        );
        Ok(())
    }
}

/// Redraws both answers in the terminal.
struct Screen {
    term: Term,
    /// Lines of the last frame.
    num_lines: usize,
    last_frame: Option<Instant>,
}

impl Screen {
    /// Draws as much as the terminal has room for, unless the last frame is recent.
    fn draw(&mut self, sides: &[Side<'_>; 2]) -> Result<()> {
        if self.last_frame.is_some_and(|at| at.elapsed() < FRAME_TIME) {
            return Ok(());
        }
        self.last_frame = Some(Instant::now());
        let (height, width) = self.term.size();
        self.draw_lines(sides, max_text_lines(width.into(), height.into()))
    }

    fn draw_all(&mut self, sides: &[Side<'_>; 2]) -> Result<()> {
        self.draw_lines(sides, usize::MAX)
    }

    fn draw_lines(&mut self, sides: &[Side<'_>; 2], max_lines: usize) -> Result<()> {
        let columns = sides.each_ref().map(|side| side.column.clone());
        let colour = shows_colour(&std::io::stderr());
        let lines = side_by_side(&columns, usize::from(self.term.size().1), max_lines, colour);
        self.term.clear_last_lines(self.num_lines).map_err(terminal_error)?;
        self.num_lines = lines.len();
        self.term.write_str(&(lines.join("\n") + "\n")).map_err(terminal_error)
    }
}
