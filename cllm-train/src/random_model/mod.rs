//! `init`: a model folder with random weights in the shape of a published model, so that a job can
//! be rehearsed without the weights: `transformers` and every program here load it like the real
//! one.
//!
//! `tokenizer` makes up a tokenizer with the family's vocabulary size and special tokens, `weights`
//! draws the weights.

mod tokenizer;
mod weights;

use std::path::PathBuf;

use cllm_core::model::ModelShape;
use cllm_core::settings::required_path;
use cllm_core::{Error, Result, atomic_file, output_folder, progress};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of `cllm-train init`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RandomModelSettings {
    /// The published model whose config.json, vocabulary size, special tokens and style of chat
    /// template the folder gets.
    #[garde(required)]
    pub shape: Option<ModelShape>,
    /// Folder of the model; it must not exist yet.
    #[garde(custom(required_path))]
    pub output: PathBuf,
    /// Seed of the weights: the same seed gives the same files.
    #[garde(skip)]
    pub seed: u64,
}

/// What `init --json` prints.
#[derive(Serialize)]
pub struct RandomModel {
    schema_version: u32,
    shape: ModelShape,
    parameters: i64,
    /// Folder of the model.
    model: PathBuf,
}

/// Writes the folder. It appears whole or not at all.
///
/// # Errors
/// If the folder exists; file-system errors.
pub fn write(settings: &RandomModelSettings) -> Result<RandomModel> {
    let RandomModelSettings { shape, output, seed } = settings;
    let shape = shape.ok_or_else(|| Error::usage("shape is not set: add `shape=...`"))?;
    let _lock = output_folder::lock_new(output)?;
    let config = shape.config(None)?;
    atomic_file::write_folder_with(output, |work| {
        atomic_file::write_json(&work.join("config.json"), &shape.json())?;
        tokenizer::write(shape, work)?;
        weights::write(&config, *seed, work)
    })?;
    let parameters = config.num_parameters();
    progress::log(format!(
        "{}: {shape} with {:.2} M random weights and a made-up tokenizer",
        output.display(),
        parameters as f64 / 1e6
    ));
    Ok(RandomModel { schema_version: 1, shape, parameters, model: output.clone() })
}
