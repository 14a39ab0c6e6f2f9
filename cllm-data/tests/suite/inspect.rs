//! `inspect`: early and wrong tokens are marked.

use crate::fixtures::{row, run_error, run_json, run_text, write_data_set};
use serde_json::json;

#[test]
fn inspect_marks_early_and_wrong_tokens() {
    let mut shown = row("a", &[5, 6, 7, 0]);
    shown.blocks[0].states = vec![vec![5, 9, 7, 1], vec![5, 6, 7, 0]];
    let dir = write_data_set(&[row("first", &[5, 6, 7, 0]), shown]);
    let data = dir.path().display().to_string();
    let text = run_text(&["inspect", &data, "--sample", "a"]);
    assert!(text.contains("5 -9 +7 -1\n") && !text.contains('\u{1b}'), "{text}");
    assert!(text.contains("prompt\n    a\n") && text.contains("4 tokens, ended by EOS"), "{text}");
    assert_eq!(run_text(&["inspect", &data, "--row", "2"]), text);
    assert!(run_error(&["inspect", &data, "--row", "3"], 2).contains("has no row 3: it has 2 rows"));
    let states = &run_json(&["inspect", &data, "--sample", "a", "--json"])["blocks"][0]["states"];
    assert_eq!(states[0]["statuses"], json!(["final", "wrong", "early", "wrong"]));
    assert!(run_error(&["inspect", &data, "--sample", "b"], 2).contains("`b`"));
}
