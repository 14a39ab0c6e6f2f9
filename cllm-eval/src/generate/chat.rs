//! A chat in the terminal: every question is answered twice at the same time, autoregressively and by Jacobi decoding.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use cllm_core::chat_template::Message;
use cllm_core::checkpoint::{self, hub};
use cllm_core::decode::{
    DecodeOptions, Decoder, Request, RunningAnswer, StopConditions, Strategy, check_fits_context, required_slots,
};
use cllm_core::model::Transformer;
use cllm_core::prompt_set::Prompt;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device, interrupt, progress};
use console::Term;
use rustyline::DefaultEditor;
use rustyline::error::ReadlineError;

use super::GenerateOptions;
use super::columns::{Column, room, screen};
use super::visible::visible;
use crate::detokenize::Detokenizer;
use crate::statistics::ratio;

const HELP: &str = "Every question is answered twice, on the left one token a forward, on the right by Jacobi decoding. The two take turns: the \
    next forward is that of the one whose forwards took less time so far, so that both fill as fast as they would alone. The next question goes \
    on from the answer on the left; with --raw every prompt stands alone, without a template.\n/reset forgets the conversation, /quit or Ctrl-D ends, Ctrl-C ends an answer, twice the chat.";
/// Between two pictures of the screen.
const FRAME: Duration = Duration::from_millis(40);

/// Asks and answers until the user ends it.
///
/// # Errors
/// When this is no terminal, or the model cannot be loaded; libtorch's errors.
pub fn chat(how: &GenerateOptions) -> Result<()> {
    if !(std::io::stdin().is_terminal() && std::io::stderr().is_terminal()) {
        return Err(Error::usage("give a prompt: without one, generate is a chat and needs a terminal"));
    }
    let device = device::parse(&how.device)?;
    let folder = hub::locate(&how.model)?;
    let tokenizer = Tokenizer::load(&folder)?;
    let config = checkpoint::load_config(&folder)?;
    let stop = how.stop_conditions(&tokenizer, &folder, &config)?;
    let model = checkpoint::load(&folder, device, device::default_kind(device))?;
    let strategies = [Strategy::Ar, Strategy::Jacobi { n: how.n }];
    let options = strategies.map(|one| DecodeOptions::greedy(one, how.seed));
    let room = required_slots(1, &stop, strategies[1]).next_power_of_two();
    let decoders = decoders(&model, &stop, options, room)?;
    let mut talk = Talk { model: &model, tokenizer, stop, options, decoders, room };
    progress::log(format!("{}: ask, or /help", how.model));
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
            "/help" => progress::log(HELP),
            "/reset" => history.clear(),
            question => {
                let _ = editor.add_history_entry(question);
                history.push(Message { role: "user".to_owned(), content: question.to_owned() });
                let prompt = match how.raw {
                    true => Prompt::Text(question.to_owned()),
                    false => Prompt::Messages(history.clone()),
                };
                // One that came while nothing was in hand ends nothing.
                interrupt::clear_sigint();
                match talk.answer(&prompt) {
                    Ok(answer) => history.push(Message { role: "assistant".to_owned(), content: answer }),
                    Err(Error::Interrupted(_)) if interrupt::clear_sigint() => drop(history.pop()),
                    // The conversation may have outgrown the context.
                    Err(error @ Error::Usage(_)) => {
                        history.pop();
                        progress::log(format!("{error}\n/reset begins anew"));
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
    model: &'m Transformer,
    tokenizer: Tokenizer,
    stop: StopConditions,
    /// Left and right.
    options: [DecodeOptions; 2],
    decoders: [Decoder<'m>; 2],
    /// Tokens that each has room for: at least twice as many once a conversation outgrows it.
    room: usize,
}

/// Both decoders, warm: on a GPU the first steps of a size are recorded, and the first answer is to be as fast as the others.
fn decoders<'m>(
    model: &'m Transformer,
    stop: &StopConditions,
    options: [DecodeOptions; 2],
    room: usize,
) -> Result<[Decoder<'m>; 2]> {
    let mut both = [Decoder::new(model, 1, room)?, Decoder::new(model, 1, room)?];
    let start = stop.eos_ids.first().copied().unwrap_or(0);
    let request = Request { sample_id: "chat".to_owned(), prompt_ids: vec![start] };
    let stop = StopConditions { max_new_tokens: stop.max_new_tokens.min(8), eos_ids: Vec::new() };
    for (decoder, options) in both.iter_mut().zip(options) {
        for _ in 0..2 {
            decoder.answer(std::slice::from_ref(&request), &stop, options, None)?;
        }
    }
    Ok(both)
}

/// One of the two answers on its way.
struct Side<'t> {
    running: RunningAnswer<'t>,
    /// Until the answer has ended.
    writer: Option<Detokenizer<'t>>,
    ids: Vec<i32>,
    forwards: usize,
    column: Column,
}

impl Talk<'_> {
    /// Shows both answers as they come, and returns the text of the left one.
    fn answer(&mut self, prompt: &Prompt) -> Result<String> {
        let (_, prompt_ids) = self.tokenizer.encode_prompt(prompt)?;
        let request = Request { sample_id: "chat".to_owned(), prompt_ids };
        check_fits_context(&request, &self.stop, self.model.config().max_positions)?;
        let needed = required_slots(request.prompt_ids.len(), &self.stop, self.options[1].strategy);
        if needed > self.room {
            let room = needed.next_power_of_two();
            (self.decoders, self.room) = (decoders(self.model, &self.stop, self.options, room)?, room);
        }
        let Talk { tokenizer, stop, options, decoders: [left, right], .. } = self;
        let mut sides = [
            Side::new(left.start(request.clone(), stop, options[0])?, tokenizer, options[0].strategy),
            Side::new(right.start(request, stop, options[1])?, tokenizer, options[1].strategy),
        ];
        let mut picture = Picture { term: Term::stderr(), lines: 0, drawn: None };
        let told = take_turns(&mut sides, &mut picture);
        // What is there stays on the screen, whatever ended it.
        picture.whole(&sides)?;
        told?;
        let rate = |side: &Side<'_>| ratio(side.ids.len() as f64, side.running.timing().decode_seconds);
        let faster = ratio(rate(&sides[1]), rate(&sides[0])).unwrap_or(0.0);
        let same = if sides[0].ids == sides[1].ids { "the same tokens" } else { "other tokens" };
        progress::log(format!("on the right {same}, {faster:.2} times as fast without prefill"));
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
    fn new(running: RunningAnswer<'t>, tokenizer: &'t Tokenizer, strategy: Strategy) -> Self {
        let column = Column { title: strategy.to_string(), ..Column::default() };
        Side { running, writer: Some(Detokenizer::new(tokenizer)), ids: Vec::new(), forwards: 0, column }
    }

    fn seconds(&self) -> f64 {
        let timing = self.running.timing();
        timing.prefill_seconds + timing.decode_seconds
    }

    fn step(&mut self) -> Result<()> {
        match (self.running.step()?, &mut self.writer) {
            (None, writer) => {
                let rest = writer.take().map(Detokenizer::finish).transpose()?;
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
            ratio(tokens, self.running.timing().decode_seconds).unwrap_or(0.0),
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
        let (height, width) = self.term.size();
        self.draw(sides, room(width.into(), height.into()))
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
