//! Evaluations that are stopped at any of their operations on files give the same answers.

use std::path::Path;

use cllm_eval::records::Records;
use cllm_testing::programs::{Program, path};
use cllm_testing::torture::torture;

use crate::made_up::model;

const EVAL: Program = Program("cllm-eval");

/// The answers of a run, without the seconds.
fn answers(output: &Path) -> Vec<String> {
    let records = Records::read(&output.join("samples.jsonl")).unwrap();
    let answers = records.answers.iter().map(|answer| {
        format!("{:?}", (answer.role, answer.strategy, &answer.id, &answer.response_ids, answer.verdict))
    });
    answers.chain([output.join("results.json").exists().to_string()]).collect()
}

#[test]
fn stopped_anywhere_an_evaluation_gives_the_same_answers() {
    let dir = tempfile::tempdir().unwrap();
    let (teacher, output) = (path(dir.path(), "teacher"), dir.path().join("eval"));
    model(Path::new(&teacher), 1);
    let fixed = ["run", "num_problems=12", "max_new_tokens=12", "batch_size=3", "num_speed_examples=1", "device=cpu"];
    let given = [format!("teacher={teacher}"), format!("output={}", output.display())];
    torture(&EVAL, &[&fixed.map(str::to_owned)[..], &given].concat(), &output, answers);
}
