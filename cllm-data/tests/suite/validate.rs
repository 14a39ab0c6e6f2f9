//! `validate`: rows that break a guarantee, and models that did not collect the data set.

use std::fs;

use cllm_core::checkpoint;
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::trajectory::Trajectory;
use cllm_testing::programs::path;
use serde_json::{Value, json};

use crate::fixtures::{DATA, collect, row, run, run_error, teacher, write_data_set};

#[test]
fn validate_counts_the_rows_that_break_a_guarantee() {
    let mut bad = row("bad", &[5, 6, 7, 0]);
    bad.blocks[0].states[2][1] = 77;
    let validate = |rows: &[Trajectory]| {
        let dir = write_data_set(rows);
        let report = run(&["validate", &dir.path().display().to_string(), "--json"]).code(1);
        let report: Value = serde_json::from_slice(&report.get_output().stdout).unwrap();
        (dir, report)
    };
    let (dir, report) = validate(&[row("good", &[5, 6, 7, 0]), bad]);
    assert_eq!(report["violations"], 1);
    assert!(report["first"][0].as_str().unwrap().starts_with("bad: "));
    let mut past = row("past", &[5, 6, 7, 0]);
    past.blocks.extend(row("more", &[5, 6, 7, 0, 5, 6, 7, 0]).blocks.split_off(1));
    let (_, report) = validate(&[
        row("twice", &[5, 6, 7, 0]),
        row("twice", &[5, 6, 0]),
        row("short", &[5, 6]),
        row("early", &[5, 0, 0]),
        past,
    ]);
    let violations: Vec<&str> = report["first"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let expected = [
        "twice: an earlier row has the same sample_id",
        "short: finish_reason is length at 2",
        "early: token 1",
        "past: block 1 starts at 4",
    ];
    assert_eq!(violations.len(), expected.len(), "{violations:?}");
    assert!(violations.iter().zip(expected).all(|(violation, start)| violation.starts_with(start)), "{violations:?}");
    assert!(run_error(&["stats", &dir.path().display().to_string()], 2).contains("`bad`"));
}

#[test]
fn validate_compares_the_data_set_with_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let (data, model) = (path(dir.path(), "data"), teacher());
    collect(&data, &["limit=4"]);
    DATA.succeed(&["validate", &data, "--model", &model]);
    // A model with another tokenizer and a smaller vocabulary: all three differ, and some ids are
    // out of range.
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 262, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "tie_word_embeddings": true,
    });
    let config = ModelConfig::from_json(&config).unwrap();
    let random = Transformer::random(config, 1, tch::Device::Cpu, tch::Kind::Float);
    checkpoint::save(&random, &other, tch::Kind::Float).unwrap();
    cllm_testing::train_tokenizer(["Other"], 262, &other);
    let finished = DATA.run(&["validate", &data, "--model", &path(dir.path(), "other")]);
    let text = String::from_utf8(finished.stdout).unwrap();
    assert_eq!(finished.code, Some(1), "{text}{}", finished.stderr);
    for part in
        ["teacher: ", "tokenizer: ", "vocabulary: 300 in the data set, 262 in ", "outside the vocabulary of 262"]
    {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    DATA.fail(&["validate", &data, "--model", "no/such/model"], 2, &["no/such/model"]);
}
