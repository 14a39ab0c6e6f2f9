//! `bench` on a small random model: what it writes, and what it refuses.

use std::path::Path;

use serde_json::Value;

use crate::made_up::model;
use cllm_testing::programs::{Program, path};

const EVAL: Program = Program("cllm-eval");
const BENCH: &[&str] =
    &["bench", "steps=[2]", "batches=[3]", "repeats=1", "prompt_tokens=9", "new_tokens=6", "device=cpu"];

fn bench(folder: &Path, arguments: &[&str]) -> Value {
    let output = format!("output={}", path(folder, "bench.json"));
    EVAL.succeed(&[BENCH, &[&output], arguments].concat());
    serde_json::from_slice(&std::fs::read(folder.join("bench.json")).unwrap()).unwrap()
}

#[test]
fn every_figure_of_the_file_is_there_and_models_stand_side_by_side() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("one"), 1);
    model(&dir.path().join("two"), 2);
    let prompts = path(dir.path(), "prompts.jsonl");
    let lines: Vec<String> = (0..4).map(|i| format!("{{\"id\":\"{i}\",\"prompt\":\"{i} and {i}\"}}")).collect();
    std::fs::write(&prompts, lines.join("\n")).unwrap();
    let baseline = path(dir.path(), "baseline.json");
    std::fs::write(&baseline, r#"{"ar_tokens_per_second": 25.5}"#).unwrap();
    let one = format!("model={}", path(dir.path(), "one"));
    let found = bench(
        dir.path(),
        &[
            &one,
            &format!("prompts={prompts}"),
            "strategies=[{jacobi: {n: 4}}]",
            "max_new_tokens=10",
            "collect_rows=2",
            "collect_n=4",
            &format!("baseline={baseline}"),
        ],
    );
    let first = &found["models"][0];
    assert_eq!((&first["name"], &first["transformers_ar_tokens_per_second"]), (&"one".into(), &25.5.into()));
    let number = |value: &Value| value.as_f64().is_some_and(|value| value > 0.0);
    for figure in ["ar_tokens_per_second", "prefill_ms", "collect_tokens_per_second", "collect_tokens_per_forward"] {
        assert!(number(&first[figure]), "{figure}: {first}");
    }
    assert_eq!(first["step_ms"].as_object().unwrap().keys().collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!(first["step_over_one"]["1"], 1.0);
    assert!(number(&first["batch_tokens_per_second"]["3"]) && number(&first["floor"]["share"]));
    assert_eq!(first["collect_responses"], 4);
    let strategies = first["strategies"].as_array().unwrap();
    assert_eq!(strategies.len(), 2);
    // Float32 on the CPU: every strategy gives the answer of autoregressive decoding.
    assert!(strategies.iter().all(|strategy| strategy["exact_match_vs_ar"] == 1.0 && strategy["examples"] == 4));

    let two = format!("model={}", path(dir.path(), "two"));
    let names = |found: &Value| -> Vec<String> {
        found["models"].as_array().unwrap().iter().map(|model| model["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&bench(dir.path(), &[&two])), ["one", "two"]);
    assert_eq!(names(&bench(dir.path(), &[&one])), ["two", "one"], "measured again, it stands once");
}

#[test]
fn the_recipe_measures_every_strategy() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("one"), 1);
    let prompts = path(dir.path(), "prompts.jsonl");
    std::fs::write(&prompts, r#"{"id":"0","prompt":"1 and 2 and 1 and 2 and"}"#).unwrap();
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/bench.yaml");
    let (one, prompts) = (format!("model={}", path(dir.path(), "one")), format!("prompts={prompts}"));
    let found = bench(dir.path(), &["-c", recipe, &one, &prompts, "max_new_tokens=20"]);
    let strategies = found["models"][0]["strategies"].as_array().unwrap();
    let name = |strategy: &Value| match &strategy["strategy"] {
        Value::String(name) => name.clone(),
        with_settings => with_settings.as_object().unwrap().keys().next().unwrap().clone(),
    };
    let names: Vec<String> = strategies.iter().map(name).collect();
    assert_eq!(names, ["ar", "jacobi", "rolling", "rolling", "multiblock", "lookahead"]);
    assert!(strategies.iter().all(|strategy| strategy["exact_match_vs_ar"] == 1.0), "{strategies:?}");
}

#[test]
fn settings_that_do_not_fit_and_files_of_other_machines_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("one"), 1);
    let (one, file) = (format!("model={}", path(dir.path(), "one")), path(dir.path(), "bench.json"));
    let output = format!("output={file}");
    let refused = |arguments: &[&str], word: &str| {
        EVAL.fail(&[BENCH, &[&output], arguments].concat(), 2, &[word]);
    };
    refused(&[], "`shape`");
    refused(&[&one, "shape=135M"], "`shape`");
    refused(&["shape=135M", "prompts=x.jsonl"], "prompts");
    refused(&[&one, "steps=[0]"], "steps");
    refused(&[&one, "strategies=[{lookahead: {window: 30}}]"], "window 30, ngram 4 and candidates 5 of lookahead");
    let mut found = bench(dir.path(), &[&one]);
    found["hardware"]["cpu"] = "another".into();
    std::fs::write(&file, found.to_string()).unwrap();
    refused(&[&one], "another machine");
}
