//! Verdicts: what counts as right, while a run goes on and when its answers are scored again.

use std::fs;
use std::path::Path;

use cllm_core::task::Verdict;
use cllm_core::trajectory::FinishReason;
use cllm_eval::records::Records;
use serde_json::json;

use crate::made_up::model;
use crate::programs::{Program, path};

const EVAL: Program = Program("cllm-eval");

fn read(output: &str) -> Records {
    Records::read(&Path::new(output).join("samples.jsonl")).unwrap()
}

#[test]
fn an_answer_cut_at_the_length_limit_is_wrong_whatever_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let (teacher, prompts) = (path(dir.path(), "teacher"), path(dir.path(), "prompts.jsonl"));
    model(Path::new(&teacher), 1);
    let run = |reference: &str, output: &str| {
        let row = json!({ "id": "a", "source": "jsonl/test", "prompt": "2 + 2 =", "reference": reference });
        fs::write(&prompts, row.to_string()).unwrap();
        let given = [format!("teacher={teacher}"), format!("prompts={prompts}"), format!("output={output}")];
        let fixed = ["run", "strategies=[ar]", "max_new_tokens=5", "speed_examples=0", "device=cpu"];
        EVAL.succeed(&[&fixed.map(str::to_owned)[..], &given].concat());
        read(output).answers.remove(0)
    };
    let text = run("?", &path(dir.path(), "first")).text;
    let output = path(dir.path(), "second");
    let answer = run(&text, &output);
    assert_eq!((&answer.text, answer.finish_reason), (&text, FinishReason::Length));
    assert_eq!(answer.verdict, Verdict::Wrong);
    EVAL.succeed(&["score", &output]);
    assert_eq!(read(&output).answers[0].verdict, Verdict::Wrong);
    // The same text is right where the answer ended by itself.
    let mut records = read(&output);
    records.answers[0].finish_reason = FinishReason::Eos;
    records.write(&Path::new(&output).join("samples.jsonl")).unwrap();
    EVAL.succeed(&["score", &output]);
    assert_eq!(read(&output).answers[0].verdict, Verdict::Right);
}
