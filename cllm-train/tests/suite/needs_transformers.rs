//! The method that `export --custom-generate` writes, in `transformers`: it decodes the tokens of
//! greedy decoding, in as many forwards as the strategy `rolling`.

use std::path::Path;
use std::process::Command;

use cllm_core::checkpoint;
use cllm_core::decode::{DecodeOptions, Request, StopConditions, Strategy, decode};
use cllm_testing::families::{random_model, shapes};
use cllm_testing::programs::path;
use serde_json::{Value, json};
use tch::Kind;

use crate::setup::TRAIN;

const SEED: u64 = 3;
const MAX_NEW_TOKENS: usize = 40;

/// Compares each answer of a file with those in `transformers`.
const COMPARE: &str = r#"
import json, sys, torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
for case in json.load(open(sys.argv[1])):
    model = AutoModelForCausalLM.from_pretrained(case["model"]).float()
    ids = torch.tensor([case["prompt_ids"]])
    own = dict(custom_generate=sys.argv[2], trust_remote_code=True, n=case["n"], seed=case["seed"])
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=case["max_new_tokens"])
    inputs.update(eos_token_id=case["eos_ids"], pad_token_id=0)
    greedy = model.generate(**inputs, do_sample=False)[0, ids.shape[1]:].tolist()
    output = model.generate(**inputs, **own, sample_id=case["sample_id"], return_dict_in_generate=True)
    found = output.sequences[0, ids.shape[1]:].tolist()
    assert greedy == found == case["response_ids"], (case, greedy, found)
    assert output.num_forwards == case["num_forwards"], (case, output.num_forwards)
for refused in [dict(do_sample=True), dict(num_beams=2), dict(inputs=ids.repeat(2, 1)), dict(repetition_penalty=1.1)]:
    try:
        model.generate(**{"inputs": ids, **refused}, **own)
    except ValueError as error:
        assert "call" in str(error), error
    else:
        raise AssertionError(f"{refused} was accepted")
"#;

#[test]
#[ignore = "needs transformers: scripts/test --transformers"]
fn a_rolling_window_has_the_tokens_of_greedy_decoding_and_as_many_forwards_as_ours() {
    let dir = tempfile::tempdir().unwrap();
    let cases: Vec<Value> =
        shapes().into_iter().flat_map(|(name, config)| cases(&dir.path().join(name), &config)).collect();
    let num = |key: &str| cases.iter().map(|case| case[key].as_u64().unwrap()).sum::<u64>();
    let num_tokens: usize = cases.iter().map(|case| case["response_ids"].as_array().unwrap().len()).sum();
    assert!(num("num_forwards") * 11 < num_tokens as u64 * 10, "no draft token was accepted");
    let (file, exported) = (path(dir.path(), "cases.json"), path(dir.path(), "exported"));
    std::fs::write(&file, json!(cases).to_string()).unwrap();
    TRAIN.succeed(&["export", &path(dir.path(), "llama"), "--custom-generate", "--output", &exported]);
    let output = Command::new("python3")
        .args(["-c", COMPARE, &file, &exported])
        .env("HF_HOME", dir.path().join("cache"))
        .output()
        .expect("python3 is not installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Answers of a random model, which is written to `folder`.
fn cases(folder: &Path, config: &Value) -> Vec<Value> {
    let model = random_model(config, 5);
    std::fs::create_dir(folder).unwrap();
    checkpoint::save(&model, folder, Kind::Float).unwrap();
    let answer = |index: usize, n: usize| {
        let prompt_ids: Vec<i32> =
            (0..=5 * index as i32).map(|position| (position * 7 + index as i32) % 59 + 1).collect();
        let request = Request { sample_id: format!("s{index}"), prompt_ids: prompt_ids.clone() };
        let stop = StopConditions::new(MAX_NEW_TOKENS, vec![17]);
        let options = DecodeOptions::greedy(Strategy::rolling(n), SEED);
        let answer = decode(&model, std::slice::from_ref(&request), &stop, options).unwrap().0.remove(0);
        json!({
            "model": folder, "prompt_ids": prompt_ids, "n": n, "seed": SEED, "sample_id": request.sample_id,
            "max_new_tokens": MAX_NEW_TOKENS, "eos_ids": stop.eos_ids, "response_ids": answer.response_ids,
            "num_forwards": answer.num_forwards,
        })
    };
    vec![answer(0, 4), answer(1, 16), answer(2, 8)]
}
