//! `prepare`: prompt sets from benchmarks and from plain files.

use std::fs;
use std::path::Path;

use cllm_testing::programs::path;
use serde_json::{Value, json};

use crate::fixtures::{DATA, collect, prompt_set, rows, run, run_error, teacher};

#[test]
fn prompt_sets_whose_names_end_in_parquet_are_parquet() {
    let dir = tempfile::tempdir().unwrap();
    let (prompts, back) = (path(dir.path(), "prompts.parquet"), path(dir.path(), "back.jsonl"));
    run(&["prepare", "synthetic", "--num-problems", "24", "--output", &prompts]).success();
    assert!(fs::read(&prompts).unwrap().starts_with(b"PAR1"));
    run(&["prepare", "jsonl", "--data", &prompts, "--output", &back]).success();
    assert_eq!(fs::read(&back).unwrap(), fs::read(prompt_set()).unwrap());
    let data = path(dir.path(), "a");
    assert_eq!(collect(&data, &[&format!("prompts={prompts}"), "limit=4"])["total"]["rows"], 4);
}

#[test]
fn variants_follow_the_prompts_and_have_no_answers() {
    let dir = tempfile::tempdir().unwrap();
    let rows = r#"{"question": "Tom has 3 pens and buys 25. How many?", "answer": "28\n#### 28"}"#;
    fs::write(dir.path().join("train.jsonl"), rows).unwrap();
    let (data, output) = (path(dir.path(), ""), path(dir.path(), "prompts.jsonl"));
    run(&["prepare", "gsm8k", "--data", &data, "--variants", "2", "-o", &output]).success();
    let text = fs::read_to_string(&output).unwrap();
    let samples: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let ids: Vec<&str> = samples.iter().map(|row| row["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["gsm8k-train-0", "gsm8k-train-0-variant-0", "gsm8k-train-0-variant-1"]);
    assert!(samples[0]["reference"].is_string() && samples[1..].iter().all(|row| row["reference"].is_null()), "{text}");
    let refused = run_error(&["prepare", "synthetic", "--num-problems", "2", "--variants", "1", "-o", &output], 2);
    assert!(refused.contains("only gsm8k and spider"), "{refused}");
}

#[test]
fn plain_jsonl_is_a_prompt_set() {
    let dir = tempfile::tempdir().unwrap();
    let (plain, output) = (path(dir.path(), "plain.jsonl"), path(dir.path(), "prompts.jsonl"));
    let row = |id: &str| format!("{{{id}\"prompt\": \"2+2=\", \"reference\": \"4\", \"level\": 3}}\n");
    fs::write(&plain, row("\"id\": \"a\", ")).unwrap();
    let prompts = format!("prompts={plain}");
    collect(&path(dir.path(), "data"), &[&prompts]);
    let row_of_plain = &rows(&path(dir.path(), "data"))[0];
    assert_eq!((row_of_plain.source.as_str(), row_of_plain.meta.as_deref()), ("jsonl", Some("{\"level\":3}")));
    fs::write(&plain, row("") + &row("")).unwrap();
    let (model, into) = (format!("model={}", teacher()), format!("output={}", path(dir.path(), "other")));
    assert!(run_error(&["collect", &model, &prompts, &into], 2).contains("`cllm-data prepare jsonl`"));
    run(&["prepare", "jsonl", "--data", &plain, "--output", &output]).success();
    let text = fs::read_to_string(&output).unwrap();
    assert!(text.contains("jsonl-1") && text.contains("jsonl-2"), "{text}");
}

#[test]
fn the_default_split_is_one_that_the_benchmark_has_and_an_empty_split_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (data, output) = (path(dir.path(), ""), path(dir.path(), "prompts.jsonl"));
    let mbpp = json!({"task_id": 11, "prompt": "Add.", "code": "def add(): pass", "test_imports": [], "test_list": ["assert add"]});
    fs::write(dir.path().join("mbpp.jsonl"), mbpp.to_string()).unwrap();
    let words = ["prepare", "mbpp", "--data", &data, "--output", &output];
    DATA.fail(&words, 2, &["no prompts of the split `train` of mbpp"]);
    assert!(!Path::new(&output).exists());
    let problem = json!({"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    pass\n",
        "test": "def check(f):\n    pass\n", "entry_point": "f"});
    fs::write(dir.path().join("HumanEval.jsonl"), problem.to_string()).unwrap();
    DATA.succeed(&["prepare", "humaneval", "--data", &data, "--output", &output]);
    assert_eq!(fs::read_to_string(&output).unwrap().lines().count(), 1);
}
