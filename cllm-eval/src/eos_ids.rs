//! The ids that end an answer.

use std::path::Path;

use cllm_core::model::ModelConfig;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result};

/// Returns the given ids, or the model's own if none are given.
///
/// # Errors
/// When one of them is not in the model's vocabulary.
pub fn resolve(given: Option<&[i32]>, tokenizer: &Tokenizer, folder: &Path, config: &ModelConfig) -> Result<Vec<i32>> {
    let ids = given.unwrap_or_else(|| tokenizer.eos_ids());
    if let Some(id) = ids.iter().find(|&&id| id < 0 || i64::from(id) >= config.vocab_size) {
        let (folder, vocab_size) = (folder.display(), config.vocab_size);
        return Err(Error::usage(format!(
            "eos_ids: {id} is not in the vocabulary of {folder}: ids are from 0 to {}",
            vocab_size - 1
        )));
    }
    Ok(ids.to_vec())
}
