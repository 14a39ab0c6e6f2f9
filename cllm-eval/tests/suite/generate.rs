//! `generate` with a prompt.

use serde_json::Value;

use crate::made_up::{model, program};

#[test]
fn generate_gives_the_same_answer_with_both_strategies() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), 3);
    let output = program()
        .args(["generate", "What is 2 and 2?", "--n", "5", "--max-new-tokens", "20", "--device", "cpu", "--json"])
        .arg("--model")
        .arg(dir.path())
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{message}");
    assert!(message.contains("rolling n=5") && message.contains("same tokens; rolling is"), "{message}");
    let value: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(value["equal"], true);
    assert_eq!(value["strategies"][0]["tokens"], value["strategies"][0]["forwards"]);
}

#[test]
fn a_system_message_goes_before_the_prompt() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), 3);
    let generate = |more: &[&str]| {
        let fixed = ["generate", "What is 2 and 2?", "--max-new-tokens", "8", "--device", "cpu", "--json", "--model"];
        program().args(fixed).arg(dir.path()).args(more).output().unwrap()
    };
    assert!(generate(&["--system", "Be brief."]).status.success());
    // It is in the prompt, which is too long with it.
    let too_long = generate(&["--system", &"Be brief. ".repeat(1000)]);
    assert_eq!(too_long.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&too_long.stderr).contains("context"));
    let refused = generate(&["--system", "x", "--raw"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("cannot be used with"));
}

#[test]
fn generate_ends_an_answer_at_the_given_ids() {
    let dir = tempfile::tempdir().unwrap();
    model(dir.path(), 3);
    let generate = |more: &[&str]| {
        let fixed = ["generate", "What is 2 and 2?", "--max-new-tokens", "20", "--device", "cpu", "--json", "--model"];
        let output = program().args(fixed).arg(dir.path()).args(more).output().unwrap();
        let value: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        (value["strategies"][1].clone(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (whole, message) = generate(&[]);
    let ids: Vec<i64> = whole["response_ids"].as_array().expect(&message).iter().filter_map(Value::as_i64).collect();
    let (cut, _) = generate(&["--eos-ids", &format!("299,{}", ids[3])]);
    let end = ids.iter().position(|&id| id == ids[3] || id == 299).unwrap() + 1;
    assert_eq!(cut["response_ids"], serde_json::json!(ids[..end]));
    assert_eq!(cut["finish_reason"], "eos");
    let (_, message) = generate(&["--eos-ids", "2,999"]);
    assert!(message.contains("eos_ids: 999 is not in the vocabulary") && message.contains("0 to 299"), "{message}");
}
