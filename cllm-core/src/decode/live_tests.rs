//! Tests of live batches on a mock backend: requests come and go at any forward, and each answer is
//! that of the request alone.

use std::collections::HashMap;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::prefix_cache::{BLOCK_TOKENS, PrefixCache};
use super::request::Job;
use super::scheduler::{Events, PrefillPolicy, Scheduler};
use super::tests::{MockBackend, backend_for, stop, strategies};
use super::window_chooser::WindowChooser;
use super::{Answer, DecodeOptions, Request, Strategy};

const MAX_RUNNING: usize = 3;

/// A live batch with its mock backend, and what it has reported.
struct Live<'c> {
    backend: MockBackend,
    scheduler: Scheduler<'c>,
    strategy: Strategy,
    prompts: Vec<Vec<i32>>,
    streamed: HashMap<usize, Vec<i32>>,
    answers: HashMap<usize, Answer>,
    num_cached: usize,
}

impl<'c> Live<'c> {
    fn new(strategy: Strategy, chooser: &'c mut WindowChooser) -> Self {
        let scheduler = Scheduler::new(std::iter::empty(), MAX_RUNNING, strategy, PrefillPolicy::Shared, chooser);
        let scheduler = scheduler.with_prefixes(PrefixCache::new(MAX_RUNNING + 1, 1, 6 * BLOCK_TOKENS));
        let (streamed, answers) = (HashMap::new(), HashMap::new());
        let mut backend = MockBackend::new(MAX_RUNNING + 2);
        backend.max_prompt_tokens = 20;
        Live { backend, scheduler, strategy, prompts: Vec::new(), streamed, answers, num_cached: 0 }
    }

    fn join(&mut self, prompt_ids: Vec<i32>) {
        self.prompts.push(prompt_ids.clone());
        let request = Request { sample_id: "a".to_owned(), prompt_ids };
        let job = Job { request, stop: stop(), options: DecodeOptions::greedy(self.strategy, 1) };
        let mut backend = backend_for(self.strategy, &mut self.backend);
        self.num_cached += self.scheduler.join(job, backend.as_mut()).unwrap();
    }

    fn leave(&mut self, index: usize) {
        self.scheduler.leave(index, backend_for(self.strategy, &mut self.backend).as_mut()).unwrap();
    }

    fn step(&mut self) -> bool {
        let mut on_finished = |index: usize, answer| {
            assert!(self.answers.insert(index, answer).is_none(), "request {index} was answered twice");
            Ok(())
        };
        let mut on_tokens =
            |index: usize, tokens: &[i32]| self.streamed.entry(index).or_default().extend_from_slice(tokens);
        let mut events = Events { on_tokens: &mut on_tokens, on_finished: &mut on_finished };
        self.scheduler.step(backend_for(self.strategy, &mut self.backend).as_mut(), &mut events).unwrap()
    }
}

/// A prompt of up to some blocks. Many begin alike.
fn prompt(random: &mut ChaCha8Rng) -> Vec<i32> {
    let num_shared = random.random_range(0..4) * BLOCK_TOKENS as i32;
    let own: Vec<i32> = (0..random.random_range(1..40)).map(|_| random.random_range(0..29)).collect();
    (0..num_shared).map(|token| token % 23).chain(own).collect()
}

fn answer_alone(prompt_ids: &[i32], strategy: Strategy) -> Answer {
    let mut chooser = WindowChooser::default();
    let mut live = Live::new(strategy, &mut chooser);
    live.join(prompt_ids.to_vec());
    while live.step() {}
    live.answers.remove(&0).unwrap()
}

#[test]
fn requests_that_come_and_go_have_the_answers_that_they_have_alone() {
    for (seed, strategy) in strategies().into_iter().chain([Strategy::Ar]).enumerate() {
        let mut random = ChaCha8Rng::seed_from_u64(seed as u64);
        let mut chooser = WindowChooser::default();
        let mut live = Live::new(strategy, &mut chooser);
        let mut left = Vec::new();
        while live.prompts.len() < 40 {
            if live.scheduler.has_room() && random.random_bool(0.5) {
                live.join(prompt(&mut random));
            }
            if random.random_bool(0.05) && !live.prompts.is_empty() {
                let index = random.random_range(0..live.prompts.len());
                live.leave(index);
                left.push(index);
            }
            live.step();
        }
        while live.step() {}
        assert!(live.num_cached > 0 && live.backend.num_mixed > 0);
        for (index, prompt) in live.prompts.iter().enumerate() {
            let expected = answer_alone(prompt, strategy).response_ids;
            let streamed = live.streamed.remove(&index).unwrap_or_default();
            match live.answers.get(&index) {
                Some(answer) => assert_eq!((&answer.response_ids, &streamed), (&expected, &expected), "{strategy}"),
                None => {
                    assert!(left.contains(&index) && expected.starts_with(&streamed), "{strategy}, request {index}")
                }
            }
        }
    }
}

#[test]
fn a_short_prompt_overtakes_a_long_one() {
    let mut chooser = WindowChooser::default();
    let mut live = Live::new(Strategy::Ar, &mut chooser);
    live.join((0..400).map(|token| token % 29).collect());
    live.join(vec![3, 5, 7]);
    for _ in 0..3 {
        live.step();
    }
    assert!(!live.streamed.contains_key(&0) && live.streamed.contains_key(&1));
}

#[test]
fn a_repeated_prompt_is_cached_but_for_its_last_token_and_part_of_a_block() {
    let mut chooser = WindowChooser::default();
    let mut live = Live::new(Strategy::rolling(4), &mut chooser);
    let prompt: Vec<i32> = (0..2 * BLOCK_TOKENS as i32 + 1).map(|token| token % 19).collect();
    live.join(prompt.clone());
    while live.step() {}
    live.join(prompt[..2 * BLOCK_TOKENS].to_vec());
    assert_eq!(live.num_cached, BLOCK_TOKENS);
    live.join(prompt);
    assert_eq!(live.num_cached, 3 * BLOCK_TOKENS);
}
