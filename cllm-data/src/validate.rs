//! `validate`: every row against what the data format promises.

use std::path::Path;

use cllm_core::Result;
use cllm_core::program::{Outcome, print, print_json};
use cllm_core::trajectory::Reader;
use serde_json::json;

/// Violations that are listed; all are counted.
const LISTED: usize = 20;

/// Checks a data set.
///
/// # Errors
/// When it cannot be read at all.
pub fn run(data: &Path, as_json: bool) -> Result<Outcome> {
    let reader = Reader::open(data)?;
    let mut violations = Vec::new();
    for row in reader.unchecked_rows() {
        let row = row?;
        if let Err(message) = row.check(reader.provenance()) {
            violations.push(format!("{}: {message}", row.sample_id));
        }
    }
    let listed = &violations[..violations.len().min(LISTED)];
    if as_json {
        let count = violations.len();
        print_json(&json!({ "schema_version": 1, "rows": reader.len(), "violations": count, "first": listed }))?;
    } else {
        listed.iter().try_for_each(|line| print(line))?;
        print(&format!("{} rows, {} violations", reader.len(), violations.len()))?;
    }
    Ok(if violations.is_empty() { Outcome::Done } else { Outcome::Negative })
}
