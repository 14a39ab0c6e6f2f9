//! Model folders in Hugging Face's form: where they are found, read and written.

use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind};

use crate::model::{ModelConfig, Transformer};
use crate::{Error, Result, text_file};

pub mod hub;
mod peft;
mod safetensors;

pub use peft::{base_folder, is_adapter, save_adapter};
pub use safetensors::{check, fingerprint, write_safetensors};

/// Loads a Hugging Face folder; a PEFT adapter is merged into the model that it belongs to.
///
/// # Errors
/// Names a file that is missing, cut off, or of an unsupported family or feature.
pub fn load(folder: &Path, device: Device, kind: Kind) -> Result<Transformer> {
    let config = load_config(folder)?;
    let params = safetensors::read_params(folder, &config, device, kind)?;
    Ok(Transformer::assemble(config, params))
}

/// Reads config.json of a model folder, or that of the model that an adapter belongs to.
///
/// # Errors
/// [`Error::File`] when it is missing or broken, or names a family or feature that is not supported.
pub fn load_config(folder: &Path) -> Result<ModelConfig> {
    if !folder.is_dir() {
        return Err(Error::file(folder, "there is no such model folder"));
    }
    let path = base_folder(folder)?.join("config.json");
    let text = text_file::read(&path)?;
    let raw: Value = serde_json::from_str(&text).map_err(|error| Error::file(&path, format!("{error}")))?;
    ModelConfig::from_json(&raw).map_err(|message| Error::file(&path, message))
}

/// Writes config.json and safetensors in `kind` into an existing folder (sharded past 5 GB, `format: pt`), adapters merged.
///
/// # Errors
/// File-system errors.
pub fn save(model: &Transformer, folder: &Path, kind: Kind) -> Result<()> {
    let merged = model.to_merged()?;
    let parameters = merged.as_ref().unwrap_or(model).named_parameters();
    safetensors::write(folder, model.config(), &parameters, kind, safetensors::SHARD_BYTES)
}
