//! The fixed point is the greedy answer, on every family.

use cllm_core::decode::{DecodeOptions, Limits, Request, Strategy, decode};

use crate::models::{random_model, shapes};

#[test]
fn fixed_point_equals_greedy_on_every_family_and_in_every_batch() {
    let requests: Vec<Request> = (0..5)
        .map(|index| Request {
            sample_id: format!("s{index}"),
            prompt_ids: (1..2 + index * 3).map(|i| i * 5 % 61).collect(),
        })
        .collect();
    let limits = Limits { max_new_tokens: 40, eos_ids: vec![3, 9] };
    for (name, config) in shapes() {
        let model = random_model(&config);
        let run = |strategy, requests: &[Request]| {
            let options = DecodeOptions { record: true, ..DecodeOptions::greedy(strategy, 5) };
            decode(&model, requests, &limits, options, None).unwrap().0
        };
        let greedy = run(Strategy::Ar, &requests);
        assert!(greedy.iter().any(|answer| answer.response_ids.len() > 20), "{name}: nothing to compare");
        let strategies = [2, 5, 16].into_iter().flat_map(|n| [Strategy::Jacobi { n }, Strategy::Rolling { n }]);
        for strategy in strategies {
            for (index, answer) in run(strategy, &requests).iter().enumerate() {
                assert_eq!(answer.response_ids, greedy[index].response_ids, "{name}, {strategy:?}, row {index}");
                let alone = &run(strategy, &requests[index..=index])[0];
                assert_eq!(alone.blocks, answer.blocks, "{name}, {strategy:?}, row {index} alone");
                assert_eq!(alone.accepted, answer.accepted, "{name}, {strategy:?}, row {index} alone");
            }
        }
    }
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_by_name() {
    let (_, config) = shapes().remove(0);
    let model = random_model(&config);
    let request = Request { sample_id: "long".into(), prompt_ids: vec![1; 250] };
    let limits = Limits { max_new_tokens: 40, eos_ids: vec![] };
    let options = DecodeOptions::greedy(Strategy::Ar, 0);
    let message = decode(&model, &[request], &limits, options, None).err().unwrap().to_string();
    assert!(message.contains("`long`") && message.contains("256"), "{message}");
}
