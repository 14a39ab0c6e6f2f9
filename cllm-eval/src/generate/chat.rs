//! A chat in the terminal: every question is answered twice at the same time, autoregressively and by Jacobi decoding.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use cllm_core::chat_template::Message;
use cllm_core::decode::{DecodeOptions, Decoder, Limits, Request, Steps, Strategy, capacity};
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::prompt_set::Prompt;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device, hub, interrupt, progress};
use console::Term;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::Manner;
use super::columns::{Column, screen};
use super::visible::visible;
use crate::measure::eos_ids;
use crate::pieces::PieceWriter;
use crate::results::label;
use crate::statistics::ratio;

const HELP: &str = "Every question is answered twice, on the left one token a forward, on the right by Jacobi decoding. The two take turns: the \
    next forward is that of the one whose forwards took less time so far, so that both fill as fast as they would alone. The next question goes \
    on from the answer on the left.\n/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C ends an answer.";
/// Between two pictures of the screen.
const FRAME: Duration = Duration::from_millis(40);
/// Lines of a terminal that no answer's text has: titles, states, and the line below.
const OTHER_LINES: usize = 4;

/// Asks and answers until the user ends it.
///
/// # Errors
/// When this is no terminal, or the model cannot be loaded; libtorch's errors.
pub fn chat(how: &Manner) -> Result<()> {
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return Err(Error::usage("give a prompt: without one, generate is a chat and needs a terminal"));
    }
    let device = device::parse(&how.device)?;
    let folder = hub::locate(&how.model)?;
    let tokenizer = Tokenizer::load(&folder)?;
    let config = ModelConfig::load(&folder)?;
    let eos_ids = eos_ids(how.eos_ids.as_deref(), &tokenizer, &folder, &config)?;
    let limits = Limits { max_new_tokens: how.max_new_tokens, eos_ids };
    let model = Transformer::load(&folder, device, device::default_kind(device))?;
    let strategies = [Strategy::Ar, Strategy::Jacobi { n: how.n }];
    let room = |strategy| {
        let prompt = config.max_positions.saturating_sub(limits.max_new_tokens);
        Decoder::new(&model, 1, capacity(prompt, &limits, strategy))
    };
    let decoders = [room(strategies[0])?, room(strategies[1])?];
    let mut talk =
        Talk { tokenizer, limits, options: strategies.map(|one| DecodeOptions::greedy(one, how.seed)), decoders };
    talk.warm_up()?;
    progress::say(format!("{}: ask, or /help", how.model));
    let mut editor = DefaultEditor::new().map_err(terminal)?;
    let mut history: Vec<Message> = Vec::new();
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line.trim().to_owned(),
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(error) => return Err(terminal(error)),
        };
        match line.as_str() {
            "" => continue,
            "/quit" => return Ok(()),
            "/help" => progress::say(HELP),
            "/reset" => history.clear(),
            question => {
                let _ = editor.add_history_entry(question);
                history.push(Message { role: "user".to_owned(), content: question.to_owned() });
                let prompt = match how.raw {
                    true => Prompt::Text(question.to_owned()),
                    false => Prompt::Messages(history.clone()),
                };
                match talk.answer(&prompt) {
                    Ok(answer) => history.push(Message { role: "assistant".to_owned(), content: answer }),
                    Err(Error::Interrupted(_)) if interrupt::forgive() => drop(history.pop()),
                    // The conversation may have outgrown the context.
                    Err(error @ Error::Usage(_)) => {
                        history.pop();
                        progress::say(format!("{error}\n/reset begins anew"));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
    }
}

fn terminal(error: ReadlineError) -> Error {
    Error::environment(format!("the terminal: {error}"))
}

/// What answers.
struct Talk<'m> {
    tokenizer: Tokenizer,
    limits: Limits,
    /// Left and right.
    options: [DecodeOptions; 2],
    decoders: [Decoder<'m>; 2],
}

/// One of the two answers on its way.
struct Side<'t> {
    steps: Steps<'t>,
    /// Until the answer has ended.
    writer: Option<PieceWriter<'t>>,
    ids: Vec<i32>,
    forwards: usize,
    column: Column,
}

impl Talk<'_> {
    /// So that the first answer is as fast as the others.
    fn warm_up(&mut self) -> Result<()> {
        let request = Request {
            sample_id: "chat".to_owned(),
            prompt_ids: vec![self.limits.eos_ids.first().copied().unwrap_or(0)],
        };
        let limits = Limits { max_new_tokens: self.limits.max_new_tokens.min(8), eos_ids: Vec::new() };
        for (decoder, options) in self.decoders.iter_mut().zip(self.options) {
            decoder.answer(std::slice::from_ref(&request), &limits, options, None)?;
        }
        Ok(())
    }

    /// Shows both answers as they come, and returns the text of the left one.
    fn answer(&mut self, prompt: &Prompt) -> Result<String> {
        let Talk { tokenizer, limits, options, decoders } = self;
        let (_, prompt_ids) = tokenizer.prompt(prompt)?;
        let request = Request { sample_id: "chat".to_owned(), prompt_ids };
        let [left, right] = decoders;
        let mut sides = [
            Side::new(left.steps(request.clone(), limits, options[0])?, tokenizer, options[0].strategy),
            Side::new(right.steps(request, limits, options[1])?, tokenizer, options[1].strategy),
        ];
        let mut picture = Picture { term: Term::stderr(), lines: 0, drawn: None };
        let told = take_turns(&mut sides, &mut picture);
        // What is there stays on the screen, whatever ended it.
        picture.whole(&sides)?;
        told?;
        let rate = |side: &Side<'_>| ratio(side.ids.len() as f64, side.steps.timing().decode_seconds);
        let faster = ratio(rate(&sides[1]), rate(&sides[0])).unwrap_or(0.0);
        let same = if sides[0].ids == sides[1].ids { "the same tokens" } else { "other tokens" };
        progress::say(format!("on the right {same}, {faster:.2} times as fast without prefill"));
        tokenizer.decode(&sides[0].ids)
    }
}

fn take_turns(sides: &mut [Side<'_>; 2], picture: &mut Picture) -> Result<()> {
    while let Some(side) = next(sides) {
        side.step()?;
        picture.show(sides)?;
    }
    Ok(())
}

/// The open answer whose forwards took less time so far.
fn next<'s, 't>(sides: &'s mut [Side<'t>; 2]) -> Option<&'s mut Side<'t>> {
    let open = sides.iter_mut().filter(|side| side.writer.is_some());
    open.min_by(|a, b| a.seconds().total_cmp(&b.seconds()))
}

impl<'t> Side<'t> {
    fn new(steps: Steps<'t>, tokenizer: &'t Tokenizer, strategy: Strategy) -> Self {
        let column = Column { title: label(strategy), ..Column::default() };
        Side { steps, writer: Some(PieceWriter::new(tokenizer)), ids: Vec::new(), forwards: 0, column }
    }

    fn seconds(&self) -> f64 {
        let timing = self.steps.timing();
        timing.prefill_seconds + timing.decode_seconds
    }

    fn step(&mut self) -> Result<()> {
        match (self.steps.step()?, &mut self.writer) {
            (None, writer) => {
                let rest = writer.take().map(PieceWriter::finish).transpose()?;
                self.column.pieces.extend(rest.map(|text| visible(&text)));
            }
            (Some(ids), Some(writer)) if !ids.is_empty() => {
                self.forwards += 1;
                self.column.pieces.push(visible(&writer.push(&ids)?));
                self.ids.extend(ids);
            }
            (Some(_), _) => {}
        }
        let tokens = self.ids.len() as f64;
        self.column.status = format!(
            "{tokens} tokens, {:.0} tokens/s, {:.2} a forward",
            ratio(tokens, self.steps.timing().decode_seconds).unwrap_or(0.0),
            ratio(tokens, self.forwards as f64).unwrap_or(0.0)
        );
        Ok(())
    }
}

/// What the terminal shows of an answer.
struct Picture {
    term: Term,
    /// Lines of the last picture.
    lines: usize,
    drawn: Option<Instant>,
}

impl Picture {
    /// As much as the terminal has room for, unless the last picture is quite new.
    fn show(&mut self, sides: &[Side<'_>; 2]) -> Result<()> {
        if self.drawn.is_some_and(|drawn| drawn.elapsed() < FRAME) {
            return Ok(());
        }
        self.drawn = Some(Instant::now());
        let height = usize::from(self.term.size().0);
        // One under the other, both have half of it.
        self.draw(sides, (height.saturating_sub(2 * OTHER_LINES) / 2).max(1))
    }

    fn whole(&mut self, sides: &[Side<'_>; 2]) -> Result<()> {
        self.draw(sides, usize::MAX)
    }

    fn draw(&mut self, sides: &[Side<'_>; 2], most: usize) -> Result<()> {
        let failed = |error| Error::environment(format!("the terminal: {error}"));
        let columns = sides.each_ref().map(|side| side.column.clone());
        let colour = std::env::var_os("NO_COLOR").is_none();
        let lines = screen(&columns, usize::from(self.term.size().1), most, colour);
        self.term.clear_last_lines(self.lines).map_err(failed)?;
        self.lines = lines.len();
        self.term.write_str(&(lines.join("\n") + "\n")).map_err(failed)
    }
}
