//! Every strategy gives the answer of one token at a time, on every family.

use cllm_core::decode::{DecodeOptions, Decoder, Request, Sampling, StopConditions, Strategy, decode, required_slots};

use crate::models::{random_model, shapes};

fn strategies() -> [Strategy; 8] {
    [
        Strategy::Jacobi { n: 2 },
        Strategy::Jacobi { n: 16 },
        Strategy::rolling(5),
        Strategy::Rolling { n: 16, pool: 4 },
        Strategy::multi_block(5),
        Strategy::MultiBlock { n: 16, blocks: 3, ratio: 0.5, pool: 2 },
        Strategy::lookahead(),
        Strategy::Lookahead { window: 2, ngram: 3, candidates: 4 },
    ]
}

#[test]
fn fixed_point_equals_greedy_on_every_family_and_in_every_batch() {
    equals_one_by_one(Sampling::Greedy);
}

#[test]
fn drawn_answers_equal_those_drawn_one_by_one_on_every_family_and_in_every_batch() {
    equals_one_by_one(Sampling::Temperature(0.8));
}

fn equals_one_by_one(sampling: Sampling) {
    let requests: Vec<Request> = (0..5)
        .map(|index| Request {
            sample_id: format!("s{index}"),
            prompt_ids: (1..2 + index * 3).map(|i| i * 5 % 61).collect(),
        })
        .collect();
    let stop = StopConditions { max_new_tokens: 40, eos_ids: vec![3, 9] };
    for (name, config) in shapes() {
        let model = random_model(&config);
        let run = |strategy, requests: &[Request]| {
            let options = DecodeOptions { record_trajectory: true, sampling, ..DecodeOptions::greedy(strategy, 5) };
            decode(&model, requests, &stop, options, None).unwrap().0
        };
        let one_by_one = run(Strategy::Ar, &requests);
        assert!(one_by_one.iter().any(|answer| answer.response_ids.len() > 20), "{name}: nothing to compare");
        for strategy in strategies() {
            for (index, answer) in run(strategy, &requests).iter().enumerate() {
                let place = format!("{name}, {strategy:?}, {sampling:?}, row {index}");
                assert_eq!(answer.response_ids, one_by_one[index].response_ids, "{place}");
                let alone = &run(strategy, &requests[index..=index])[0];
                assert_eq!(alone.blocks, answer.blocks, "{place} alone");
                assert_eq!(alone.num_accepted, answer.num_accepted, "{place} alone");
            }
        }
    }
}

#[test]
fn with_another_models_guesses_the_answer_stays_the_models_own_on_every_family() {
    let requests: Vec<Request> = (1..4)
        .map(|index| Request { sample_id: format!("s{index}"), prompt_ids: (1..2 + index * 3).collect() })
        .collect();
    let stop = StopConditions { max_new_tokens: 30, eos_ids: vec![3, 9] };
    let strategy = Strategy::Drafted { n: 6 };
    for ((name, config), (_, other)) in shapes().into_iter().zip(shapes().into_iter().cycle().skip(1)) {
        // Of another family: its answers are others.
        let (model, draft_model) = (random_model(&config), random_model(&other));
        let options = |strategy| DecodeOptions::greedy(strategy, 5);
        let greedy = decode(&model, &requests, &stop, options(Strategy::Ar), None).unwrap().0;
        let alone = Decoder::new(&model, 2, required_slots(20, &stop, strategy)).unwrap();
        let mut decoder = alone.with_draft_model(&draft_model).unwrap();
        let mut drafted = vec![None; requests.len()];
        let mut keep = |index: usize, answer| {
            drafted[index] = Some(answer);
            Ok(())
        };
        decoder.stream(&mut requests.iter().cloned(), &stop, options(strategy), &mut keep).unwrap();
        for (one, plain) in drafted.into_iter().zip(&greedy) {
            assert_eq!(one.unwrap().response_ids, plain.response_ids, "{name}");
        }
        let refused = decode(&model, &requests, &stop, options(strategy), None).err().unwrap();
        assert!(refused.to_string().contains("drafted"), "{refused}");
    }
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_by_name() {
    let (_, config) = shapes().remove(0);
    let model = random_model(&config);
    let request = Request { sample_id: "long".into(), prompt_ids: vec![1; 250] };
    let stop = StopConditions { max_new_tokens: 40, eos_ids: vec![] };
    let options = DecodeOptions::greedy(Strategy::Ar, 0);
    let message = decode(&model, &[request], &stop, options, None).err().unwrap().to_string();
    assert!(message.contains("`long`") && message.contains("256"), "{message}");
}
