//! Decoding: every strategy behind one engine. Autoregressive decoding is Jacobi decoding with n = 1.
//!
//! A [`Decoder`] holds a model and the cache of some rows. Each step forwards a window of tokens for every row: the last known
//! one and guesses after it, in order or as a tree. What the model predicts makes some of them final; a row whose answer ends
//! leaves its place to the next request. On a GPU a step is a CUDA graph over kernels of our own, elsewhere it is made of libtorch's operations.

mod backend;
mod proposer;
mod sampling;
mod sequence;
mod strategy;
mod tree;

use std::time::Instant;

use crate::model::{SlotMove, Transformer};
use crate::trajectory::{Block, FinishReason};
use crate::{Error, Result, interrupt};

use backend::cuda_graph::RecordedModel;
use backend::eager::EagerModel;
use backend::speculative::Drafted;
use sequence::Row;
use tree::{Place, Window};

pub use sampling::Sampling;
pub use strategy::Strategy;

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
pub struct StopConditions {
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
    pub num_forwards: usize,
    /// Tokens that each forward made final, in order (cut at the end of the answer); they sum to the response.
    pub num_accepted: Vec<u32>,
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
    /// Seed of the first guesses and of what is drawn.
    pub seed: u64,
    /// Keep the trajectory of each block ([`Strategy::Jacobi`]).
    pub record_trajectory: bool,
    /// How tokens are chosen.
    pub sampling: Sampling,
}

impl DecodeOptions {
    /// The likeliest tokens, without trajectories.
    pub fn greedy(strategy: Strategy, seed: u64) -> Self {
        DecodeOptions { strategy, seed, record_trajectory: false, sampling: Sampling::Greedy }
    }
}

/// A model with a cache for some rows, ready to decode.
pub struct Decoder<'m> {
    model: Box<dyn Forward + 'm>,
    draft_model: Option<Box<dyn Forward + 'm>>,
    rows: usize,
    room: Room,
}

/// What requests must fit.
struct Room {
    /// Tokens of a row in the cache.
    capacity: usize,
    /// Tokens of the model's context.
    max_positions: usize,
    /// Tokens that there are.
    vocab_size: i64,
}

fn forward<'m>(model: &'m Transformer, rows: usize, capacity: usize) -> Result<Box<dyn Forward + 'm>> {
    let _no_grad = tch::no_grad_guard();
    Ok(match RecordedModel::new(model, rows, capacity)? {
        Some(recorded) => Box::new(recorded),
        None => Box::new(EagerModel::new(model, rows, capacity)),
    })
}

impl<'m> Decoder<'m> {
    /// `rows`: most answers at once; `capacity`: most tokens of a prompt, its answer and one window ([`required_slots`]).
    ///
    /// # Errors
    /// [`Error::Torch`], such as memory that does not suffice for the cache.
    pub fn new(model: &'m Transformer, rows: usize, capacity: usize) -> Result<Self> {
        let config = model.config();
        let room = Room { capacity, max_positions: config.max_positions, vocab_size: config.vocab_size };
        Ok(Decoder { model: forward(model, rows, capacity)?, draft_model: None, rows, room })
    }

    /// Lets another model guess where the strategy is [`Strategy::Drafted`]; its tokens must be the same.
    ///
    /// # Errors
    /// [`Error::Usage`] when its vocabulary is of another size; as [`Decoder::new`].
    pub fn with_draft_model(self, draft_model: &'m Transformer) -> Result<Self> {
        let (own, other) = (self.room.vocab_size, draft_model.config().vocab_size);
        if own != other {
            return Err(Error::usage(format!(
                "a model with a vocabulary of {other} tokens cannot guess for one of {own}: both must read the same tokens"
            )));
        }
        let draft_model = Some(forward(draft_model, self.rows, self.room.capacity)?);
        Ok(Decoder { draft_model, ..self })
    }

    /// Answers all requests at once, each row at its own position and finishing on its own. Every prompt is in the cache
    /// before the first token is decoded, so that the two can be timed apart.
    ///
    /// # Errors
    /// [`Error::Usage`] when there are more requests than rows, a prompt and its answer do not fit the model's context or
    /// the cache, or the strategy cannot be done ([`Strategy::check`]); libtorch's errors; interruption.
    pub fn answer(
        &mut self,
        requests: &[Request],
        stop: &StopConditions,
        options: DecodeOptions,
        watcher: Option<Watcher<'_>>,
    ) -> Result<(Vec<Answer>, Timing)> {
        if requests.len() > self.rows {
            return Err(Error::usage(format!("{} requests at once, there is room for {}", requests.len(), self.rows)));
        }
        let mut ignore = |_: usize, _: &[i32]| ();
        let mut answers: Vec<Option<Answer>> = requests.iter().map(|_| None).collect();
        let mut keep = |index: usize, answer: Answer| {
            answers[index] = Some(answer);
            Ok(())
        };
        let mut events = Events { new_tokens: watcher.unwrap_or(&mut ignore), finished: &mut keep };
        let timing = self.run(&mut requests.iter().cloned(), stop, options, Prefill::First, &mut events)?;
        Ok((answers.into_iter().flatten().collect(), timing))
    }

    /// Answers requests as they come: the place of a finished row is taken by the next request at once. `finished` gets the
    /// number of a request and its answer, in the order in which they end.
    ///
    /// # Errors
    /// As [`Decoder::answer`], and what `finished` fails with.
    pub fn stream(
        &mut self,
        requests: &mut dyn Iterator<Item = Request>,
        stop: &StopConditions,
        options: DecodeOptions,
        finished: &mut dyn FnMut(usize, Answer) -> Result<()>,
    ) -> Result<()> {
        let mut ignore = |_: usize, _: &[i32]| ();
        let mut events = Events { new_tokens: &mut ignore, finished };
        self.run(requests, stop, options, Prefill::Beside, &mut events).map(drop)
    }

    fn run(
        &mut self,
        requests: &mut dyn Iterator<Item = Request>,
        stop: &StopConditions,
        options: DecodeOptions,
        prefill: Prefill,
        events: &mut Events<'_>,
    ) -> Result<Timing> {
        options.strategy.check()?;
        let Decoder { model, draft_model, rows, room } = self;
        let mut checked = requests.map(|request| room.check(&request, stop, options).map(|()| request));
        let _no_grad = tch::no_grad_guard();
        let mut drafted;
        let model: &mut dyn Forward = match draft_model {
            _ if !options.strategy.needs_draft_model() => model.as_mut(),
            Some(draft_model) => {
                drafted = Drafted::new(model.as_mut(), draft_model.as_mut());
                &mut drafted
            }
            None => return Err(no_drafter()),
        };
        converge(model, *rows, &mut checked, stop, options, prefill, events)
    }

    /// Answers one request a forward at a time, for those who do something else between two forwards.
    ///
    /// # Errors
    /// As [`Decoder::answer`]; [`Strategy::Drafted`] is refused.
    pub fn start<'d>(
        &'d mut self,
        request: Request,
        stop: &'d StopConditions,
        options: DecodeOptions,
    ) -> Result<RunningAnswer<'d>>
    where
        'm: 'd,
    {
        options.strategy.check()?;
        if options.strategy.needs_draft_model() {
            return Err(no_drafter());
        }
        self.room.check(&request, stop, options)?;
        let mut batch = Batch::new(stop, options, Prefill::First);
        batch.add(0, request);
        Ok(RunningAnswer { model: self.model.as_mut(), batch })
    }
}

fn no_drafter() -> Error {
    Error::usage("strategy drafted needs a model that guesses beside the one that decides")
}

impl Room {
    fn check(&self, request: &Request, stop: &StopConditions, options: DecodeOptions) -> Result<()> {
        check_fits_context(request, stop, self.max_positions)?;
        let (needed, there) = (required_slots(request.prompt_ids.len(), stop, options.strategy), self.capacity);
        if needed > there {
            let sample = &request.sample_id;
            return Err(Error::usage(format!(
                "sample `{sample}` needs {needed} slots of the cache, there are {there}"
            )));
        }
        Ok(())
    }
}

/// An answer that is being decoded ([`Decoder::start`]).
pub struct RunningAnswer<'d> {
    model: &'d mut (dyn Forward + 'd),
    batch: Batch<'d>,
}

impl RunningAnswer<'_> {
    /// Does the next forward and returns the tokens that it made final, none while the prompt is cached; `None` once the answer
    /// has ended.
    ///
    /// # Errors
    /// libtorch's errors; interruption.
    pub fn step(&mut self) -> Result<Option<Vec<i32>>> {
        if self.batch.rows.is_empty() {
            return Ok(None);
        }
        let _no_grad = tch::no_grad_guard();
        let mut found = Vec::new();
        let mut keep = |_: usize, ids: &[i32]| found.extend_from_slice(ids);
        let mut events = Events { new_tokens: &mut keep, finished: &mut |_, _| Ok(()) };
        self.batch.step(self.model, &mut events)?;
        Ok(Some(found))
    }

    /// Seconds so far.
    pub fn timing(&self) -> Timing {
        self.batch.timing
    }
}

/// Slots of the cache that a prompt of so many tokens, its answer and the guesses past its end need.
pub fn required_slots(prompt_tokens: usize, stop: &StopConditions, strategy: Strategy) -> usize {
    prompt_tokens.saturating_add(stop.max_new_tokens).saturating_add(strategy.max_window_tokens())
}

/// Answers all requests as one batch with a decoder of their own; see [`Decoder::answer`].
///
/// # Errors
/// As [`Decoder::new`] and [`Decoder::answer`].
pub fn decode(
    model: &Transformer,
    requests: &[Request],
    stop: &StopConditions,
    options: DecodeOptions,
    watcher: Option<Watcher<'_>>,
) -> Result<(Vec<Answer>, Timing)> {
    for request in requests {
        check_fits_context(request, stop, model.config().max_positions)?;
    }
    let longest = requests.iter().map(|request| request.prompt_ids.len()).max().unwrap_or(0);
    let mut decoder = Decoder::new(model, requests.len(), required_slots(longest, stop, options.strategy))?;
    decoder.answer(requests, stop, options, watcher)
}

/// Checks that a prompt is not empty and fits the model's context with its answer; for those who ask before a long run.
///
/// # Errors
/// [`Error::Usage`] naming the sample.
pub fn check_fits_context(request: &Request, stop: &StopConditions, max_positions: usize) -> Result<()> {
    let prompt = request.prompt_ids.len();
    let new = stop.max_new_tokens;
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

/// What decoding asks of a model. Rows are numbered from 0 without gaps.
trait Forward {
    /// Begins to cache the chunks of prompts and to choose the token that follows each token of each window. The windows are
    /// those of the leading rows, in order, the chunks those of the rows behind them.
    fn begin(&mut self, chunks: &[Chunk<'_>], windows: &[Window<'_>], sampling: Sampling) -> Result<()>;

    /// Waits until that is done, and returns the choices.
    fn finish(&mut self, windows: &[Window<'_>]) -> Result<Vec<Predicted>>;

    /// Copies keys and values between slots; all are read before any is written.
    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<()>;

    /// Copies what is cached of one row over another.
    fn copy_row(&mut self, from: usize, to: usize) -> Result<()>;

    /// Most tokens of prompts that one step should take.
    fn prompt_tokens(&self) -> usize;
}

/// What was chosen after each token of a window.
struct Predicted {
    tokens: Vec<i32>,
    /// What another model chose there, where one guesses.
    drafts: Option<Vec<i32>>,
}

impl Predicted {
    /// From the tokens of all windows, one behind another.
    fn each(windows: &[Window<'_>], mut tokens: &[i32]) -> Vec<Self> {
        let take = |window: &Window<'_>| {
            let (taken, rest) = tokens.split_at(window.len());
            tokens = rest;
            Predicted { tokens: taken.to_vec(), drafts: None }
        };
        windows.iter().map(take).collect()
    }
}

/// Tokens of a prompt to cache.
struct Chunk<'r> {
    row: usize,
    /// Position of the first.
    start: usize,
    tokens: &'r [i32],
}

/// When prompts are cached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prefill {
    /// Before anything is decoded.
    First,
    /// In the steps that decode other rows.
    Beside,
}

/// Whom to tell what.
struct Events<'e> {
    new_tokens: Watcher<'e>,
    finished: &'e mut dyn FnMut(usize, Answer) -> Result<()>,
}

/// A row of the batch: the number of its request, its state, and how many tokens of its prompt are cached.
struct Live<'r> {
    index: usize,
    row: Row<'r>,
    cached: usize,
}

impl Live<'_> {
    /// All but the last token of the prompt is cached: that one begins the first window.
    fn is_ready(&self) -> bool {
        self.cached + 1 == self.row.prompt().len()
    }
}

/// Answers requests, at most so many at once.
fn converge(
    model: &mut dyn Forward,
    most: usize,
    requests: &mut dyn Iterator<Item = Result<Request>>,
    stop: &StopConditions,
    options: DecodeOptions,
    prefill: Prefill,
    events: &mut Events<'_>,
) -> Result<Timing> {
    let mut batch = Batch::new(stop, options, prefill);
    let mut requests = requests.enumerate();
    loop {
        while batch.rows.len() < most {
            let Some((index, request)) = requests.next() else { break };
            batch.add(index, request?);
        }
        if batch.rows.is_empty() {
            return Ok(batch.timing);
        }
        batch.step(model, events)?;
    }
}

/// The rows that are decoded together.
struct Batch<'r> {
    stop: &'r StopConditions,
    options: DecodeOptions,
    prefill: Prefill,
    rows: Vec<Live<'r>>,
    timing: Timing,
}

impl<'r> Batch<'r> {
    fn new(stop: &'r StopConditions, options: DecodeOptions, prefill: Prefill) -> Self {
        Batch { stop, options, prefill, rows: Vec::new(), timing: Timing::default() }
    }

    fn add(&mut self, index: usize, request: Request) {
        self.rows.push(Live { index, row: Row::new(request, self.stop, self.options), cached: 0 });
    }

    /// One forward of the model.
    fn step(&mut self, model: &mut dyn Forward, events: &mut Events<'_>) -> Result<()> {
        interrupt::check()?;
        let started = Instant::now();
        let rows = &mut self.rows;
        let ready = rows.iter().position(|live| !live.is_ready()).unwrap_or(rows.len());
        let chunks = chunks(rows, model.prompt_tokens());
        let decoding = if self.prefill == Prefill::First && !chunks.is_empty() { 0 } else { ready };
        let windows: Vec<_> = rows[..decoding].iter().enumerate().map(|(row, live)| live.row.window(row)).collect();
        model.begin(&chunks, &windows, self.options.sampling)?;
        let predictions = model.finish(&windows)?;
        let taken: Vec<(usize, usize)> = chunks.iter().map(|chunk| (chunk.row, chunk.tokens.len())).collect();
        for (row, tokens) in taken {
            rows[row].cached += tokens;
        }
        let mut moves = Vec::new();
        for (row, (live, predicted)) in rows.iter_mut().zip(&predictions).enumerate() {
            let Predicted { tokens, drafts } = predicted;
            let accepted = live.row.accept(tokens, drafts.as_ref().unwrap_or(tokens));
            moves.extend(accepted.moves.into_iter().map(|(from, to)| SlotMove { row, from, to }));
            (events.new_tokens)(live.index, accepted.tokens);
        }
        if !moves.is_empty() {
            model.move_slots(&moves)?;
        }
        let seconds = started.elapsed().as_secs_f64();
        if predictions.is_empty() {
            self.timing.prefill_seconds += seconds
        } else {
            self.timing.decode_seconds += seconds
        }
        remove_finished(model, rows, events)
    }
}

/// What is to be cached next, as far as `budget` tokens reach.
fn chunks<'r>(rows: &'r [Live<'_>], mut budget: usize) -> Vec<Chunk<'r>> {
    let mut chunks = Vec::new();
    for (row, live) in rows.iter().enumerate().filter(|(_, live)| !live.is_ready()) {
        let open = &live.row.prompt()[live.cached..live.row.prompt().len() - 1];
        let tokens = &open[..open.len().min(budget)];
        budget -= tokens.len();
        if !tokens.is_empty() {
            chunks.push(Chunk { row, start: live.cached, tokens });
        }
    }
    chunks
}

/// Hands out the answers of the rows that have ended; those behind move up, the ready ones first.
fn remove_finished(model: &mut dyn Forward, rows: &mut Vec<Live<'_>>, events: &mut Events<'_>) -> Result<()> {
    let mut row = 0;
    while row < rows.len() {
        if !rows[row].row.finished() {
            row += 1;
            continue;
        }
        // The hole is filled by the last row that decodes, and that one's by the last row of all.
        let ready = rows.iter().rposition(Live::is_ready).unwrap_or(row);
        let last = rows.len() - 1;
        rows.swap(row, ready);
        rows.swap(ready, last);
        if let Some(done) = rows.pop() {
            (events.finished)(done.index, done.row.into_answer())?;
        }
        for (from, to) in [(ready, row), (last, ready)] {
            if from != to {
                model.copy_row(from, to)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
