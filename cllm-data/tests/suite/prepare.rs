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
    assert!(refused.contains("gsm8k, spider and codesearchnet have them"), "{refused}");
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
    // Rows without an id get the same one from every program.
    fs::write(&plain, row("") + &row("")).unwrap();
    collect(&path(dir.path(), "other"), &[&prompts]);
    let ids: Vec<String> = rows(&path(dir.path(), "other")).into_iter().map(|row| row.sample_id).collect();
    assert_eq!(ids, ["jsonl-1", "jsonl-2"]);
    run(&["prepare", "jsonl", "--data", &plain, "--output", &output]).success();
    let text = fs::read_to_string(&output).unwrap();
    assert!(text.contains("jsonl-1") && text.contains("jsonl-2"), "{text}");
}

/// The rows of a prompt set, as JSON.
fn json_rows(file: &str) -> Vec<Value> {
    fs::read_to_string(file).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn chats_become_prompts_with_the_turns_the_system_message_and_the_fields_that_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let (chats, output) = (path(dir.path(), "chats.json"), path(dir.path(), "prompts.jsonl"));
    let turn = |from: &str, value: &str| json!({ "from": from, "value": value });
    let chat = json!([{ "id": "x", "conversations": [turn("human", "1"), turn("gpt", "2"), turn("human", "3"), turn("gpt", "4")] }]);
    fs::write(&chats, chat.to_string()).unwrap();
    let prepare = |more: &[&str]| {
        DATA.succeed(&[&["prepare", "jsonl", "--data", &chats, "--output", &output], more].concat());
        json_rows(&output)
    };
    let last = prepare(&[]);
    assert_eq!((last.len(), &last[0]["id"], &last[0]["reference"]), (1, &json!("x"), &json!("4")));
    assert_eq!(last[0]["messages"].as_array().unwrap().len(), 3);
    let all = prepare(&["--turns", "all", "--system", "Be brief."]);
    assert_eq!([&all[0]["id"], &all[1]["id"]], ["x#1", "x#2"]);
    let user = json!({ "role": "user", "content": "1" });
    assert_eq!(all[0]["messages"], json!([{ "role": "system", "content": "Be brief." }, user]));
    assert_eq!([&all[0]["reference"], &all[1]["reference"]], ["2", "4"]);
    fs::write(&chats, r#"{"query": "1?", "solution": 2, "level": 3}"#).unwrap();
    let mapped = prepare(&["--map", "question=query,reference=solution"]);
    let expected = json!({ "id": "jsonl-1", "source": "jsonl", "messages": [{ "role": "user", "content": "1?" }],
        "reference": "2", "meta": { "level": 3 } });
    assert_eq!(mapped, [expected]);
    DATA.fail(
        &["prepare", "jsonl", "--data", &chats, "--output", &output, "--map", "x=y"],
        2,
        &["`x=y` is not NAME=FIELD"],
    );
    DATA.fail(&["prepare", "synthetic", "--output", &output, "--strict"], 2, &["--strict are for jsonl"]);
}

#[test]
fn what_a_file_loses_is_counted_by_reason_and_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, output) = (path(dir.path(), "rows.jsonl"), path(dir.path(), "prompts.jsonl"));
    let good = r#"{"question": "2+2?", "answer": 4, "topic": "sums", "level": 1}"#;
    let image = r#"{"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]}"#;
    fs::write(&rows, [good, "{", image, good, r#"{"question": "\ud83d?", "answer": 5}"#, image].join("\n")).unwrap();
    let arguments = ["prepare", "jsonl", "--data", &rows, "--output", &output];
    let said = DATA.succeed(&arguments).stderr;
    for part in [
        "rows.jsonl: half of a character (a lone `\\ud…` escape) became U+FFFD in 1 line, first in line 5",
        "rows.jsonl: set aside 3 of 6 rows:\n",
        "\n  line 2 is not JSON: EOF while parsing an object at column 1\n",
        "\n  line 3 has a message that is not text: message 1 has a part of type `image` (and 1 row like it)\n",
        "rows.jsonl: kept in meta: topic, level\n",
        "3 prompts in ",
        ", 3 with a reference\n",
    ] {
        assert_eq!(said.matches(part).count(), 1, "`{part}` in: {said}");
    }
    let ids: Vec<Value> = json_rows(&output).iter().map(|row| row["id"].clone()).collect();
    assert_eq!(ids, ["jsonl-1", "jsonl-4", "jsonl-5"]);
    let strict = [&arguments[..], &["--strict"]].concat();
    DATA.fail(&strict, 2, &["rows.jsonl: line 2 is not JSON"]);
    // Other verbs read the same file in the same way, and tell the same.
    let (model, prompts) = (format!("model={}", teacher()), format!("prompts={rows}"));
    let data = path(dir.path(), "data");
    let into = format!("output={data}");
    let collected = DATA.succeed(&["collect", &model, &prompts, &into, "n=8", "max_new_tokens=8", "device=cpu"]).stderr;
    assert!(collected.contains("set aside 3 of 6 rows"), "{collected}");
    assert_eq!(collect(&path(dir.path(), "counted"), &[&prompts])["set_aside"], 3);
    fs::write(&rows, "{}\n").unwrap();
    fs::remove_file(&output).unwrap();
    DATA.fail(&arguments, 2, &["rows.jsonl: none of 1 row can be read", "has no known form", "--map prompt=FIELD"]);
    assert!(!Path::new(&output).exists());
}

#[test]
fn an_empty_answer_is_counted_and_the_file_that_is_read_is_not_written_over() {
    let dir = tempfile::tempdir().unwrap();
    let (rows, output) = (path(dir.path(), "rows.jsonl"), path(dir.path(), "prompts.jsonl"));
    let text = "{\"prompt\": \"Hi\", \"answer\": \"\"}\n";
    fs::write(&rows, text).unwrap();
    let said = DATA.succeed(&["prepare", "jsonl", "--data", &rows, "--output", &output]).stderr;
    assert!(said.contains("no reference for 1 prompt with an empty answer"), "{said}");
    let same = path(dir.path(), "./rows.jsonl");
    DATA.fail(&["prepare", "jsonl", "--data", &rows, "--output", &same], 2, &["is the file that is read"]);
    assert_eq!(fs::read_to_string(&rows).unwrap(), text);
}

#[test]
fn the_default_split_is_one_that_the_benchmark_has_and_an_empty_split_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (data, output) = (path(dir.path(), ""), path(dir.path(), "prompts.jsonl"));
    let mbpp = json!({"task_id": 11, "prompt": "Add.", "code": "def add(): pass", "test_imports": [], "test_list": ["assert add"]});
    fs::write(dir.path().join("mbpp.jsonl"), mbpp.to_string()).unwrap();
    let words = ["prepare", "mbpp", "--data", &data, "--output", &output];
    DATA.fail(&words, 2, &["no rows of the split `train` of mbpp: choose one of test"]);
    assert!(!Path::new(&output).exists());
    let problem = json!({"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": "    pass\n",
        "test": "def check(f):\n    pass\n", "entry_point": "f"});
    fs::write(dir.path().join("HumanEval.jsonl"), problem.to_string()).unwrap();
    DATA.succeed(&["prepare", "humaneval", "--data", &data, "--output", &output]);
    assert_eq!(fs::read_to_string(&output).unwrap().lines().count(), 1);
}
