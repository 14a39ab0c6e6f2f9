//! The command line: exit codes and what they say.

use std::process::Output;

use assert_cmd::Command;

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
fn plan_shows_parameters_memory_and_steps_and_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let file = dir.path().join("run.yaml");
    std::fs::write(&file, cllm_core::settings::to_yaml(&sft(dir.path(), "run")).unwrap()).unwrap();
    let output = run(&["plan", "-c", &file.display().to_string()]);
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    let text = String::from_utf8_lossy(&output.stdout);
    for word in ["parameters", "steps", "MB"] {
        assert!(text.contains(word), "{text}");
    }
    assert!(!dir.path().join("run").exists());
}

#[test]
fn a_missing_model_and_a_missing_data_set_end_with_2() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let output = dir.path().join("run").display().to_string();
    let missing = run(&["run", "model=/nowhere/at/all", "data=[x]", &format!("output={output}")]);
    assert_eq!(missing.status.code(), Some(2), "{}", errors(&missing));
    let mut settings = sft(dir.path(), "run");
    settings.data = vec![dir.path().join("none.jsonl")];
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
    cllm_train::trainer::run(cllm_train::settings::Settings { max_steps: 1, ..sft(dir.path(), "run") }).unwrap();
    let (from, to) = (dir.path().join("run/final"), dir.path().join("exported"));
    let arguments = ["export", &from.display().to_string(), "--output", &to.display().to_string()];
    let output = run(&arguments);
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    let size = |folder: &std::path::Path| std::fs::metadata(folder.join("model.safetensors")).unwrap().len() as f64;
    assert!((0.4..0.6).contains(&(size(&to) / size(&from))), "half the bytes");
    assert!(to.join("tokenizer.json").exists());
    assert_eq!(run(&arguments).status.code(), Some(2), "nothing is overwritten");
}
