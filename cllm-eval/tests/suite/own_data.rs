//! A user's own file, in each of the forms that people have, through all three programs: from the
//! file to a trained student and a report.

use std::fs;
use std::path::Path;

use cllm_testing::programs::{Program, path};
use serde_json::{Value, json};

const DATA: Program = Program("cllm-data");
const TRAIN: Program = Program("cllm-train");
const EVAL: Program = Program("cllm-eval");
const NUM_ROWS: usize = 50;

/// The same questions and answers in four forms: file name and contents.
fn files() -> [(&'static str, String); 4] {
    let rows = |form: &dyn Fn(String, String) -> Value| -> Vec<Value> {
        let row = |index| form(format!("What is {index} and one?"), format!("It is {}.", index + 1));
        (0..NUM_ROWS).map(row).collect()
    };
    let lines = |rows: Vec<Value>| rows.iter().map(|row| format!("{row}\n")).collect::<String>();
    let message = |role: &str, content: String| json!({ "role": role, "content": content });
    let openai = |question, answer| json!({ "messages": [message("user", question), message("assistant", answer)] });
    let trl = |question, answer| json!({ "prompt": [message("user", question)], "completion": [message("assistant", answer)] });
    let sharegpt = |question: String, answer: String| json!({ "conversations": [{ "from": "human", "value": question }, { "from": "gpt", "value": answer }] });
    let alpaca = |question: String, answer: String| json!({ "instruction": question, "input": "", "output": answer });
    [
        ("openai.jsonl", lines(rows(&openai))),
        ("sharegpt.json", json!(rows(&sharegpt)).to_string()),
        ("trl.jsonl", lines(rows(&trl))),
        ("alpaca.json", json!(rows(&alpaca)).to_string()),
    ]
}

/// Trains a tokenizer and a tiny teacher on a prompt set.
fn train_teacher(dir: &Path, prompts: &str) -> String {
    let (tokenizer, run) = (path(dir, "tokenizer"), path(dir, "teacher"));
    TRAIN.succeed(&["tokenizer", prompts, "--vocab-size", "300", "--output", &tokenizer]);
    let sizes =
        "hidden_size: 32, intermediate_size: 48, num_layers: 1, num_heads: 2, num_kv_heads: 1, max_positions: 128";
    let (init, datasets) = (format!("init={{tokenizer: {tokenizer}, {sizes}}}"), format!("datasets=[{prompts}]"));
    TRAIN.succeed(&[
        "run",
        &init,
        "objective=sft",
        &datasets,
        &format!("output={run}"),
        "max_steps=4",
        "max_batch_tokens=2048",
        "max_example_tokens=128",
        "save_every=null",
        "device=cpu",
    ]);
    path(Path::new(&run), "final")
}

#[test]
fn chats_of_every_form_go_from_their_file_to_a_student_and_a_report() {
    let dir = tempfile::tempdir().unwrap();
    let mut teacher = None;
    let mut first_prompts = None;
    for (name, contents) in files() {
        let at = |file: &str| path(dir.path(), &format!("{name}-{file}"));
        let own = path(dir.path(), name);
        fs::write(&own, contents).unwrap();
        let prompts = at("prompts.jsonl");
        DATA.succeed(&["prepare", "jsonl", "--data", &own, "--output", &prompts]);
        // All forms say the same, so that they become the same prompts.
        let text = fs::read_to_string(&prompts).unwrap();
        assert_eq!(text.lines().count(), NUM_ROWS);
        assert_eq!(&text, first_prompts.get_or_insert_with(|| text.clone()), "{name}");
        let teacher = teacher.get_or_insert_with(|| train_teacher(dir.path(), &prompts));
        let (trajectories, student, results) = (at("trajectories"), at("student"), at("eval"));
        DATA.succeed(&[
            "collect",
            &format!("model={teacher}"),
            &format!("prompts={prompts}"),
            &format!("output={trajectories}"),
            "n=4",
            "max_new_tokens=8",
            "device=cpu",
        ]);
        TRAIN.succeed(&[
            "run",
            &format!("model={teacher}"),
            &format!("datasets=[{trajectories}]"),
            &format!("output={student}"),
            "max_steps=2",
            "max_batch_tokens=2048",
            "max_example_tokens=256",
            "save_every=null",
            "device=cpu",
        ]);
        EVAL.succeed(&[
            "run",
            &format!("teacher={teacher}"),
            &format!("student={student}/final"),
            &format!("prompts={own}"),
            &format!("output={results}"),
            "system=Be brief.",
            "num_speed_examples=1",
            "max_new_tokens=8",
            "limit=20",
            "strategies=[ar, {jacobi: {n: 4}}]",
            "device=cpu",
        ]);
        EVAL.succeed(&["report", &results]);
        let samples = fs::read_to_string(Path::new(&results).join("samples.jsonl")).unwrap();
        let answer: Value = serde_json::from_str(samples.lines().nth(1).unwrap()).unwrap();
        assert!(answer["prompt"].as_str().unwrap().contains("Be brief."), "{answer}");
        assert_eq!(answer["reference"], "It is 1.");
        let report = fs::read_to_string(Path::new(&results).join("report.md")).unwrap();
        assert!(report.contains("jacobi"), "{report}");
    }
}
