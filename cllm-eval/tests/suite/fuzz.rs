//! Damaged and made-up records of a run.

use std::fs;

use cllm_eval::records::{Records, SAMPLES};
use cllm_eval::results::Results;
use cllm_testing::fuzz::fuzz;

use crate::made_up::records;

#[test]
fn fuzz_samples() {
    let dir = tempfile::tempdir().unwrap();
    let (seed, file) = (dir.path().join("seed.jsonl"), dir.path().join(SAMPLES));
    records().write(&seed).unwrap();
    // With their checksums, changed lines would be refused before they are read.
    let text = fs::read_to_string(&seed).unwrap();
    let without_checksum = |line: &str| format!("{}}}\n", line.rsplit_once(",\"checksum\"").unwrap().0);
    fs::write(&seed, text.lines().map(without_checksum).collect::<String>()).unwrap();
    fuzz("samples", &[seed], |input| {
        fs::write(&file, input).unwrap();
        if let Ok(records) = Records::read(&file) {
            let _ = Results::from_records(&records);
        }
    });
}
