//! The command line: exit codes and what they say.

use std::process::Output;

use assert_cmd::Command;

use serde_json::Value;

use crate::runs::{prepare, sft};

fn run(arguments: &[&str]) -> Output {
    Command::cargo_bin("cllm-train").unwrap().args(arguments).output().unwrap()
}

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_misspelt_key_ends_with_2_and_names_the_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("run.yaml");
    std::fs::write(&file, "optimizer:\n  learning: 1\n").unwrap();
    let in_file = run(&["validate", "-c", &file.display().to_string()]);
    assert_eq!(in_file.status.code(), Some(2));
    assert!(errors(&in_file).contains("run.yaml"), "{}", errors(&in_file));
    let on_line = run(&["run", "optimizer.lrr=1"]);
    assert_eq!(on_line.status.code(), Some(2));
    assert!(errors(&on_line).contains("did you mean `optimizer.lr`"), "{}", errors(&on_line));
    assert_eq!(run(&["validate", "optimizer.lr=7"]).status.code(), Some(2), "out of range");
}

#[test]
fn bench_puts_every_model_into_one_file_and_counts_what_its_steps_held() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = cllm_train::settings::Settings { epochs: 50, ..sft(dir.path(), "run") };
    let (file, results) = (dir.path().join("run.yaml"), dir.path().join("bench.json"));
    std::fs::write(&file, cllm_core::settings::to_yaml(&settings).unwrap()).unwrap();
    let (file, results_path) = (file.display().to_string(), results.display().to_string());
    let bench = |more: &[&str]| run(&[&["bench", "-c", &file, "--results", &results_path], more].concat());
    let mut bad = bench(&["--steps", "1000"]);
    assert!(bad.status.code() == Some(2) && errors(&bad).contains("1003 are measured"), "{}", errors(&bad));
    for name in ["a", "b", "a"] {
        bad = bench(&["--name", name, "--steps", "5"]);
        assert_eq!(bad.status.code(), Some(0), "{}", errors(&bad));
    }
    let found: Value = serde_json::from_str(&std::fs::read_to_string(&results).unwrap()).unwrap();
    let names: Vec<&str> = found["models"].as_array().unwrap().iter().filter_map(|m| m["name"].as_str()).collect();
    assert_eq!(names, ["b", "a"]);
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/data-format.md")).unwrap();
    for (key, value) in found["models"][0].as_object().unwrap() {
        assert!(key == "name" || page.contains(&format!("`{key}`")), "{key} is missing in docs/data-format.md");
        let counted = ["tokens_per_second", "responses_per_second", "step_seconds", "planned_memory_bytes"];
        assert!(!counted.contains(&key.as_str()) || value.as_f64().unwrap() > 0.0, "{key}: {value}");
    }
    assert!(!dir.path().join("run").exists(), "nothing else is written");
}

#[test]
fn plan_shows_parameters_memory_steps_and_time_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let file = dir.path().join("run.yaml");
    std::fs::write(&file, cllm_core::settings::to_yaml(&sft(dir.path(), "run")).unwrap()).unwrap();
    let file = file.display().to_string();
    let plan = |more: &[&str]| {
        let output = run(&[&["plan", "-c", &file], more].concat());
        assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let text = plan(&[]);
    for word in ["parameters  0.0", "steps", "MB at the peak", "about", "timed here"] {
        assert!(text.contains(word), "{text}");
    }
    assert!(plan(&["--no-timing"]).contains("unknown"));
    let document = |more: &[&str]| serde_json::from_str::<Value>(&plan(&[&["--json"], more].concat())).unwrap();
    let (small, large) = (document(&[]), document(&["max_batch_tokens=256", "--no-timing"]));
    let memory = |plan: &Value, part: &str| plan["memory_bytes"][part].as_f64().unwrap();
    // Float32: a weight, a gradient and two moments, of which only the activations know the batch.
    let fixed = 16.0 * small["parameters"].as_f64().unwrap();
    for plan in [&small, &large] {
        assert_eq!(memory(plan, "peak"), fixed + memory(plan, "activations"));
    }
    let growth = memory(&large, "activations") / memory(&small, "activations");
    assert!((1.7..2.3).contains(&growth), "{growth}");
    let duration = &small["duration"]["estimated"];
    let whole = duration["seconds_per_step"].as_f64().unwrap() * small["steps"].as_f64().unwrap();
    let seconds = duration["seconds"].as_f64().unwrap();
    assert!(whole > 0.0 && (seconds / whole - 1.0).abs() < 1e-9, "{small}");
    assert!(large["duration"]["unknown"].is_object(), "{large}");
    assert!(!dir.path().join("run").exists());
}

#[test]
fn a_missing_model_and_a_missing_data_set_end_with_2() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let output = dir.path().join("run").display().to_string();
    let missing = run(&["run", "model=/nowhere/at/all", "datasets=[x]", &format!("output={output}")]);
    assert_eq!(missing.status.code(), Some(2), "{}", errors(&missing));
    let mut settings = sft(dir.path(), "run");
    settings.datasets = vec![dir.path().join("none.jsonl")];
    let file = dir.path().join("run.yaml");
    std::fs::write(&file, cllm_core::settings::to_yaml(&settings).unwrap()).unwrap();
    let missing = run(&["run", "-c", &file.display().to_string()]);
    assert_eq!(missing.status.code(), Some(2), "{}", errors(&missing));
    assert!(errors(&missing).contains("none.jsonl"), "{}", errors(&missing));
}

#[test]
fn export_casts_the_weights_and_keeps_the_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    cllm_train::trainer::run(cllm_train::settings::Settings { max_steps: Some(1), ..sft(dir.path(), "run") }).unwrap();
    let (from, to) = (dir.path().join("run/final"), dir.path().join("exported"));
    let arguments = ["export", &from.display().to_string(), "--output", &to.display().to_string()];
    let output = run(&arguments);
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    let size = |folder: &std::path::Path| std::fs::metadata(folder.join("model.safetensors")).unwrap().len() as f64;
    assert!((0.4..0.6).contains(&(size(&to) / size(&from))), "half the bytes");
    assert!(to.join("tokenizer.json").exists());
    assert_eq!(run(&arguments).status.code(), Some(2), "nothing is overwritten");
}
