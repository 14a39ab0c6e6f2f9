//! `suite`: several benchmarks in one command.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use cllm_eval::records::{Records, SAMPLES};

use crate::made_up::{model, thinking_model};
use cllm_testing::programs::{Program, path};

const EVAL: Program = Program("cllm-eval");

#[test]
fn a_suite_runs_what_has_data_skips_the_rest_and_survives_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let [teacher, data, output] = ["teacher", "data", "output"].map(|name| path(dir.path(), name));
    model(Path::new(&teacher), 1);
    fs::create_dir_all(Path::new(&data).join("jsonl")).unwrap();
    let row = json!({ "id": "a", "prompt": "2 + 2 =", "reference": "4" });
    fs::write(Path::new(&data).join("jsonl/mine.jsonl"), row.to_string()).unwrap();
    fs::write(Path::new(&data).join("perplexity.txt"), "Tom has 3 apples. ".repeat(300)).unwrap();
    fs::create_dir_all(Path::new(&data).join("mt_bench")).unwrap();
    let row = json!({ "question_id": 81, "category": "math", "turns": ["2 + 2?", "And 3?"] });
    fs::write(Path::new(&data).join("mt_bench/question.jsonl"), row.to_string()).unwrap();
    let arguments = |more: &[&str]| {
        let given = [format!("teacher={teacher}"), format!("data={data}"), format!("output={output}")];
        let fixed = ["suite", "strategies=[ar]", "max_new_tokens=5", "num_speed_examples=1", "limit=2", "device=cpu"];
        let more: Vec<String> = more.iter().map(|&word| word.to_owned()).collect();
        [&fixed.map(str::to_owned)[..], &given, &more].concat()
    };
    let states = |stdout: &[u8]| -> Vec<(String, String)> {
        let document: Value = serde_json::from_slice(stdout).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let entries = document["benchmarks"].as_array().unwrap().iter();
        entries.map(|entry| (text(&entry["name"]), text(&entry["state"]))).collect()
    };
    let ended = EVAL.succeed(&arguments(&["--json"]));
    for (name, state) in states(&ended.stdout) {
        assert_eq!(
            state == "done",
            ["jsonl", "mt-bench", "perplexity", "synthetic"].contains(&name.as_str()),
            "{name}: {state}"
        );
    }
    let report = fs::read_to_string(Path::new(&output).join("report.md")).unwrap();
    assert!(report.contains("## jsonl") && report.contains("## synthetic"), "{report}");
    // It resumes finished benchmarks, and one that fails does not stop the others.
    let before = fs::read(Path::new(&output).join("synthetic/samples.jsonl")).unwrap();
    fs::create_dir_all(Path::new(&data).join("gsm8k")).unwrap();
    let ended = EVAL.run(&arguments(&[]));
    let text = String::from_utf8(ended.stdout).unwrap();
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(
        text.contains("gsm8k: failed: ")
            && text.contains("teacher: perplexity 2")
            && text.contains("spider: skipped: ")
            && text.contains("2 examples"),
        "{text}"
    );
    assert_eq!(fs::read(Path::new(&output).join("synthetic/samples.jsonl")).unwrap(), before);
    EVAL.fail(&["suite", "teacher=x", "data=no/such"], 2, &["no/such", "folder for each benchmark"]);
}

#[test]
fn a_suite_that_is_resumed_on_another_day_keeps_its_date_and_its_settings_reach_every_benchmark() {
    let dir = tempfile::tempdir().unwrap();
    let [teacher, data, output, template] =
        ["teacher", "data", "output", "own.jinja"].map(|name| path(dir.path(), name));
    thinking_model(Path::new(&teacher), 1);
    let source = "{% for m in messages %}{{ m.content }} {% endfor %}{{ strftime_now('%Y') }}";
    fs::write(&template, source).unwrap();
    fs::create_dir(&data).unwrap();
    let suite = |more: &[&str]| {
        let given = [("teacher", &teacher), ("data", &data), ("output", &output), ("chat_template", &template)];
        let given = given.map(|(key, value)| format!("{key}={value}"));
        let fixed = ["suite", "strategies=[ar]", "max_new_tokens=20", "max_thinking_tokens=4", "system=Be brief."];
        let limits = ["num_speed_examples=0", "limit=1", "device=cpu"];
        let given: Vec<&str> = given.iter().map(String::as_str).collect();
        EVAL.succeed(&[&fixed[..], &limits, &given, more].concat());
    };
    suite(&["date=2020-01-01"]);
    let row = json!({ "id": "a", "messages": [{ "role": "user", "content": "2 + 2 =" }], "reference": "4" });
    fs::write(Path::new(&data).join("jsonl.jsonl"), row.to_string()).unwrap();
    suite(&[]);
    for name in ["synthetic", "jsonl"] {
        let records = Records::read(&Path::new(&output).join(name).join(SAMPLES)).unwrap();
        let settings = &records.header.settings;
        assert_eq!((settings.max_thinking_tokens, settings.system.as_deref()), (Some(4), Some("Be brief.")));
        let prompt = &records.answers[0].prompt;
        assert!(prompt.starts_with("Be brief. ") && prompt.ends_with(" 2020"), "{name}: {prompt}");
    }
}
