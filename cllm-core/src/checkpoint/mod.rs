//! Model folders in Hugging Face's format: config.json, weights in safetensors files, and PEFT
//! adapters.
//!
//! Loading a folder with an adapter gives the base model with the adapter merged in. [`hub`] finds
//! the folder of a model by its name.

pub mod hub;
mod peft;
mod safetensors;

use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind};

use crate::fingerprint::hash_files;
use crate::model::{ModelConfig, ParamBuffer, Transformer};
use crate::{Error, Result, atomic_file, text_file};

pub use hub::is_adapter;
pub use peft::{base_folder, save_adapter};
pub use safetensors::write_safetensors;

const CONFIG_FILE: &str = "config.json";
/// Maximum size of a weights file, as in `transformers`.
const MAX_SHARD_BYTES: usize = 5_000_000_000;

/// Loads a model. An adapter is merged in float32 and rounded once.
///
/// # Errors
/// Names the file that is missing or incomplete, or that needs an unsupported feature.
pub fn load(folder: &Path, device: Device, kind: Kind) -> Result<Transformer> {
    let _no_grad = tch::no_grad_guard();
    let config = load_config(folder)?;
    let adapters = peft::load_adapters(folder, &config, device)?;
    let params = ParamBuffer::zeros(config.parameter_shapes(), device, kind);
    safetensors::for_each_weight(&base_folder(folder)?, &config, |file, name, view| {
        let mut param = params.get(name).expect("the buffer holds every weight of the configuration");
        let weight = safetensors::to_tensor(file, name, view)?;
        match adapters.as_ref().and_then(|adapters| adapters.find(name)) {
            Some(adapter) => param.f_copy_(&adapter.merge(&weight.f_to_device(device)?, kind)?)?,
            None => param.f_copy_(&weight)?,
        }
        Ok(())
    })?;
    Ok(Transformer::from_params(config, params))
}

/// Reads config.json; for an adapter, that of its base model.
///
/// # Errors
/// [`Error::File`] when it is missing or invalid, or names a family or a feature that is not
/// supported.
pub fn load_config(folder: &Path) -> Result<ModelConfig> {
    if !folder.is_dir() {
        return Err(Error::file(folder, "there is no such model folder"));
    }
    let path = base_folder(folder)?.join(CONFIG_FILE);
    let text = text_file::read(&path)?;
    let json: Value = serde_json::from_str(&text).map_err(|error| Error::file(&path, error.to_string()))?;
    ModelConfig::from_json(&json).map_err(|message| Error::file(&path, message))
}

/// Checks that a folder holds every weight of its config.json, complete and of the expected shape,
/// without loading them.
///
/// # Errors
/// As [`load`].
pub fn check(folder: &Path) -> Result<()> {
    let config = load_config(folder)?;
    peft::load_adapters(folder, &config, Device::Cpu)?;
    safetensors::for_each_weight(&base_folder(folder)?, &config, |file, name, view| {
        safetensors::to_kind(file, name, view).map(drop)
    })
}

/// Fingerprint of a model's config.json and weights, and of its adapter if it has one.
///
/// # Errors
/// When a file is missing.
pub fn fingerprint(folder: &Path) -> Result<String> {
    let base = base_folder(folder)?;
    let mut files = vec![base.join(CONFIG_FILE)];
    files.extend(safetensors::weight_files(&base)?);
    files.extend(peft::adapter_files(folder));
    hash_files(&files)
}

/// Writes config.json and the weights, with adapters merged, as `kind` into an existing folder.
/// Weights of more than 5 GB are split over several files.
///
/// # Errors
/// File-system errors.
pub fn save(model: &Transformer, folder: &Path, kind: Kind) -> Result<()> {
    let merged = model.to_merged()?;
    let parameters = merged.as_ref().unwrap_or(model).named_parameters();
    let dtype = safetensors::dtype_names(kind)?.torch;
    safetensors::write_weights(folder, &parameters, kind, MAX_SHARD_BYTES)?;
    atomic_file::write_json(&folder.join(CONFIG_FILE), &model.config().to_json(dtype))
}
