//! `clean`: every rule.

use std::fs;
use std::path::Path;

use cllm_core::prompt_set::Prompt;
use cllm_testing::programs::path;
use serde_json::{Value, json};

use crate::fixtures::{row, rows, run, run_json, teacher, tokenizer, write_data_set};

#[test]
fn every_rule_drops_its_row_and_a_good_row_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let text = |text: &str| [tokenizer().encode(text).unwrap(), vec![0]].concat();
    let ended = |ids: Vec<i32>| [ids, vec![0]].concat();
    let good: Vec<i32> = (40..80).collect();
    let mut wrong = row("wrong", &text("It is 5. #### 5"));
    (wrong.source, wrong.reference) = ("gsm8k/train".into(), Some("#### 7".into()));
    let (lines, eval) = (path(dir.path(), "eval.jsonl"), path(dir.path(), "eval.parquet"));
    let sample = json!({ "id": "e", "source": "jsonl/test", "prompt": "known" });
    fs::write(&lines, sample.to_string()).unwrap();
    run(&["prepare", "jsonl", "--data", &lines, "--output", &eval]).success();
    let mut known = row("known", &ended(good.clone()));
    known.prompt_ids = tokenizer().encode_prompt(&Prompt::Text("known".into())).unwrap().1;
    let mut again = row("again", &ended(good.clone()));
    again.prompt_ids = row("good", &[0]).prompt_ids;
    let loops: Vec<i32> = (0..8).flat_map(|turn| (40..55).chain([60 + turn]).collect::<Vec<_>>()).collect();
    let input = write_data_set(&[
        row("good", &ended(good.clone())),
        row("empty", &[0]),
        row("unfinished", &good),
        row("run", &ended([good.clone(), vec![40; 12], vec![90, 91]].concat())),
        row("grams", &ended(loops)),
        row("tail", &ended([good.clone(), [60, 61, 62].repeat(4)].concat())),
        row("sentence", &text("Tom has many apples. a b c. Tom has many apples. d e f g. Tom has many apples. h")),
        wrong,
        known,
        again,
    ]);
    let output = path(input.path(), "clean");
    let arguments = [
        "clean".to_owned(),
        format!("input={}", input.path().display()),
        format!("output={output}"),
        format!("model={}", teacher()),
        format!("evaluation_prompts=[{eval}]"),
        "drop_incorrect=true".to_owned(),
        "keep_dropped=true".to_owned(),
        "--json".to_owned(),
    ];
    let report = run_json(&arguments.each_ref().map(String::as_str));
    let dropped = fs::read_to_string(Path::new(&output).join("dropped.jsonl")).unwrap();
    let dropped: Vec<Value> = dropped.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut rules: Vec<_> = dropped
        .iter()
        .map(|line| (line["row"]["sample_id"].as_str().unwrap(), line["rule"].as_str().unwrap()))
        .collect();
    rules.sort_unstable();
    let mut expected = vec![
        ("again", "duplicate"),
        ("empty", "empty"),
        ("grams", "repeated_4grams"),
        ("known", "evaluation_prompt"),
        ("run", "token_run"),
        ("sentence", "repeated_sentence"),
        ("tail", "periodic_tail"),
        ("unfinished", "unfinished"),
        ("wrong", "incorrect_answer"),
    ];
    expected.sort_unstable();
    assert_eq!(rules, expected);
    assert_eq!((&report["kept"], &report["dropped"]), (&json!(1), &json!(9)));
    assert!(rules.iter().all(|(_, rule)| report["rules"][rule] == 1));
    assert_eq!(rows(&output)[0].sample_id, "good");
}
