//! `stats`: the profile of rows written by hand.

use serde_json::{Value, json};

use crate::fixtures::{row, run_json, run_text, write_data_set};

#[test]
fn stats_profile_whole_blocks_that_were_not_augmented() {
    // Two whole blocks in which token 2 is correct while token 1 is still wrong, and one that EOS
    // cuts.
    let mut shown = row("a", &[10, 11, 12, 13, 14, 15, 16, 17, 0]);
    for block in &mut shown.blocks[..2] {
        let last = block.states[2].clone();
        block.states[1] = vec![last[0], last[1] ^ 1, last[2], last[3] ^ 1];
    }
    let dir = write_data_set(&[shown.clone()]);
    let stats = run_json(&["stats", &dir.path().display().to_string(), "--json"]);
    assert_eq!(
        (&stats["blocks"], &stats["stationary"], &stats["fast_forwarded"]),
        (&json!(3), &json!(1.0), &json!(2.0))
    );
    shown.augmented = Some(vec![vec![true, false, false]; 3]);
    let dir = write_data_set(&[shown]);
    let data = dir.path().display().to_string();
    let stats = run_json(&["stats", &data, "--json"]);
    assert_eq!((&stats["stationary"], &stats["fast_forwarded"]), (&Value::Null, &Value::Null));
    let text = run_text(&["stats", &data]);
    assert!(text.contains("no convergence profile: no row that was not augmented has a whole block"), "{text}");
}
