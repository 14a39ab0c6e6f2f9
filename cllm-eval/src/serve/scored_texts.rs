//! The texts of a lane that are scored. What a client is told about them waits for the scores.

use std::collections::VecDeque;
use std::time::Instant;

use cllm_core::Result;
use cllm_core::model::Transformer;

use super::api_error::ApiError;
use super::engine::{Client, Event};
use super::scoring::{Scoring, TokenScore};

/// Texts that are known whole, one after another, and answers that grow, all at the same time. They
/// take turns, so that none of them waits for another to end.
pub(super) struct ScoredTexts<'m> {
    model: &'m Transformer,
    /// Texts known whole: token ids, and the number of likeliest tokens to give at each position.
    waiting: VecDeque<(Vec<i32>, usize, Client)>,
    /// Those with a cache; the next turn is that of the first that is not scored.
    open: VecDeque<ScoredText>,
}

struct ScoredText {
    scoring: Scoring,
    client: Client,
    /// The index of the request whose answer it ends with, if it grows.
    answer: Option<usize>,
    /// Number of scores to come that nobody asked for.
    num_unwanted: usize,
    /// Scores that no event has yet.
    scores: VecDeque<TokenScore>,
    /// Events without their scores, which are told in this order.
    held: VecDeque<Event>,
    is_over: bool,
}

impl<'m> ScoredTexts<'m> {
    pub(super) fn new(model: &'m Transformer) -> Self {
        ScoredTexts { model, waiting: VecDeque::new(), open: VecDeque::new() }
    }

    /// Adds a text that is known whole. Its client is told all scores at once.
    pub(super) fn push(&mut self, ids: Vec<i32>, num_top: usize, client: Client) {
        self.waiting.push_back((ids, num_top, client));
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
        let num_unwanted = prompt_ids.len() - 1;
        let scoring = Scoring::new(self.model, prompt_ids, max_new_tokens, num_top)?;
        self.open.push_back(ScoredText { answer: Some(index), num_unwanted, ..ScoredText::new(scoring, client) });
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
        !self.waiting.is_empty() || self.open.iter().any(|text| !text.scoring.is_scored())
    }

    /// Reads a piece of one text.
    ///
    /// # Errors
    /// libtorch's.
    pub(super) fn turn(&mut self) -> Result<()> {
        if self.open.iter().all(|text| text.answer.is_some())
            && let Some((ids, num_top, client)) = self.waiting.pop_front()
        {
            match Scoring::new(self.model, ids, 0, num_top) {
                Ok(scoring) => {
                    let held = VecDeque::from([Event::Scored(Vec::new())]);
                    self.keep(ScoredText { held, ..ScoredText::new(scoring, client) });
                }
                Err(error) => client.tell(Event::Failed(ApiError::no_memory_for_logprobs(&error))),
            }
        }
        let next = self.open.iter().position(|text| !text.scoring.is_scored());
        let Some(mut text) = next.and_then(|next| self.open.remove(next)) else { return Ok(()) };
        text.scores.extend(text.scoring.step(self.model)?);
        let num_unwanted = text.num_unwanted.min(text.scores.len());
        text.scores.drain(..num_unwanted);
        text.num_unwanted -= num_unwanted;
        self.keep(text);
        Ok(())
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
        ScoredText { scoring, client, answer: None, num_unwanted: 0, scores, held, is_over: false }
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

    use cllm_core::model::ModelConfig;
    use tch::{Device, Kind};
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    fn client() -> (Client, UnboundedReceiver<Event>) {
        let (events, receiver) = unbounded_channel();
        let received = Instant::now();
        (Client { events, received, deadline: received + Duration::from_secs(600) }, receiver)
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
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "tie_word_embeddings": false,
        });
        let model = Transformer::random(ModelConfig::from_json(&config).unwrap(), 3, Device::Cpu, Kind::Float);
        let mut texts = ScoredTexts::new(&model);
        let (mut clients, mut receivers): (Vec<_>, Vec<_>) = (0..4).map(|_| client()).unzip();
        for (index, client) in clients.iter().take(3).enumerate() {
            texts.push_answer(index, vec![1, 2, 3], 60, 1, client.clone()).unwrap();
        }
        texts.push((0..40).collect(), 1, clients.pop().unwrap());
        for round in 0..20 {
            for (index, client) in clients.iter().enumerate() {
                texts.tell(index, client, Event::Tokens { ids: vec![round, 7], seconds: 0.0, scores: Vec::new() });
            }
            texts.turn().unwrap();
        }
        let whole = receivers.pop().unwrap().try_recv();
        assert!(matches!(whole, Ok(Event::Scored(scores)) if scores.len() == 39));
        // What came after the last turn of a text is not scored.
        for mut receiver in receivers {
            assert!(num_scored(&mut receiver) >= 2 * 16);
        }
    }
}
