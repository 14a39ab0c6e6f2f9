//! Answers to a request: asked of the engine, and taken from it as they grow or as a whole.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_stream::try_stream;
use cllm_core::decode::{LiveRequest, Request, Sampling, StopConditions};
use cllm_core::trajectory::FinishReason;
use futures_util::{Stream, StreamExt};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::api_error::ApiError;
use super::app::App;
use super::engine::{Client, Event, Job, Work};
use super::models::{EncodedPrompt, ServedModel};
use super::requests::Ask;
use super::scored_texts::WholeText;
use super::scoring::TokenScore;
use super::text::{Added, AnswerText, prompt_offsets};

/// A request whose prompts are encoded and whose answers have room.
pub(super) struct Order {
    pub(super) app: Arc<App>,
    pub(super) model: Arc<ServedModel>,
    pub(super) prompts: Vec<EncodedPrompt>,
    /// Of the answers to each prompt.
    stops: Vec<StopConditions>,
    /// Answers to each prompt.
    n: usize,
    stop_texts: Arc<Vec<String>>,
    sampling: Sampling,
    seed: u64,
    received: Instant,
    _room: OwnedSemaphorePermit,
}

/// One of the answers to a request.
pub(super) struct Choice {
    /// Its number in the response.
    pub(super) index: usize,
    prompt: usize,
    events: UnboundedReceiver<Event>,
}

/// What becomes of a choice.
pub(super) enum Piece {
    /// It is decoded now.
    Started {
        num_cached: usize,
    },
    /// A forward added tokens. The forwards of its model have taken so long since its first one.
    Tokens {
        ids: Vec<i32>,
        text: String,
        /// Where each token begins in the answer, in characters.
        offsets: Vec<usize>,
        seconds: f64,
        /// Of each token, if they were asked for.
        scores: Vec<TokenScore>,
    },
    End {
        text: String,
        reason: &'static str,
    },
}

/// A choice that has ended.
#[derive(Default)]
pub(super) struct WholeAnswer {
    pub(super) index: usize,
    /// The index of its prompt.
    pub(super) prompt: usize,
    pub(super) ids: Vec<i32>,
    pub(super) text: String,
    /// Where each of its tokens begins in its text, in characters.
    pub(super) offsets: Vec<usize>,
    pub(super) reason: &'static str,
    pub(super) num_forwards: usize,
    pub(super) num_cached: usize,
    /// Of each of its tokens, if they were asked for; with `echo`, of those of the prompt but the first
    /// too.
    pub(super) scores: Option<Vec<TokenScore>>,
}

impl Order {
    /// Encodes the prompts of a request, and checks that they fit.
    ///
    /// # Errors
    /// What is wrong with the request, or that the queue is full.
    pub(super) fn new(app: Arc<App>, model: Arc<ServedModel>, ask: Ask) -> Result<Self, ApiError> {
        let param = if ask.prompts.is_chat() { "messages" } else { "prompt" };
        let (n, sampling) = (ask.n, ask.sampling(app.settings.temperature));
        let prompts = model.encode(ask.prompts)?;
        let default = app.settings.max_new_tokens;
        let stop = |prompt: &EncodedPrompt| {
            let max_new_tokens = model.max_new_tokens(&prompt.ids, ask.max_tokens, default, param);
            max_new_tokens.map(|max_new_tokens| model.stop_conditions(max_new_tokens))
        };
        let stops = prompts.iter().map(stop).collect::<Result<_, _>>()?;
        let room = model.reserve(n * prompts.len())?;
        // Greedy answers do not depend on it but for the number of their forwards.
        let seed = ask.seed.unwrap_or_else(|| if sampling.is_greedy() { 0 } else { rand::random() });
        let stop_texts = Arc::new(ask.stops);
        let received = Instant::now();
        Ok(Order { app, model, prompts, stops, n, stop_texts, sampling, seed, received, _room: room })
    }

    pub(super) fn num_choices(&self) -> usize {
        self.n * self.prompts.len()
    }

    /// Asks the engine for all answers, and for the scores of their tokens with so many of the likeliest
    /// tokens beside each.
    pub(super) fn submit(&self, num_top: Option<usize>) -> Vec<Choice> {
        (0..self.num_choices()).map(|index| self.submit_choice(index, num_top)).collect()
    }

    fn submit_choice(&self, index: usize, num_top: Option<usize>) -> Choice {
        let prompt = index / self.n;
        // Answers to the same prompt differ by their number.
        let request = Request { sample_id: (index % self.n).to_string(), prompt_ids: self.prompts[prompt].ids.clone() };
        let stop = self.stops[prompt].clone();
        let (sampling, seed) = (self.sampling, self.seed);
        let request = LiveRequest { request, stop, sampling, seed };
        Choice { index, prompt, events: self.ask(Work::Decode { request, num_top }) }
    }

    fn ask(&self, work: Work) -> UnboundedReceiver<Event> {
        let (events, receiver) = unbounded_channel();
        let deadline = self.received + Duration::from_secs(self.app.settings.timeout_seconds);
        let client = Client { events, received: self.received, deadline };
        // Without an engine nobody sends events, which the receiver notices.
        let _ = self.app.jobs.send(Job { lane: self.model.lane, work, client });
        receiver
    }

    /// The pieces of a choice, as they come. Dropping the stream ends the answer.
    pub(super) fn pieces(&self, mut choice: Choice) -> impl Stream<Item = Result<Piece, ApiError>> + Send + use<> {
        let (model, stop_texts) = (Arc::clone(&self.model), Arc::clone(&self.stop_texts));
        let prompt_ids = self.prompts[choice.prompt].ids.clone();
        try_stream! {
            let mut text = AnswerText::new(&model.tokenizer, &prompt_ids, &stop_texts).map_err(undecodable)?;
            while let Some(event) = choice.events.recv().await {
                match event {
                    Event::Started { num_cached } => yield Piece::Started { num_cached },
                    Event::Tokens { mut ids, seconds, mut scores } => {
                        let Added { text, offsets, is_stopped } = text.push(&ids).map_err(undecodable)?;
                        ids.truncate(offsets.len());
                        scores.truncate(offsets.len());
                        yield Piece::Tokens { ids, text, offsets, seconds, scores };
                        if is_stopped {
                            yield Piece::End { text: String::new(), reason: "stop" };
                            return;
                        }
                    }
                    Event::Finished(reason) => {
                        let reason = if reason == FinishReason::Eos { "stop" } else { "length" };
                        yield Piece::End { text: text.finish().map_err(undecodable)?, reason };
                        return;
                    }
                    Event::Failed(error) => Err(error)?,
                    Event::Scored(_) => {}
                }
            }
            Err(ApiError::engine())?;
        }
    }

    /// Waits for the end of a choice.
    ///
    /// # Errors
    /// Why it has no end.
    pub(super) async fn whole(&self, choice: Choice) -> Result<WholeAnswer, ApiError> {
        let mut answer = WholeAnswer { index: choice.index, prompt: choice.prompt, ..WholeAnswer::default() };
        let mut pieces = std::pin::pin!(self.pieces(choice));
        while let Some(piece) = pieces.next().await {
            match piece? {
                Piece::Started { num_cached } => answer.num_cached = num_cached,
                Piece::Tokens { ids, text, offsets, .. } => {
                    answer.ids.extend(ids);
                    answer.text.push_str(&text);
                    answer.offsets.extend(offsets);
                    answer.num_forwards += 1;
                }
                Piece::End { text, reason } => {
                    answer.text.push_str(&text);
                    answer.reason = reason;
                }
            }
        }
        Ok(answer)
    }

    /// The log-probabilities of all tokens of an answer; with `echo`, of those of its prompt but the
    /// first too.
    ///
    /// # Errors
    /// Why there are none.
    pub(super) async fn score(
        &self,
        answer: &WholeAnswer,
        echo: bool,
        num_top: usize,
    ) -> Result<Vec<TokenScore>, ApiError> {
        let prompt_ids = &self.prompts[answer.prompt].ids;
        let first_scored = if echo { 1 } else { prompt_ids.len() };
        let ids = [&prompt_ids[..], &answer.ids].concat();
        let mut events = self.ask(Work::Score(WholeText { ids, first_scored, num_top }));
        match events.recv().await {
            Some(Event::Scored(scores)) => Ok(scores),
            Some(Event::Failed(error)) => Err(error),
            _ => Err(ApiError::engine()),
        }
    }

    /// Counts the offsets of an answer from the beginning of its prompt, whose tokens get offsets too.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub(super) fn add_prompt_offsets(&self, answer: &mut WholeAnswer) -> Result<(), ApiError> {
        let EncodedPrompt { text, ids } = &self.prompts[answer.prompt];
        let of_prompt = prompt_offsets(&self.model.tokenizer, text, ids).map_err(undecodable)?;
        let num_chars = text.chars().count();
        let of_answer = answer.offsets.iter().map(|offset| num_chars + offset);
        answer.offsets = of_prompt.into_iter().chain(of_answer).collect();
        Ok(())
    }

    /// Answers that are their prompts alone.
    pub(super) fn empty_answers(&self) -> Vec<WholeAnswer> {
        let answer = |index| WholeAnswer { index, prompt: index / self.n, reason: "length", ..WholeAnswer::default() };
        (0..self.num_choices()).map(answer).collect()
    }
}

fn undecodable(error: cllm_core::Error) -> ApiError {
    ApiError::new(axum::http::StatusCode::INTERNAL_SERVER_ERROR, error.to_string())
}
