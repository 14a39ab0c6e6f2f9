//! `clean`: every rule.

use std::fs;
use std::path::Path;

use cllm_core::chat_template::Message;
use cllm_core::prompt_set::Prompt;
use cllm_core::trajectory::Trajectory;
use cllm_testing::programs::path;
use serde_json::{Value, json};

use crate::fixtures::{row, rows, run, run_error, run_json, teacher, tokenizer, write_data_set};

const EVALUATION_PROMPT: &str = "known";

/// One row for each rule, with the name of the rule as its id, and a row `good` that breaks none.
fn rows_that_break_rules() -> Vec<Trajectory> {
    let text = |text: &str| [tokenizer().encode(text).unwrap(), vec![0]].concat();
    let ended = |ids: Vec<i32>| [ids, vec![0]].concat();
    let good: Vec<i32> = (40..80).collect();
    let mut incorrect = row("incorrect_answer", &text("It is 5. #### 5"));
    (incorrect.source, incorrect.reference) = ("gsm8k/train".into(), Some("#### 7".into()));
    let mut in_evaluation = row("evaluation_prompt", &ended(good.clone()));
    in_evaluation.prompt_ids = tokenizer().encode_prompt(&Prompt::Text(EVALUATION_PROMPT.into())).unwrap().1;
    let mut duplicate = row("duplicate", &ended(good.clone()));
    duplicate.prompt_ids = row("good", &[0]).prompt_ids;
    let repeated_4grams: Vec<i32> = (0..8).flat_map(|turn| (40..55).chain([60 + turn]).collect::<Vec<_>>()).collect();
    let repeated_sentence = "Tom has many apples. a b c. Tom has many apples. d e f g. Tom has many apples. h";
    vec![
        row("good", &ended(good.clone())),
        row("empty", &[0]),
        row("unfinished", &good),
        row("token_run", &ended([good.clone(), vec![40; 12], vec![90, 91]].concat())),
        row("repeated_4grams", &ended(repeated_4grams)),
        row("periodic_tail", &ended([good.clone(), [60, 61, 62].repeat(4)].concat())),
        row("repeated_sentence", &text(repeated_sentence)),
        incorrect,
        in_evaluation,
        duplicate,
    ]
}

#[test]
fn every_rule_drops_its_row_and_a_good_row_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (lines, evaluation) = (path(dir.path(), "evaluation.jsonl"), path(dir.path(), "evaluation.parquet"));
    let sample = json!({ "id": "e", "source": "jsonl/test", "prompt": EVALUATION_PROMPT });
    fs::write(&lines, sample.to_string()).unwrap();
    run(&["prepare", "jsonl", "--data", &lines, "--output", &evaluation]).success();
    let input = write_data_set(&rows_that_break_rules());
    let output = path(dir.path(), "clean");
    let paths = [
        format!("input={}", input.path().display()),
        format!("output={output}"),
        format!("model={}", teacher()),
        format!("evaluation_prompts=[{evaluation}]"),
    ];
    let arguments =
        [&["clean", "--json", "drop_incorrect=true", "keep_dropped=true"], &paths.each_ref().map(String::as_str)[..]];
    let report = run_json(&arguments.concat());

    assert_eq!((&report["kept"], &report["dropped"]), (&json!(1), &json!(9)));
    assert_eq!(rows(&output)[0].sample_id, "good");
    let dropped = fs::read_to_string(Path::new(&output).join("dropped.jsonl")).unwrap();
    let dropped: Vec<Value> = dropped.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(dropped.len(), 9);
    for line in dropped {
        assert_eq!(line["rule"], line["row"]["sample_id"]);
        assert_eq!(report["rules"][line["rule"].as_str().unwrap()], 1);
    }
}

#[test]
fn an_evaluation_prompt_is_found_whatever_system_message_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let evaluation = path(dir.path(), "evaluation.jsonl");
    let message = |role: &str, content: &str| json!({ "role": role, "content": content });
    let with = json!({ "messages": [message("system", "Be kind."), message("user", "2 + 2?")] });
    fs::write(&evaluation, format!("{with}\n{}", json!({ "messages": [message("user", "3 + 3?")] }))).unwrap();
    let prompts = [(Some("Be brief."), "2 + 2?"), (None, "2 + 2?"), (Some("Be brief."), "3 + 3?"), (None, "4 + 4?")];
    let rows: Vec<Trajectory> = prompts
        .iter()
        .enumerate()
        .map(|(index, (system, question))| {
            let system = system.map(|text| Message::new("system", text));
            let messages: Vec<Message> = system.into_iter().chain([Message::new("user", *question)]).collect();
            let (prompt, prompt_ids) = tokenizer().encode_prompt(&Prompt::Conversation(messages.into())).unwrap();
            Trajectory {
                prompt,
                prompt_ids,
                ..row(&index.to_string(), &[&(40..80).collect::<Vec<_>>()[..], &[0]].concat())
            }
        })
        .collect();
    let input = write_data_set(&rows);
    let output = format!("output={}", path(dir.path(), "clean"));
    let input = format!("input={}", input.path().display());
    let (model, evaluation) = (format!("model={}", teacher()), format!("evaluation_prompts=[{evaluation}]"));
    let report = run_json(&["clean", "--json", &input, &output, &model, &evaluation]);
    assert_eq!((&report["kept"], &report["rules"]), (&json!(1), &json!({ "evaluation_prompt": 3 })));
}

#[test]
fn other_evaluation_prompts_in_the_same_file_are_no_repetition() {
    let dir = tempfile::tempdir().unwrap();
    let evaluation = path(dir.path(), "evaluation.jsonl");
    let input = write_data_set(&[row("a", &[&(40..80).collect::<Vec<_>>()[..], &[0]].concat())]);
    let arguments = [
        "clean".to_owned(),
        format!("input={}", input.path().display()),
        format!("output={}", path(dir.path(), "clean")),
        format!("model={}", teacher()),
        format!("evaluation_prompts=[{evaluation}]"),
    ];
    let arguments = arguments.each_ref().map(String::as_str);
    let put = |prompts: &[&str]| {
        let rows: Vec<String> = prompts.iter().map(|prompt| json!({ "prompt": prompt }).to_string()).collect();
        fs::write(&evaluation, rows.join("\n")).unwrap();
    };
    put(&["one", "two"]);
    run(&arguments).success();
    put(&["two", "one"]);
    run(&arguments).success();
    let moved = path(dir.path(), "moved.jsonl");
    fs::copy(&evaluation, &moved).unwrap();
    let elsewhere = format!("evaluation_prompts=[{moved}]");
    run(&[&arguments[..4], &[&elsewhere]].concat()).success();
    put(&["one", "three"]);
    let error = run_error(&arguments, 2);
    assert!(error.contains("was made by clean with evaluation_prompts_hash="), "{error}");
}
