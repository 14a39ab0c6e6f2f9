//! `validate`: every row against what the data format promises, and against a model.

use std::collections::HashSet;
use std::path::PathBuf;

use clap::Args;
use cllm_core::checkpoint::hub;
use cllm_core::checkpoint::{self, fingerprint};
use cllm_core::interrupt;
use cllm_core::program::{Outcome, print, print_json};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{FinishReason, INCOMPLETE_DATA_SET, Provenance, Reader, Trajectory};
use serde_json::json;

/// Violations that are listed; all are counted.
const LISTED: usize = 20;

/// Command line of `validate`.
#[derive(Args)]
pub struct Arguments {
    /// The data set.
    data: PathBuf,
    /// The model that it should be of: teacher, tokenizer and vocabulary are compared. A folder or an id.
    #[arg(long)]
    model: Option<String>,
    /// Print the report as JSON on stdout.
    #[arg(long)]
    json: bool,
}

/// Checks a data set.
///
/// # Errors
/// When it, or the model, cannot be read at all.
pub fn run(arguments: &Arguments) -> cllm_core::Result<Outcome> {
    let reader = Reader::open_incomplete(&arguments.data)?;
    let mut promised = reader.provenance().clone();
    let mut violations = match &arguments.model {
        Some(model) => foreign_model(model, &mut promised)?,
        None => Vec::new(),
    };
    if !reader.is_complete() {
        violations.push(format!("the data set {INCOMPLETE_DATA_SET}"));
    }
    let mut seen = HashSet::new();
    for row in reader.unchecked_rows() {
        interrupt::check()?;
        let row = row?;
        if let Err(message) = row.check(&promised).and_then(|()| ends_in_time(&row, &promised)) {
            violations.push(format!("{}: {message}", row.sample_id));
        }
        if !seen.insert(row.sample_id.clone()) {
            violations.push(format!("{}: this sample_id stands in an earlier row too", row.sample_id));
        }
    }
    let listed = &violations[..violations.len().min(LISTED)];
    if arguments.json {
        let count = violations.len();
        print_json(&json!({ "schema_version": 1, "rows": reader.len(), "violations": count, "first": listed }))?;
    } else {
        listed.iter().try_for_each(|line| print(line))?;
        print(&format!("{} rows, {} violations", reader.len(), violations.len()))?;
    }
    Ok(if violations.is_empty() { Outcome::Done } else { Outcome::Negative })
}

/// A response that the length limit ended is exactly as long as that, unless it comes from a file of the reference
/// implementation: there single blocks may be gone, and it ends before the first of them.
fn ends_in_time(row: &Trajectory, promised: &Provenance) -> Result<(), String> {
    let (length, most) = (row.response_ids.len(), promised.max_new_tokens);
    let imported = promised.steps.first().is_some_and(|step| step.starts_with("import"));
    match row.finish_reason {
        FinishReason::Length if length < most && !imported => {
            Err(format!("finish_reason is length at {length} tokens, and max_new_tokens was {most}"))
        }
        FinishReason::Length | FinishReason::Eos => Ok(()),
    }
}

/// In what the data set is not of this model. Rows are then held to the smaller of the two vocabularies.
fn foreign_model(name: &str, promised: &mut Provenance) -> cllm_core::Result<Vec<String>> {
    let folder = hub::locate(name)?;
    let vocab_size = checkpoint::load_config(&folder)?.vocab_size as usize;
    let compared = [
        ("teacher", promised.teacher.clone(), fingerprint(&folder)?),
        ("tokenizer", promised.tokenizer.clone(), Tokenizer::load(&folder)?.fingerprint().to_owned()),
        ("vocabulary", promised.vocab_size.to_string(), vocab_size.to_string()),
    ];
    promised.vocab_size = promised.vocab_size.min(vocab_size);
    let different = compared.into_iter().filter(|(_, there, here)| there != here);
    Ok(different.map(|(what, there, here)| format!("{what}: {there} in the data set, {here} in {name}")).collect())
}
