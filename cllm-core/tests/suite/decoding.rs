//! Every strategy gives the answer of autoregressive decoding, on every model family.

use std::collections::BTreeMap;

use cllm_core::decode::{
    Answer, DecodeOptions, Decoder, LiveBatch, LiveRequest, LiveRows, Request, Sampling, StopConditions, Strategy,
    Timing, Width, decode, required_slots,
};
use cllm_core::thought::{Thought, ThoughtClosing, ThoughtLimit, ThoughtTokens};

use tch::{Device, IndexOp, Kind, Tensor};

use crate::models::{random_model, shapes};

fn strategies() -> [Strategy; 11] {
    [
        Strategy::Jacobi { n: 2 },
        Strategy::Jacobi { n: 16 },
        Strategy::rolling(5),
        Strategy::Rolling { n: Width::Fixed(16), tree: 0, pool: 4 },
        Strategy::Rolling { n: Width::Fixed(6), tree: 40, pool: 0 },
        Strategy::auto(0),
        Strategy::auto(24),
        Strategy::multi_block(5),
        Strategy::MultiBlock { n: 16, blocks: 3, ratio: 0.5, pool: 2 },
        Strategy::lookahead(),
        Strategy::Lookahead { window: 2, ngram: 3, candidates: 4 },
    ]
}

#[test]
fn greedy_answers_equal_autoregressive_ones_on_every_family_and_in_every_batch() {
    assert_equal_to_autoregressive(Sampling::Greedy);
}

#[test]
fn sampled_answers_equal_autoregressive_ones_on_every_family_and_in_every_batch() {
    assert_equal_to_autoregressive(Sampling::Temperature(0.8));
}

#[test]
fn answers_from_a_nucleus_equal_autoregressive_ones_on_every_family_and_in_every_batch() {
    assert_equal_to_autoregressive(Sampling::Temperature(1.5).with_top_p(0.7));
}

fn assert_equal_to_autoregressive(sampling: Sampling) {
    let requests: Vec<Request> = (0..5)
        .map(|index| Request {
            sample_id: format!("s{index}"),
            prompt_ids: (1..2 + index * 3).map(|i| i * 5 % 61).collect(),
        })
        .collect();
    let stop = StopConditions::new(40, vec![3, 9]);
    for (name, config) in shapes() {
        let model = random_model(&config);
        let run = |strategy, requests: &[Request]| {
            let options = DecodeOptions { record_trajectory: true, sampling, ..DecodeOptions::greedy(strategy, 5) };
            decode(&model, requests, &stop, options).unwrap().0
        };
        let autoregressive = run(Strategy::Ar, &requests);
        assert!(autoregressive.iter().any(|answer| answer.response_ids.len() > 20), "{name}: all answers are short");
        for strategy in strategies() {
            for (index, answer) in run(strategy, &requests).iter().enumerate() {
                let case = format!("{name}, {strategy:?}, {sampling:?}, request {index}");
                assert_eq!(answer.response_ids, autoregressive[index].response_ids, "{case}");
                let alone = &run(strategy, &requests[index..=index])[0];
                assert_eq!(alone.blocks, answer.blocks, "{case} alone");
                // A width that is chosen depends on the batch and on measured times.
                if !matches!(strategy, Strategy::Rolling { n: Width::Auto, .. }) {
                    assert_eq!(alone.num_new_tokens, answer.num_new_tokens, "{case} alone");
                }
                assert_eq!(alone.response_ids, answer.response_ids, "{case} alone");
            }
        }
    }
}

#[test]
fn a_draft_model_leaves_the_target_models_answer_unchanged_on_every_family() {
    let requests: Vec<Request> = (1..4)
        .map(|index| Request { sample_id: format!("s{index}"), prompt_ids: (1..2 + index * 3).collect() })
        .collect();
    let stop = StopConditions::new(30, vec![3, 9]);
    let strategy = Strategy::Drafted { n: 6 };
    let options = |strategy| DecodeOptions::greedy(strategy, 5);
    for ((name, config), (_, other)) in shapes().into_iter().zip(shapes().into_iter().cycle().skip(1)) {
        // The draft model is of another family, so its own answers differ.
        let (model, draft_model) = (random_model(&config), random_model(&other));
        let greedy = decode(&model, &requests, &stop, options(Strategy::Ar)).unwrap().0;
        let decoder = Decoder::new(&model, 2, required_slots(20, &stop, strategy)).unwrap();
        let mut decoder = decoder.with_draft_model(&draft_model).unwrap();
        let mut answers: Vec<Option<Answer>> = vec![None; requests.len()];
        let mut keep = |index: usize, answer| {
            answers[index] = Some(answer);
            Ok(())
        };
        decoder.stream(&mut requests.iter().cloned(), &stop, options(strategy), &mut keep).unwrap();
        for (answer, greedy) in answers.into_iter().zip(&greedy) {
            assert_eq!(answer.unwrap().response_ids, greedy.response_ids, "{name}");
        }
        let error = decode(&model, &requests, &stop, options(strategy)).err().unwrap();
        assert!(error.to_string().contains("drafted"), "{error}");
    }
}

#[test]
fn more_requests_than_rows_take_turns_and_each_answer_has_its_time() {
    let requests: Vec<Request> = (1..9)
        .map(|index| Request { sample_id: format!("s{index}"), prompt_ids: (1..2 + index * 3).collect() })
        .collect();
    let stop = StopConditions::new(30, vec![3, 9]);
    let (_, config) = shapes().into_iter().next().unwrap();
    let model = random_model(&config);
    for strategy in [Strategy::Ar, Strategy::rolling(6)] {
        let options = DecodeOptions::greedy(strategy, 5);
        let together = decode(&model, &requests, &stop, options).unwrap().0;
        for num_rows in [1, 3] {
            let mut decoder = Decoder::new(&model, num_rows, required_slots(30, &stop, strategy)).unwrap();
            let (answers, timing) = decoder.answer(&requests, &stop, options, None).unwrap();
            let sum = |seconds: fn(Timing) -> f64| answers.iter().map(|answer| seconds(answer.timing)).sum::<f64>();
            let (prefill, decoding) = (sum(|one| one.prefill_seconds), sum(|one| one.decode_seconds));
            for mean_rows in [prefill / timing.prefill_seconds, decoding / timing.decode_seconds] {
                let is_plausible = match num_rows {
                    1 => (mean_rows - 1.0).abs() < 1e-9,
                    _ => mean_rows > 1.0 && mean_rows < num_rows as f64 + 1e-9,
                };
                assert!(is_plausible, "{mean_rows} of {num_rows} rows, {timing:?}");
            }
            for (answer, together) in answers.iter().zip(&together) {
                assert_eq!(answer.response_ids, together.response_ids, "{strategy} in {num_rows} rows");
            }
        }
    }
}

#[test]
fn a_long_prompt_is_read_as_a_forward_reads_it() {
    let short = Request { sample_id: "short".into(), prompt_ids: vec![5, 6, 7] };
    let long = Request { sample_id: "long".into(), prompt_ids: (0..1100).map(|index| index * index % 61).collect() };
    let requests = [short.clone(), long, short];
    let stop = StopConditions::new(3, vec![]);
    for (name, mut config) in shapes() {
        config["max_position_embeddings"] = 2048.into();
        if config["rope_scaling"].is_object() {
            config["rope_scaling"]["original_max_position_embeddings"] = 512.into();
        }
        let model = random_model(&config);
        let answers = decode(&model, &requests, &stop, DecodeOptions::greedy(Strategy::Ar, 0)).unwrap().0;
        for (request, answer) in requests.iter().zip(answers) {
            let ids = [&request.prompt_ids[..], &answer.response_ids[..2]].concat();
            let tokens = Tensor::from_slice(&ids).to_kind(Kind::Int64).unsqueeze(0);
            let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu)).unsqueeze(0);
            let hidden = tch::no_grad(|| model.forward(&tokens, &positions));
            let likeliest = model.compute_logits(&hidden.i((0, ids.len() as i64 - 3..))).unwrap().argmax(-1, false);
            let expected = Vec::<i32>::try_from(likeliest.to_kind(Kind::Int)).unwrap();
            assert_eq!(answer.response_ids, expected, "{name}, {}", request.sample_id);
        }
    }
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_by_the_name_of_its_sample() {
    let (_, config) = shapes().remove(0);
    let model = random_model(&config);
    let request = Request { sample_id: "long".into(), prompt_ids: vec![1; 250] };
    let stop = StopConditions::new(40, vec![]);
    let message = decode(&model, &[request], &stop, DecodeOptions::greedy(Strategy::Ar, 0)).err().unwrap().to_string();
    assert!(message.contains("`long`") && message.contains("256"), "{message}");
}

#[test]
fn a_cache_that_does_not_fit_the_memory_is_refused_with_advice() {
    let (_, config) = shapes().remove(0);
    let model = random_model(&config);
    let message = Decoder::new(&model, 1 << 20, 1 << 20).err().unwrap().to_string();
    assert!(message.contains("lower the batch size or the length limits"), "{message}");
}

/// Limits thoughts to 10 tokens. Every answer begins inside a thought, which token 11 ends.
fn thought_limit() -> ThoughtLimit {
    let closing = ThoughtClosing { max_thinking_tokens: 10, closing_ids: vec![7, 11, 8] };
    ThoughtLimit { tokens: ThoughtTokens::new(12, 11, vec![vec![]]), closing }
}

#[test]
fn a_thought_closed_at_its_limit_equals_the_construction_by_hand_on_every_family() {
    let requests: Vec<Request> = (0..4)
        .map(|index| Request { sample_id: format!("s{index}"), prompt_ids: (1..2 + index * 3).collect() })
        .collect();
    let with_limit = StopConditions { thought_limit: Some(thought_limit()), ..StopConditions::new(32, vec![3, 9]) };
    let mut num_forced = 0;
    for ((name, config), sampling) in shapes()
        .into_iter()
        .flat_map(|shape| [Sampling::Greedy, Sampling::Temperature(0.8)].map(|s| (shape.clone(), s)))
    {
        let model = random_model(&config);
        let run = |strategy, requests: &[Request], stop: &StopConditions| {
            let options = DecodeOptions { sampling, ..DecodeOptions::greedy(strategy, 5) };
            decode(&model, requests, stop, options).unwrap().0
        };
        let ids_by_hand = |request: &Request| {
            let request = std::slice::from_ref(request);
            let whole = run(Strategy::Ar, request, &StopConditions::new(32, vec![3, 9])).remove(0).response_ids;
            let last_mark = whole.iter().take(10).rfind(|&&id| id == 11 || id == 12);
            if whole.len() <= 10 || last_mark == Some(&11) {
                return whole;
            }
            let so_far = [&whole[..10], &[7, 11, 8]].concat();
            let prompt_ids = [&request[0].prompt_ids[..], &so_far].concat();
            let rest = Request { prompt_ids, ..request[0].clone() };
            let rest = run(Strategy::Ar, &[rest], &StopConditions::new(32 - 13, vec![3, 9])).remove(0).response_ids;
            [so_far, rest].concat()
        };
        let by_hand: Vec<Vec<i32>> = requests.iter().map(ids_by_hand).collect();
        for strategy in strategies().into_iter().chain([Strategy::Ar]) {
            for (index, answer) in run(strategy, &requests, &with_limit).iter().enumerate() {
                assert_eq!(answer.response_ids, by_hand[index], "{name}, {strategy:?}, {sampling:?}, request {index}");
                num_forced += usize::from(answer.thought == Some(Thought::Forced(10..13)));
            }
        }
    }
    assert!(num_forced > 100, "only {num_forced} thoughts reached the limit");
}

#[test]
fn a_draft_model_reads_the_closed_thought_too() {
    let (_, config) = shapes().remove(0);
    let (model, draft_model) = (random_model(&config), random_model(&shapes().remove(1).1));
    let stop = StopConditions { thought_limit: Some(thought_limit()), ..StopConditions::new(32, vec![3, 9]) };
    let requests: Vec<Request> = (1..4)
        .map(|index| Request { sample_id: format!("s{index}"), prompt_ids: (1..2 + index * 3).collect() })
        .collect();
    let greedy = decode(&model, &requests, &stop, DecodeOptions::greedy(Strategy::Ar, 5)).unwrap().0;
    let answers = |draft_model| {
        let strategy = Strategy::Drafted { n: 6 };
        let decoder = Decoder::new(&model, 3, required_slots(20, &stop, strategy)).unwrap();
        let mut decoder = decoder.with_draft_model(draft_model).unwrap();
        decoder.answer(&requests, &stop, DecodeOptions::greedy(strategy, 5), None).unwrap().0
    };
    for (answer, greedy) in answers(&draft_model).iter().chain(&answers(&model)).zip(greedy.iter().cycle()) {
        assert_eq!((&answer.response_ids, &answer.thought), (&greedy.response_ids, &greedy.thought));
    }
    assert!(greedy.iter().any(|answer| answer.thought == Some(Thought::Forced(10..13))));
}

/// A request by its prompt, which is answered greedily.
fn live_request(prompt_ids: Vec<i32>, stop: StopConditions) -> LiveRequest {
    let request = Request { sample_id: "a".into(), prompt_ids };
    LiveRequest { request, stop, sampling: Sampling::Greedy, seed: 5 }
}

/// Runs a live batch until its requests are answered; the answers are by the number of the request.
fn finish(batch: &mut LiveBatch<'_>) -> BTreeMap<usize, Answer> {
    let mut answers = BTreeMap::new();
    let mut keep = |index, answer| {
        answers.insert(index, answer);
        Ok(())
    };
    while batch.step(&mut |_, _| (), &mut keep).unwrap() {}
    answers
}

#[test]
fn a_row_near_the_end_of_its_context_runs_beside_longer_chunks_and_windows() {
    let prompt = |len: i32| (0..len).map(|index| index * index % 61).collect::<Vec<i32>>();
    let fills_context = live_request(prompt(90), StopConditions::new(10, vec![]));
    let is_shorter = live_request([vec![60], prompt(80)].concat(), StopConditions::new(10, vec![]));
    let is_near_end = live_request(prompt(60), StopConditions::new(40, vec![]));
    let closing = ThoughtClosing { max_thinking_tokens: 1, closing_ids: [[7; 20], [11; 20]].concat() };
    let limit = ThoughtLimit { tokens: ThoughtTokens::new(12, 11, vec![vec![]]), closing };
    let closes_thought = StopConditions { thought_limit: Some(limit), ..StopConditions::new(50, vec![]) };
    let closes_thought = live_request(prompt(5), closes_thought);
    for (name, config) in shapes() {
        let model = random_model(&config);
        let alone = |live: &LiveRequest| {
            let options = DecodeOptions::greedy(Strategy::Ar, live.seed);
            decode(&model, std::slice::from_ref(&live.request), &live.stop, options).unwrap().0.remove(0).response_ids
        };
        let rows = LiveRows { max_running: 2, num_prefix_rows: 2 };
        let mut decoder = Decoder::new(&model, rows.num_rows(), 100 + 1).unwrap();
        let mut batch = decoder.go_live(Strategy::Ar, rows).unwrap();
        batch.join(fills_context.clone()).unwrap();
        finish(&mut batch);
        // The first two blocks of the prompt are cached now, and the rest is next to a whole prompt.
        assert_eq!(batch.join(fills_context.clone()).unwrap(), 64, "{name}");
        assert_eq!(batch.join(is_shorter.clone()).unwrap(), 0, "{name}");
        let answers = finish(&mut batch);
        assert_eq!(answers[&1].response_ids, alone(&fills_context), "{name}");
        assert_eq!(answers[&2].response_ids, alone(&is_shorter), "{name}");
        // One has its last tokens when the other closes its thought.
        batch.join(is_near_end.clone()).unwrap();
        for _ in 0..37 {
            batch.step(&mut |_, _| (), &mut |_, _| Ok(())).unwrap();
        }
        batch.join(closes_thought.clone()).unwrap();
        let answers = finish(&mut batch);
        assert_eq!(answers[&3].response_ids, alone(&is_near_end), "{name}");
        assert_eq!(answers[&4].response_ids, alone(&closes_thought), "{name}");
        assert_eq!(answers[&4].thought, Some(Thought::Forced(1..41)), "{name}");
    }
}
