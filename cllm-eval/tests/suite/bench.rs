//! `bench` on a small random model: its output file, and the settings that it refuses.

use std::path::Path;

use cllm_eval::bench::DecodeBenchResults;
use serde_json::{Value, json};

use crate::made_up::{draft_adapters, model};
use cllm_testing::programs::{Program, path};

const EVAL: Program = Program("cllm-eval");
const BENCH: &[&str] = &[
    "bench",
    "step_tokens=[2]",
    "batch_sizes=[3]",
    "num_repeats=1",
    "num_prompt_tokens=9",
    "num_new_tokens=6",
    "device=cpu",
];

fn bench(folder: &Path, arguments: &[&str]) -> Value {
    let output = format!("output={}", path(folder, "bench.json"));
    EVAL.succeed(&[BENCH, &[&output], arguments].concat());
    serde_json::from_slice(&std::fs::read(folder.join("bench.json")).unwrap()).unwrap()
}

#[test]
fn the_file_holds_every_measurement_and_one_record_per_model() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("one"), 1);
    model(&dir.path().join("two"), 2);
    let prompts = path(dir.path(), "prompts.jsonl");
    let lines: Vec<String> = (0..4).map(|i| format!("{{\"id\":\"{i}\",\"prompt\":\"{i} and {i}\"}}")).collect();
    std::fs::write(&prompts, lines.join("\n")).unwrap();
    let baseline = path(dir.path(), "baseline.json");
    let measured = r#"{"engine": "transformers", "ar_tokens_per_second": 25.5, "compiled_ar_tokens_per_second": 99}"#;
    std::fs::write(&baseline, measured).unwrap();
    let one = format!("model={}", path(dir.path(), "one"));
    let results = bench(
        dir.path(),
        &[
            &one,
            &format!("prompts={prompts}"),
            "strategies=[{jacobi: {n: 4}}]",
            "max_new_tokens=10",
            "collect_batch_sizes=[2, 3]",
            "collect_n=4",
            "batch_step_tokens=[1, 4]",
            "gated={rank: 4, targets: [v_proj, q_proj]}",
            &format!("baseline={baseline}"),
        ],
    );
    let first = &results["models"][0];
    assert_eq!((&first["name"], &first["transformers_ar_tokens_per_second"]), (&"one".into(), &25.5.into()));
    assert_eq!(first["transformers_compiled_ar_tokens_per_second"], 99.0);
    let is_positive = |value: &Value| value.as_f64().is_some_and(|value| value > 0.0);
    for value in [&first["ar_tokens_per_second"], &first["prefill_ms"], &first["batch_tokens_per_second"]["3"]] {
        assert!(is_positive(value), "{first}");
    }
    assert_eq!(first["step_ms"].as_object().unwrap().keys().collect::<Vec<_>>(), ["1", "2"]);
    assert_eq!(first["relative_step_time"]["1"], 1.0);
    let batch_step_ms = first["batch_step_ms"]["3"].as_object().unwrap();
    assert_eq!(batch_step_ms.keys().collect::<Vec<_>>(), ["1", "4"]);
    assert!(batch_step_ms.values().all(is_positive), "{first}");
    assert!(is_positive(&first["memory_floor"]["fraction_of_step"]), "{first}");
    let gated = &first["gated"];
    assert!(is_positive(&gated["gated_step_ms"]["2"]) && is_positive(&gated["relative_step_time"]["2"]), "{gated}");
    assert_eq!((&gated["rank"], &gated["memory_over_ar"]), (&4.into(), &Value::Null));
    assert_eq!(gated["targets"], json!(["q_proj", "v_proj"]));
    for (index, batch_size) in [2, 3].into_iter().enumerate() {
        let collection = &first["collections"][index];
        assert_eq!((&collection["responses"], &collection["batch_size"]), (&4.into(), &batch_size.into()));
        for key in ["tokens_per_second", "tokens_per_forward", "fraction_of_bandwidth"] {
            assert!(is_positive(&collection[key]), "{key}: {collection}");
        }
        // A block's windows become shorter as its tokens become final.
        let window_tokens = collection["mean_window_tokens"].as_f64().unwrap();
        assert!(window_tokens > 1.0 && window_tokens < 4.0, "{collection}");
    }
    let strategies = first["strategies"].as_array().unwrap();
    assert_eq!(strategies.len(), 2);
    // In float32 on the CPU every strategy gives the answer of autoregressive decoding.
    assert!(strategies.iter().all(|strategy| strategy["exact_match_vs_ar"] == 1.0 && strategy["examples"] == 4));

    let two = format!("model={}", path(dir.path(), "two"));
    let names = |results: &Value| -> Vec<String> {
        results["models"].as_array().unwrap().iter().map(|model| model["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&bench(dir.path(), &[&two])), ["one", "two"]);
    assert_eq!(names(&bench(dir.path(), &[&one])), ["two", "one"], "a second record replaces the first");
}

#[test]
fn steps_that_are_no_windows_of_gated_are_left_out_aloud() {
    let dir = tempfile::tempdir().unwrap();
    let output = format!("output={}", path(dir.path(), "bench.json"));
    let more = ["shape=qwen3-tiny", "gated={rank: 4}", "step_tokens=[1, 2, 4, 48, 64]", &output];
    let run = EVAL.succeed(&[BENCH, &more].concat());
    let said = run.stderr;
    assert!(said.contains("gated: windows have at most 32 tokens, so it has no steps of 48, 64"), "{said}");
    let results: Value = serde_json::from_slice(&std::fs::read(dir.path().join("bench.json")).unwrap()).unwrap();
    let keys = |steps: &Value| steps.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let model = &results["models"][0];
    assert_eq!(keys(&model["gated"]["gated_step_ms"]), ["2", "4"]);
    assert_eq!(keys(&model["step_ms"]), ["1", "2", "4", "48", "64"]);
}

#[test]
fn a_collection_of_a_shape_needs_no_prompts() {
    let dir = tempfile::tempdir().unwrap();
    let results = bench(dir.path(), &["shape=qwen3-tiny", "collect_batch_sizes=[3]", "collect_n=4"]);
    let collection = &results["models"][0]["collections"][0];
    assert_eq!((&collection["responses"], &collection["n"]), (&6.into(), &4.into()));
    assert!((0.0..1.0).contains(&collection["fraction_of_bandwidth"].as_f64().unwrap()), "{collection}");
}

#[test]
fn the_recipe_compares_every_strategy() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("one"), 1);
    let prompts = path(dir.path(), "prompts.jsonl");
    std::fs::write(&prompts, r#"{"id":"0","prompt":"1 and 2 and 1 and 2 and"}"#).unwrap();
    let recipe = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/bench.yaml");
    let (one, prompts) = (format!("model={}", path(dir.path(), "one")), format!("prompts={prompts}"));
    let results = bench(dir.path(), &["-c", recipe, &one, &prompts, "max_new_tokens=20"]);
    let strategies = results["models"][0]["strategies"].as_array().unwrap();
    let name = |strategy: &Value| match &strategy["strategy"] {
        Value::String(name) => name.clone(),
        with_settings => with_settings.as_object().unwrap().keys().next().unwrap().clone(),
    };
    let names: Vec<String> = strategies.iter().map(name).collect();
    assert_eq!(names, ["ar", "jacobi", "rolling", "rolling", "multiblock", "lookahead"]);
    assert!(strategies.iter().all(|strategy| strategy["exact_match_vs_ar"] == 1.0), "{strategies:?}");
}

#[test]
fn contradictory_settings_and_files_of_other_machines_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    model(&dir.path().join("one"), 1);
    let (one, file) = (format!("model={}", path(dir.path(), "one")), path(dir.path(), "bench.json"));
    let output = format!("output={file}");
    let refused = |arguments: &[&str], word: &str| {
        EVAL.fail(&[BENCH, &[&output], arguments].concat(), 2, &[word]);
    };
    refused(&[], "`shape`");
    refused(&[&one, "shape=smollm2-135m"], "`shape`");
    refused(&["shape=smollm2-135m", "prompts=x.jsonl"], "prompts");
    refused(&[&one, "step_tokens=[0]"], "step_tokens");
    let gated = "gated={rank: 4}";
    refused(&[&one, gated, "step_tokens=[1, 33]"], "step_tokens has none");
    draft_adapters(&dir.path().join("adapted"), &dir.path().join("one"));
    let adapted = format!("model={}", path(dir.path(), "adapted"));
    refused(&[&adapted, gated], "`gated` measures random ones: set model=");
    let other = path(dir.path(), "other.json");
    std::fs::write(&other, r#"{"engine": "vllm", "ar_tokens_per_second": 1}"#).unwrap();
    refused(&[&one, &format!("baseline={other}")], "is a measurement of vllm, not of transformers");
    refused(&[&one, "strategies=[{lookahead: {window: 30}}]"], "window=30, ngram=4 and candidates=5");
    let mut results = bench(dir.path(), &[&one]);
    results["hardware"]["cpu"] = "another".into();
    std::fs::write(&file, results.to_string()).unwrap();
    refused(&[&one], "another machine");
}

#[test]
fn the_committed_results_have_the_fields_of_this_version() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/results/");
    for name in ["decode-h100.json", "decode-beside-transformers-h100.json", "strategies-h100.json"] {
        let text = std::fs::read_to_string(format!("{folder}{name}")).unwrap();
        let results: DecodeBenchResults = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(!results.models.is_empty());
    }
}
