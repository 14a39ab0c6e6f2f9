//! `validate`: checks every row of a data set against the data format, and the data set against a
//! model.

use std::collections::HashSet;
use std::path::PathBuf;

use clap::Args;
use cllm_core::checkpoint::{self, hub};
use cllm_core::program::{Outcome, print, print_json};
use cllm_core::progress::count;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{FinishReason, INCOMPLETE_DATA_SET, Provenance, Reader, Trajectory};
use cllm_core::{Result, checksum, interrupt};
use serde_json::json;

/// Violations that are printed; all are counted.
const MAX_LISTED_VIOLATIONS: usize = 20;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Folder of the data set, or one of its shards.
    data: PathBuf,
    /// The model that should have collected it (a folder or an id): compare teacher, tokenizer and
    /// vocabulary.
    #[arg(long)]
    model: Option<String>,
    /// Print the result as one JSON document on stdout.
    #[arg(long)]
    json: bool,
}

/// Checks a data set.
///
/// # Errors
/// When the data set or the model cannot be read at all.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let reader = Reader::open_incomplete(&arguments.data)?;
    let mut provenance = reader.provenance().clone();
    let mut violations = Vec::new();
    if let Some(model) = &arguments.model {
        violations.extend(compare_with_model(&mut provenance, model)?);
    }
    if !reader.is_complete() {
        violations.push(format!("the data set {INCOMPLETE_DATA_SET}"));
    }
    let damage = reader.damage()?;
    violations.extend(damage.iter().map(ToString::to_string));
    let mut seen = HashSet::new();
    // The rows of a damaged shard may be anything, or unreadable.
    for row in reader.unchecked_rows().take(if damage.is_empty() { usize::MAX } else { 0 }) {
        interrupt::check()?;
        let row = row?;
        if let Err(message) = row.check(&provenance).and_then(|()| check_length(&row, &provenance)) {
            violations.push(format!("{}: {message}", row.sample_id));
        }
        if !seen.insert(row.sample_id.clone()) {
            violations.push(format!("{}: an earlier row has the same sample_id", row.sample_id));
        }
    }
    report(&violations, reader.num_rows(), arguments.json)?;
    Ok(if violations.is_empty() { Outcome::Done } else { Outcome::Negative })
}

fn report(violations: &[String], num_rows: usize, as_json: bool) -> Result<()> {
    let listed = &violations[..violations.len().min(MAX_LISTED_VIOLATIONS)];
    if as_json {
        let num_violations = violations.len();
        return print_json(
            &json!({ "schema_version": 1, "rows": num_rows, "violations": num_violations, "first": listed }),
        );
    }
    listed.iter().try_for_each(|line| print(line))?;
    print(&format!("{}, {}", count(num_rows, "row"), count(violations.len(), "violation")))
}

/// Checks that a response with the finish reason `length` has reached the limit. An imported
/// response may be shorter: it ends where the file lacks a block.
fn check_length(row: &Trajectory, provenance: &Provenance) -> std::result::Result<(), String> {
    let (length, max_new_tokens) = (row.response_ids.len(), provenance.max_new_tokens);
    let is_imported = provenance.steps.first().is_some_and(|step| step.starts_with("import"));
    match row.finish_reason {
        FinishReason::Length if length < max_new_tokens && !is_imported => {
            Err(format!("finish_reason is length at {length} tokens, but max_new_tokens was {max_new_tokens}"))
        }
        FinishReason::Length | FinishReason::Eos => Ok(()),
    }
}

/// What is wrong with the model, and the violations of a data set that it did not collect. The rows are then checked against
/// the smaller vocabulary.
fn compare_with_model(provenance: &mut Provenance, model: &str) -> Result<Vec<String>> {
    let folder = hub::locate(model)?;
    let vocab_size = checkpoint::load_config(&folder)?.vocab_size as usize;
    let compared = [
        ("teacher", provenance.teacher.clone(), checkpoint::fingerprint(&folder)?),
        ("tokenizer", provenance.tokenizer.clone(), Tokenizer::load(&folder)?.fingerprint().to_owned()),
        ("vocabulary", provenance.vocab_size.to_string(), vocab_size.to_string()),
    ];
    provenance.vocab_size = provenance.vocab_size.min(vocab_size);
    let damage = checksum::check_folder(&folder, checksum::MODEL_ADVICE).err().map(|error| error.to_string());
    let different = compared.into_iter().filter(|(_, recorded, actual)| recorded != actual);
    let violation = |(name, recorded, actual)| format!("{name}: {recorded} in the data set, {actual} in {model}");
    Ok(damage.into_iter().chain(different.map(violation)).collect())
}
