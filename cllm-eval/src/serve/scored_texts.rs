//! The texts of a lane that are scored. What a client is told about them waits for the scores.

use std::collections::VecDeque;
use std::time::Instant;

use cllm_core::Result;
use cllm_core::model::Transformer;
use cllm_core::program::catch_panics;

use super::api_error::ApiError;
use super::engine::{Client, Event};
use super::scoring::{Scoring, TokenScore};

/// Tokens to read that are worth a forward while more are to come: it takes little longer for so many
/// than for one.
const MIN_GROWN_TOKENS: usize = 32;

/// Texts that are known whole, one after another, and answers that grow, all at the same time. They
/// take turns, so that none of them waits for another to end.
pub(super) struct ScoredTexts<'m> {
    model: &'m Transformer,
    /// Maximum number of tokens that the caches of answers have room for together.
    max_answer_tokens: usize,
    /// Texts known whole, of which one at a time has a cache.
    waiting: VecDeque<(WholeText, Client)>,
    /// Those with a cache; the next turn is that of the first that is not scored.
    open: VecDeque<ScoredText>,
}

/// A text to score that is known whole.
pub(super) struct WholeText {
    pub(super) ids: Vec<i32>,
    /// Index of the first token whose score is asked for.
    pub(super) first_scored: usize,
    /// Number of likeliest tokens to give at each position.
    pub(super) num_top: usize,
}

struct ScoredText {
    scoring: Scoring,
    client: Client,
    /// The index of the request whose answer it ends with, if it grows.
    answer: Option<usize>,
    /// Scores that no event has yet.
    scores: VecDeque<TokenScore>,
    /// Events without their scores, which are told in this order.
    held: VecDeque<Event>,
    is_over: bool,
}

impl<'m> ScoredTexts<'m> {
    pub(super) fn new(model: &'m Transformer, max_answer_tokens: usize) -> Self {
        ScoredTexts { model, max_answer_tokens, waiting: VecDeque::new(), open: VecDeque::new() }
    }

    /// Adds a text that is known whole. Its client is told all scores at once.
    pub(super) fn push(&mut self, text: WholeText, client: Client) {
        self.waiting.push_back((text, client));
    }

    /// Whether there is room for the cache of an answer that has so many tokens with its prompt.
    pub(super) fn has_room_for(&self, num_tokens: usize) -> bool {
        let answers = self.open.iter().filter(|text| text.answer.is_some());
        let num_taken: usize = answers.map(|text| text.scoring.capacity()).sum();
        num_taken + num_tokens <= self.max_answer_tokens
    }

    /// Adds an answer that grows to at most `max_new_tokens` after its prompt. Only its own tokens have
    /// scores, which they are told with.
    ///
    /// # Errors
    /// When memory runs out.
    pub(super) fn push_answer(
        &mut self,
        index: usize,
        prompt_ids: Vec<i32>,
        max_new_tokens: usize,
        num_top: usize,
        client: Client,
    ) -> Result<()> {
        let first_scored = prompt_ids.len();
        let scoring = Scoring::new(self.model, prompt_ids, max_new_tokens, first_scored, num_top)?;
        self.open.push_back(ScoredText { answer: Some(index), ..ScoredText::new(scoring, client) });
        Ok(())
    }

    /// Tells the client of an answer what became of it, as soon as its tokens are scored; at once if
    /// they are not to be.
    pub(super) fn tell(&mut self, index: usize, client: &Client, event: Event) {
        let Some(text) = self.open.iter_mut().find(|text| text.answer == Some(index)) else {
            return client.tell(event);
        };
        if let Event::Tokens { ids, .. } = &event {
            text.scoring.push(ids);
        }
        text.held.push_back(event);
        text.tell_scored();
        // Its place among the others stays, or a text that grows all the time would never have a turn.
        self.open.retain(|text| !text.is_over);
    }

    pub(super) fn has_work(&self) -> bool {
        !self.waiting.is_empty() || self.open.iter().any(ScoredText::is_due)
    }

    /// Reads a piece of one text. If that fails, for lack of memory for instance, the client is told,
    /// the text is dropped, and the index of the answer that it ends with is returned.
    pub(super) fn turn(&mut self) -> Option<usize> {
        if self.open.iter().all(|text| text.answer.is_some())
            && let Some((text, client)) = self.waiting.pop_front()
        {
            match Scoring::new(self.model, text.ids, 0, text.first_scored, text.num_top) {
                Ok(scoring) => {
                    let held = VecDeque::from([Event::Scored(Vec::new())]);
                    self.keep(ScoredText { held, ..ScoredText::new(scoring, client) });
                }
                Err(error) => client.tell(Event::Failed(ApiError::no_logprobs(&error))),
            }
        }
        let next = self.open.iter().position(ScoredText::is_due);
        let mut text = next.and_then(|next| self.open.remove(next))?;
        match catch_panics(|| text.scoring.step(self.model)) {
            Ok(scores) => {
                text.scores.extend(scores);
                self.keep(text);
                None
            }
            Err(error) => {
                text.client.tell(Event::Failed(ApiError::no_logprobs(&error)));
                text.answer
            }
        }
    }

    /// Drops the texts that nobody waits for any more, or whose time is up.
    pub(super) fn drop_abandoned(&mut self, now: Instant) {
        self.waiting.retain(|(.., client)| client.waits(now));
        self.open.retain(|text| text.client.waits(now));
    }

    pub(super) fn drain_clients(&mut self) -> impl Iterator<Item = Client> {
        let waiting = self.waiting.drain(..).map(|(.., client)| client);
        waiting.chain(self.open.drain(..).map(|text| text.client))
    }

    /// Tells what is scored, and keeps a text that is not over yet, behind all others.
    fn keep(&mut self, mut text: ScoredText) {
        text.tell_scored();
        if !text.is_over {
            self.open.push_back(text);
        }
    }
}

impl ScoredText {
    fn new(scoring: Scoring, client: Client) -> Self {
        let (scores, held) = (VecDeque::new(), VecDeque::new());
        ScoredText { scoring, client, answer: None, scores, held, is_over: false }
    }

    /// Whether to read it now: there is enough to read, or nothing more to come.
    fn is_due(&self) -> bool {
        let has_ended = self.answer.is_none() || matches!(self.held.back(), Some(Event::Finished(_)));
        self.scoring.num_unread() >= if has_ended { 1 } else { MIN_GROWN_TOKENS }
    }

    fn tell_scored(&mut self) {
        while let Some(mut event) = self.held.pop_front() {
            match &mut event {
                Event::Tokens { ids, scores, .. } if ids.len() <= self.scores.len() => {
                    scores.extend(self.scores.drain(..ids.len()));
                }
                Event::Scored(scores) if self.scoring.is_scored() => {
                    scores.extend(self.scores.drain(..));
                    self.is_over = true;
                }
                Event::Tokens { .. } | Event::Scored(_) => {
                    self.held.push_front(event);
                    return;
                }
                Event::Started { .. } => {}
                Event::Finished(_) | Event::Failed(_) => self.is_over = true,
            }
            self.client.tell(event);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use axum::http::StatusCode;
    use cllm_core::model::ModelConfig;
    use cllm_core::trajectory::FinishReason;
    use tch::{Device, Kind};
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    fn client() -> (Client, UnboundedReceiver<Event>) {
        let (events, receiver) = unbounded_channel();
        let received = Instant::now();
        (Client { events, received, deadline: received + Duration::from_secs(600) }, receiver)
    }

    fn model() -> Transformer {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "tie_word_embeddings": false,
        });
        Transformer::random(ModelConfig::from_json(&config).unwrap(), 3, Device::Cpu, Kind::Float)
    }

    fn tokens(number: usize) -> Event {
        Event::Tokens { ids: vec![7; number], seconds: 0.0, scores: Vec::new() }
    }

    fn num_scored(receiver: &mut UnboundedReceiver<Event>) -> usize {
        let mut number = 0;
        while let Ok(event) = receiver.try_recv() {
            let Event::Tokens { ids, scores, .. } = event else { panic!("no tokens") };
            assert_eq!(ids.len(), scores.len());
            number += ids.len();
        }
        number
    }

    #[test]
    fn answers_that_grow_all_the_time_take_turns_with_each_other_and_with_whole_texts() {
        let model = model();
        let mut texts = ScoredTexts::new(&model, 2000);
        let (mut clients, mut receivers): (Vec<_>, Vec<_>) = (0..4).map(|_| client()).unzip();
        for (index, client) in clients.iter().take(3).enumerate() {
            texts.push_answer(index, vec![1, 2, 3], 400, 1, client.clone()).unwrap();
        }
        let whole = WholeText { ids: (0..40).collect(), first_scored: 30, num_top: 1 };
        texts.push(whole, clients.pop().unwrap());
        for _ in 0..20 {
            for (index, client) in clients.iter().enumerate() {
                texts.tell(index, client, tokens(20));
            }
            assert_eq!(texts.turn(), None);
        }
        let whole = receivers.pop().unwrap().try_recv();
        assert!(matches!(whole, Ok(Event::Scored(scores)) if scores.len() == 10));
        // What came after the last turn of a text is not scored.
        for mut receiver in receivers {
            assert!(num_scored(&mut receiver) >= 20 * 16);
        }
    }

    #[test]
    fn a_growing_answer_is_read_when_that_pays_and_at_its_end() {
        let model = model();
        let mut texts = ScoredTexts::new(&model, 100);
        let (client, mut receiver) = client();
        texts.push_answer(0, vec![1, 2, 3], 90, 1, client.clone()).unwrap();
        // The last token is not read: it predicts nothing that is asked for.
        texts.tell(0, &client, tokens(29));
        assert!(!texts.has_work() && texts.turn().is_none());
        assert_eq!(num_scored(&mut receiver), 0);
        texts.tell(0, &client, tokens(1));
        assert!(texts.has_work() && texts.turn().is_none());
        assert_eq!(num_scored(&mut receiver), 30);
        texts.tell(0, &client, tokens(5));
        assert!(!texts.has_work());
        texts.tell(0, &client, Event::Finished(FinishReason::Eos));
        assert!(texts.has_work() && texts.turn().is_none() && !texts.has_work());
        assert!(matches!(receiver.try_recv(), Ok(Event::Tokens { scores, .. }) if scores.len() == 5));
        assert!(matches!(receiver.try_recv(), Ok(Event::Finished(FinishReason::Eos))));
        assert!(texts.has_room_for(100));
    }

    #[test]
    fn a_text_that_cannot_be_read_fails_alone() {
        let model = model();
        let mut texts = ScoredTexts::new(&model, 100);
        let (clients, mut receivers): (Vec<_>, Vec<_>) = (0..3).map(|_| client()).unzip();
        let is_unavailable =
            |event| matches!(event, Ok(Event::Failed(error)) if error.status == StatusCode::SERVICE_UNAVAILABLE);
        // The model has no such token, which libtorch notices in the forward.
        texts.push(WholeText { ids: vec![1, 999, 2], first_scored: 1, num_top: 0 }, clients[0].clone());
        texts.push_answer(4, vec![999; 40], 8, 0, clients[1].clone()).unwrap();
        texts.push(WholeText { ids: vec![1, 2, 3], first_scored: 1, num_top: 0 }, clients[2].clone());
        let mut failed = Vec::new();
        while texts.has_work() {
            failed.extend(texts.turn());
        }
        assert_eq!(failed, [4]);
        assert!(is_unavailable(receivers[0].try_recv()) && is_unavailable(receivers[1].try_recv()));
        assert!(matches!(receivers[2].try_recv(), Ok(Event::Scored(scores)) if scores.len() == 2));
        assert!(texts.has_room_for(100));
    }
}
