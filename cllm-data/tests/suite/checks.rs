//! What `validate` and `stats` say of rows made by hand.

use cllm_core::trajectory::Trajectory;
use serde_json::{Value, json};

use crate::{json_of, made, message, row, run};

#[test]
fn stats_profile_whole_blocks_that_decoding_left() {
    // Two whole blocks, in each of which token 2 is right one state before its turn, and one cut by the end.
    let mut shown = row("a", &[10, 11, 12, 13, 14, 15, 16, 17, 0]);
    for block in &mut shown.blocks[..2] {
        let last = block.states[2].clone();
        block.states[1] = vec![last[0], last[1] ^ 1, last[2], last[3] ^ 1];
    }
    let dir = made(&[shown.clone()]);
    let found = json_of(&["stats", &dir.path().display().to_string(), "--json"]);
    assert_eq!(
        (&found["blocks"], &found["stationary"], &found["fast_forwarded"]),
        (&json!(3), &json!(1.0), &json!(2.0))
    );
    shown.augmented = Some(vec![vec![true, false, false]; 3]);
    let dir = made(&[shown]);
    let data = dir.path().display().to_string();
    let found = json_of(&["stats", &data, "--json"]);
    assert_eq!((&found["stationary"], &found["fast_forwarded"]), (&Value::Null, &Value::Null));
    let text = String::from_utf8(run(&["stats", &data]).success().get_output().stdout.clone()).unwrap();
    assert!(text.contains("stationary a block: unknown"), "{text}");
}

#[test]
fn validate_counts_the_rows_that_break_their_promises() {
    let mut bad = row("bad", &[5, 6, 7, 0]);
    bad.blocks[0].states[2][1] = 77;
    let validate = |rows: &[Trajectory]| {
        let dir = made(rows);
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
    let found: Vec<&str> = report["first"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
    let expected = [
        "twice: this sample_id stands",
        "short: finish_reason is length at 2",
        "early: token 1",
        "past: block 1 starts at 4",
    ];
    assert!(found.len() == 4 && found.iter().zip(expected).all(|(found, part)| found.starts_with(part)), "{found:?}");
    assert!(message(&["stats", &dir.path().display().to_string()], 2).contains("`bad`"));
}
