//! The engine: a thread that decodes the answers of all models. Each model has a lane, with a batch
//! of its own; while several have work, the one whose forwards have taken the least time is next.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use axum::http::StatusCode;
use cllm_core::decode::{Answer, Decoder, LiveBatch, LiveRequest, LiveRows, StopConditions, Strategy, required_slots};
use cllm_core::model::Transformer;
use cllm_core::trajectory::FinishReason;
use cllm_core::{Error, Result};
use tokio::sync::mpsc::UnboundedSender;

use super::api_error::ApiError;
use super::metrics::{Metrics, of_model};
use super::scored_texts::{ScoredTexts, WholeText};
use super::scoring::TokenScore;

/// Something for the engine to do, and whom to tell.
pub(super) struct Job {
    /// Index of the model.
    pub(super) lane: usize,
    pub(super) work: Work,
    pub(super) client: Client,
}

/// Whom to tell what becomes of a job.
#[derive(Clone)]
pub(super) struct Client {
    pub(super) events: UnboundedSender<Event>,
    pub(super) received: Instant,
    pub(super) deadline: Instant,
}

impl Client {
    pub(super) fn tell(&self, event: Event) {
        // One that has gone is noticed before the next forward.
        let _ = self.events.send(event);
    }

    /// Whether it is there, and its time is not up, which it is told otherwise.
    pub(super) fn waits(&self, now: Instant) -> bool {
        if now > self.deadline {
            self.tell(Event::Failed(ApiError::timeout()));
        }
        now <= self.deadline && !self.events.is_closed()
    }
}

pub(super) enum Work {
    Decode {
        request: LiveRequest,
        /// The number of likeliest tokens to give beside each token, if tokens are to have scores.
        num_top: Option<usize>,
    },
    Score(WholeText),
}

/// What became of a job so far.
pub(super) enum Event {
    /// Its sequence runs, with so many tokens of its prompt from the prefix cache.
    Started {
        num_cached: usize,
    },
    /// A forward accepted these tokens; the forwards of the lane have taken so long since the first
    /// that decoded this sequence began.
    Tokens {
        ids: Vec<i32>,
        seconds: f64,
        /// Of each token, if they were asked for.
        scores: Vec<TokenScore>,
    },
    Finished(FinishReason),
    /// For each token from the first whose score was asked for.
    Scored(Vec<TokenScore>),
    Failed(ApiError),
}

/// What a lane is made of.
pub(super) struct LaneModel<'m> {
    pub(super) id: String,
    pub(super) model: &'m Transformer,
    pub(super) draft_model: Option<&'m Transformer>,
    pub(super) strategy: Strategy,
    pub(super) rows: LiveRows,
    /// Maximum number of tokens of a prompt with its answer.
    pub(super) context: usize,
}

impl<'m> LaneModel<'m> {
    /// # Errors
    /// libtorch's, if the cache does not fit the device.
    pub(super) fn decoder(&self) -> Result<Decoder<'m>> {
        let stop = StopConditions::new(0, Vec::new());
        let slots = required_slots(self.context, &stop, self.strategy);
        let decoder = Decoder::new(self.model, self.rows.num_rows(), slots)?;
        match self.draft_model {
            Some(draft_model) => decoder.with_draft_model(draft_model),
            None => Ok(decoder),
        }
    }

    /// Maximum number of tokens that the caches of answers with scores have room for together: a
    /// quarter of those of the batch, rounded up to whole contexts.
    fn max_scored_tokens(&self) -> usize {
        self.context * self.rows.max_running.div_ceil(4)
    }
}

/// Decoding has so many times the time of scoring while there are answers to decode.
const DECODING_TO_SCORING: f64 = 2.0;

/// Keeps scoring from slowing down the answers that need no scores.
#[derive(Default)]
struct Pace {
    /// Time that decoding is to have before a text is read again.
    owed_seconds: f64,
}

impl Pace {
    fn decoded(&mut self, seconds: f64) {
        // What decoding had before gives scoring no right to more of it later.
        self.owed_seconds = (self.owed_seconds - seconds).max(0.0);
    }

    fn scored(&mut self, seconds: f64) {
        self.owed_seconds += DECODING_TO_SCORING * seconds;
    }

    fn lets_score(&self) -> bool {
        self.owed_seconds == 0.0
    }
}

/// Runs until all senders of jobs are gone, or `abort` is set; then the jobs that are left fail with
/// the reason.
///
/// # Errors
/// When decoding fails.
pub(super) fn run(
    models: &[LaneModel<'_>],
    decoders: &mut [Decoder<'_>],
    jobs: &Receiver<Job>,
    abort: &AtomicBool,
    metrics: &Metrics,
) -> Result<()> {
    let lanes = models.iter().zip(decoders).map(|(model, decoder)| Lane::new(model, decoder, metrics));
    let mut lanes = lanes.collect::<Result<Vec<_>>>()?;
    loop {
        if abort.load(Ordering::Relaxed) {
            lanes.iter_mut().for_each(|lane| lane.fail_all(&ApiError::stopping()));
            jobs.try_iter().for_each(|job| job.client.tell(Event::Failed(ApiError::stopping())));
            return Ok(());
        }
        let is_idle = lanes.iter().all(|lane| !lane.has_work());
        // Without work there is nothing to do but to wait.
        let mut next = if is_idle { jobs.recv().map_err(|_| TryRecvError::Disconnected) } else { jobs.try_recv() };
        let start = lanes.iter().filter(|lane| lane.has_work()).map(|lane| lane.seconds).reduce(f64::min);
        while let Ok(job) = next {
            let lane = &mut lanes[job.lane];
            if !lane.has_work() {
                // Time without work gives no right to more of it now.
                lane.seconds = lane.seconds.max(start.unwrap_or(0.0));
            }
            lane.push(job);
            next = jobs.try_recv();
        }
        if is_idle && lanes.iter().all(|lane| !lane.has_work()) {
            return Ok(());
        }
        let busy = lanes.iter_mut().filter(|lane| lane.has_work());
        if let Some(lane) = busy.min_by(|one, other| one.seconds.total_cmp(&other.seconds)) {
            lane.turn()?;
        }
    }
}

/// The jobs of one model.
struct Lane<'d> {
    batch: LiveBatch<'d>,
    /// To decode.
    waiting: VecDeque<(LiveRequest, Option<usize>, Client)>,
    /// By the index of the request in the batch.
    running: HashMap<usize, Running>,
    num_started: usize,
    texts: ScoredTexts<'d>,
    pace: Pace,
    /// Time that its turns have taken.
    seconds: f64,
    labels: Vec<(&'static str, String)>,
    metrics: &'d Metrics,
}

struct Running {
    client: Client,
    /// When its first tokens came, and the time of the lane's forwards before these.
    first_tokens: Option<(Instant, f64)>,
    num_tokens: usize,
    num_forwards: usize,
}

impl<'d> Lane<'d> {
    fn new(model: &'d LaneModel<'d>, decoder: &'d mut Decoder<'_>, metrics: &'d Metrics) -> Result<Self> {
        Ok(Lane {
            batch: decoder.go_live(model.strategy, model.rows)?,
            waiting: VecDeque::new(),
            running: HashMap::new(),
            num_started: 0,
            texts: ScoredTexts::new(model.model, model.max_scored_tokens()),
            pace: Pace::default(),
            seconds: 0.0,
            labels: of_model(&model.id),
            metrics,
        })
    }

    fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty() || self.texts.has_work()
    }

    fn push(&mut self, Job { work, client, .. }: Job) {
        match work {
            Work::Decode { request, num_top } => self.waiting.push_back((request, num_top, client)),
            Work::Score(text) => self.texts.push(text, client),
        }
    }

    /// Runs one forward, and reads a piece of one text that is to be scored if it is time for that.
    fn turn(&mut self) -> Result<()> {
        let started = Instant::now();
        self.drop_abandoned()?;
        self.admit()?;
        let step_started = Instant::now();
        self.step()?;
        self.pace.decoded(step_started.elapsed().as_secs_f64());
        if self.running.is_empty() || self.pace.lets_score() {
            self.score()?;
        }
        self.seconds += started.elapsed().as_secs_f64();
        self.metrics.waiting.get_or_create(&self.labels).set(self.waiting.len() as i64);
        self.metrics.running.get_or_create(&self.labels).set(self.running.len() as i64);
        self.metrics.prefix_use.get_or_create(&self.labels).set(self.batch.prefix_use_ratio());
        Ok(())
    }

    /// Drops the jobs that nobody waits for any more, or whose time is up.
    fn drop_abandoned(&mut self) -> Result<()> {
        let now = Instant::now();
        self.waiting.retain(|(.., client)| client.waits(now));
        let left = self.running.iter().filter(|(_, one)| !one.client.waits(now)).map(|(&index, _)| index);
        for index in left.collect::<Vec<usize>>() {
            self.running.remove(&index);
            self.batch.leave(index)?;
        }
        // After those that run: no text is left whose answer is gone.
        self.texts.drop_abandoned(now);
        Ok(())
    }

    fn admit(&mut self) -> Result<()> {
        while self.batch.has_room() {
            let Some((request, num_top, client)) = self.next_waiting().and_then(|next| self.waiting.remove(next))
            else {
                break;
            };
            self.start(request, num_top, client)?;
        }
        Ok(())
    }

    /// The first that waits. One for whose scores there is no memory yet holds up only those that ask
    /// for scores too.
    fn next_waiting(&self) -> Option<usize> {
        let first = |is_scored: bool| self.waiting.iter().position(|(_, num_top, _)| num_top.is_some() == is_scored);
        let has_room = |&index: &usize| {
            let (LiveRequest { request, stop, .. }, ..) = &self.waiting[index];
            self.texts.has_room_for(request.prompt_ids.len() + stop.max_new_tokens)
        };
        first(true).filter(has_room).into_iter().chain(first(false)).min()
    }

    fn start(&mut self, request: LiveRequest, num_top: Option<usize>, client: Client) -> Result<()> {
        let num_prompt_tokens = request.request.prompt_ids.len();
        if let Some(num_top) = num_top {
            let (prompt_ids, max_new_tokens) = (request.request.prompt_ids.clone(), request.stop.max_new_tokens);
            let pushed = self.texts.push_answer(self.num_started, prompt_ids, max_new_tokens, num_top, client.clone());
            if let Err(error) = pushed {
                client.tell(Event::Failed(ApiError::no_logprobs(&error)));
                return Ok(());
            }
        }
        match self.batch.join(request) {
            Ok(num_cached) => {
                self.metrics.prompt_tokens.get_or_create(&self.labels).inc_by(num_prompt_tokens as u64);
                self.metrics.cached_prompt_tokens.get_or_create(&self.labels).inc_by(num_cached as u64);
                self.texts.tell(self.num_started, &client, Event::Started { num_cached });
                let running = Running { client, first_tokens: None, num_tokens: 0, num_forwards: 0 };
                self.running.insert(self.num_started, running);
                self.num_started += 1;
            }
            Err(Error::Usage(message)) => {
                let error = ApiError::new(StatusCode::BAD_REQUEST, message);
                self.texts.tell(self.num_started, &client, Event::Failed(error));
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        let (seconds_before, started) = (self.batch.timing().decode_seconds, Instant::now());
        let Lane { batch, running, texts, metrics, labels, .. } = self;
        let mut accepted: Vec<(usize, Vec<i32>)> = Vec::new();
        let mut finished = Vec::new();
        let mut on_finished = |index, answer: Answer| {
            finished.push((index, answer.finish_reason));
            Ok(())
        };
        batch.step(&mut |index, ids| accepted.push((index, ids.to_vec())), &mut on_finished)?;
        let seconds = batch.timing().decode_seconds;
        for (index, ids) in accepted {
            let Some(one) = running.get_mut(&index) else { continue };
            metrics.tokens.get_or_create(labels).inc_by(ids.len() as u64);
            metrics.forwards.get_or_create(labels).inc();
            one.num_tokens += ids.len();
            one.num_forwards += 1;
            let (_, start) = *one.first_tokens.get_or_insert_with(|| {
                metrics.observe_first_token(labels, one.client.received.elapsed());
                (started, seconds_before)
            });
            texts.tell(index, &one.client, Event::Tokens { ids, seconds: seconds - start, scores: Vec::new() });
        }
        for (index, reason) in finished {
            let Some(one) = running.remove(&index) else { continue };
            let time = one.first_tokens.map(|(at, _)| at.elapsed()).unwrap_or_default();
            metrics.observe_answer(labels, one.num_tokens, one.num_forwards, time);
            texts.tell(index, &one.client, Event::Finished(reason));
        }
        Ok(())
    }

    fn score(&mut self) -> Result<()> {
        let started = Instant::now();
        let failed = self.texts.turn();
        self.pace.scored(started.elapsed().as_secs_f64());
        if let Some(index) = failed
            && self.running.remove(&index).is_some()
        {
            self.batch.leave(index)?;
        }
        Ok(())
    }

    fn fail_all(&mut self, error: &ApiError) {
        let waiting = self.waiting.drain(..).map(|(.., client)| client);
        let running = self.running.drain().map(|(_, one)| one.client);
        let clients = waiting.chain(self.texts.drain_clients()).chain(running);
        clients.for_each(|client| client.tell(Event::Failed(error.clone())));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use cllm_core::decode::{Request, Sampling};
    use cllm_core::model::ModelConfig;
    use tch::{Device, Kind};
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    use super::*;

    const CONTEXT: usize = 96;

    /// Runs `body` with a lane of a random model that decodes up to four answers at once.
    fn with_lane(body: impl FnOnce(&mut Lane<'_>)) {
        let config = serde_json::json!({
            "model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "tie_word_embeddings": false,
        });
        let model = Transformer::random(ModelConfig::from_json(&config).unwrap(), 3, Device::Cpu, Kind::Float);
        let rows = LiveRows { max_running: 4, num_prefix_rows: 1 };
        let (id, strategy) = ("model".to_owned(), Strategy::Ar);
        let model = LaneModel { id, model: &model, draft_model: None, strategy, rows, context: CONTEXT };
        let mut decoder = model.decoder().unwrap();
        body(&mut Lane::new(&model, &mut decoder, &Metrics::new()).unwrap());
    }

    /// Asks for an answer.
    fn ask(lane: &mut Lane<'_>, max_new_tokens: usize, num_top: Option<usize>) -> UnboundedReceiver<Event> {
        let request = LiveRequest {
            request: Request { sample_id: "0".to_owned(), prompt_ids: vec![1, 2, 3, 4] },
            stop: StopConditions::new(max_new_tokens, Vec::new()),
            sampling: Sampling::Greedy,
            seed: 0,
        };
        let (events, receiver) = unbounded_channel();
        let received = Instant::now();
        let client = Client { events, received, deadline: received + Duration::from_secs(600) };
        lane.push(Job { lane: 0, work: Work::Decode { request, num_top }, client });
        receiver
    }

    /// The number of tokens and of scores so far, and the last event.
    fn so_far(receiver: &mut UnboundedReceiver<Event>) -> (usize, usize, Option<Event>) {
        let (mut num_tokens, mut num_scores, mut last) = (0, 0, None);
        while let Ok(event) = receiver.try_recv() {
            if let Event::Tokens { ids, scores, .. } = &event {
                num_tokens += ids.len();
                num_scores += scores.len();
            }
            last = Some(event);
        }
        (num_tokens, num_scores, last)
    }

    #[test]
    fn an_answer_whose_scoring_fails_leaves_the_batch_and_the_others_stay() {
        with_lane(|lane| {
            // The vocabulary has no 1000 tokens, which libtorch notices when it scores the first ones.
            let mut failing = ask(lane, CONTEXT - 4, Some(1000));
            let mut other = ask(lane, CONTEXT - 4, None);
            let mut last = None;
            while !matches!(last, Some(Event::Failed(_))) {
                lane.turn().unwrap();
                last = so_far(&mut failing).2.or(last);
            }
            let Some(Event::Failed(error)) = last else { unreachable!() };
            assert!(error.status == StatusCode::SERVICE_UNAVAILABLE && error.message.contains("log-prob"), "{error:?}");
            lane.turn().unwrap();
            assert_eq!((lane.batch.num_running(), lane.running.len()), (1, 1));
            while lane.has_work() {
                lane.turn().unwrap();
            }
            let (num_tokens, _, last) = so_far(&mut other);
            assert!(num_tokens == CONTEXT - 4 && matches!(last, Some(Event::Finished(_))), "{num_tokens}");
        });
    }

    #[test]
    fn answers_wait_for_the_memory_of_their_scores_and_hold_up_no_others() {
        with_lane(|lane| {
            // Four answers may have as many tokens as one context.
            let mut receivers = [Some(1), Some(1), None, Some(1)].map(|num_top| ask(lane, CONTEXT / 2, num_top));
            lane.turn().unwrap();
            assert_eq!((lane.running.len(), lane.waiting.len()), (2, 2));
            assert!(so_far(&mut receivers[1]).2.is_none());
            while lane.has_work() {
                lane.turn().unwrap();
            }
            let numbers =
                receivers.map(|mut receiver| so_far(&mut receiver)).map(|(tokens, scores, _)| (tokens, scores));
            let num = CONTEXT / 2;
            assert_eq!(numbers, [(num, num), (num, num), (num, 0), (num, num)]);
        });
    }

    #[test]
    fn scoring_takes_half_of_the_time_of_decoding_and_saves_up_none() {
        let mut pace = Pace::default();
        pace.decoded(100.0);
        assert!(pace.lets_score());
        pace.scored(3.0);
        pace.decoded(5.0);
        assert!(!pace.lets_score());
        pace.decoded(1.0);
        assert!(pace.lets_score());
    }
}
