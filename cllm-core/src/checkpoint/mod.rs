//! Model folders in Hugging Face's format: config.json, weights in safetensors files, and PEFT
//! adapters.
//!
//! Loading a folder with an adapter gives the base model with the adapter merged in or, if it acts on
//! draft tokens alone, beside it. [`hub`] finds the folder of a model by its name.

pub mod hub;
mod peft;
mod safetensors;
mod tensor_file;
mod tensor_writer;

use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::fingerprint::hash_files;
use crate::model::{AdaptedTokens, BaseDtype, ModelConfig, ModelParams, Transformer};
use crate::{Error, Result, atomic_file, text_file};

pub use hub::is_adapter;
pub use peft::{adapts_drafts, base_folder, refuse_draft_adapters, save_adapter, save_adapter_with};
pub use safetensors::{find_weights, write_weights};
pub use tensor_file::{StoredTensor, TensorFile, TensorSpec, read_tensors};
pub use tensor_writer::{STREAMING_BYTES, TensorWriter, WritingThread};

const CONFIG_FILE: &str = "config.json";

/// Loads a model. An adapter is merged in float32 and rounded once, unless it acts on draft tokens
/// alone. Beside the model, memory holds a few pieces of the files.
///
/// # Errors
/// Names the file that is missing or incomplete, or that needs an unsupported feature.
pub fn load(folder: &Path, device: Device, kind: Kind) -> Result<Transformer> {
    load_base(folder, device, kind, BaseDtype::Model)
}

/// As [`load`], with projections in a type of their own, for training adapters beside them.
///
/// # Errors
/// As [`load`].
pub fn load_base(folder: &Path, device: Device, kind: Kind, base_dtype: BaseDtype) -> Result<Transformer> {
    let _no_grad = tch::no_grad_guard();
    let config = load_config(folder)?;
    let loaded = peft::load_adapters(folder, &config, device, kind)?;
    let (draft_adapters, adapters) = match loaded {
        Some(adapters) if adapters.config.on == AdaptedTokens::Drafts => (Some(adapters), None),
        other => (None, other),
    };
    let weights = find_weights(&base_folder(folder)?, &config)?;
    let params = ModelParams::zeros(&config, device, kind, base_dtype);
    let adapter = |index: usize| adapters.as_ref().and_then(|adapters| adapters.find(&weights[index].0));
    let target = |index: usize| {
        let (name, stored) = &weights[index];
        match params.get(name).filter(|_| adapter(index).is_none()) {
            Some(param) => Ok(param),
            None => Ok(Tensor::f_zeros(stored.shape(), (stored.kind(name)?, device))?),
        }
    };
    read_tensors(&weights, device, target, |index, weight| {
        let (name, stored) = &weights[index];
        check_finite(stored.path(), name, &weight)?;
        match adapter(index) {
            Some(adapter) => params.set(name, &adapter.merge(&weight, kind)?),
            None if params.get(name).is_none() => params.set(name, &weight),
            None => Ok(()),
        }
    })?;
    let mut model = Transformer::new(config, params);
    if let Some(adapters) = draft_adapters {
        model.set_adapters(adapters);
    }
    Ok(model)
}

/// Refuses numbers with which every answer would be noise that looks like one.
fn check_finite(file: &Path, name: &str, weight: &Tensor) -> Result<()> {
    let (min, max) = weight.f_aminmax(None, false)?;
    if [min, max].iter().all(|extreme| extreme.double_value(&[]).is_finite()) {
        return Ok(());
    }
    let message = format!(
        "`{name}` has numbers that are not finite: the file is damaged ({}), or the training that wrote it diverged",
        safetensors::DOWNLOAD_ADVICE
    );
    Err(Error::file(file, message))
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
    peft::load_adapters(folder, &config, Device::Cpu, Kind::Float)?;
    find_weights(&base_folder(folder)?, &config).map(drop)
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
    let mut writer = TensorWriter::new(model.device(), STREAMING_BYTES);
    save_with(&mut writer, model, folder, kind)?;
    writer.finish().map(drop)
}

/// As [`save`], with the weights written by `writer`.
///
/// # Errors
/// As [`TensorWriter::write`].
pub fn save_with(writer: &mut TensorWriter, model: &Transformer, folder: &Path, kind: Kind) -> Result<()> {
    if model.is_quantized() {
        return Err(Error::internal("a quantized model is saved with the weights that it was made of"));
    }
    check_merges(model)?;
    let weights = model.named_parameters();
    let shapes: Vec<_> = weights.iter().map(|(name, weight)| (name.clone(), weight.size())).collect();
    write_weights(writer, folder, &shapes, kind, |writer, index| {
        let (name, weight) = &weights[index];
        match model.adapters().and_then(|adapters| adapters.find(name)) {
            Some(adapter) => writer.write(&adapter.merge(weight, model.kind())?, kind),
            None => writer.write(weight, kind),
        }
    })?;
    write_config(model, folder, kind)
}

/// Writes config.json and the weights of the model in `base`, as `kind`, with the adapters of `model`
/// merged into them. The weights are read one after another.
///
/// # Errors
/// As [`load`] and [`TensorWriter::write`].
pub fn save_on_base_with(
    writer: &mut TensorWriter,
    model: &Transformer,
    base: &Path,
    folder: &Path,
    kind: Kind,
) -> Result<()> {
    check_merges(model)?;
    let weights = find_weights(&base_folder(base)?, model.config())?;
    let shapes: Vec<_> = weights.iter().map(|(name, weight)| (name.clone(), weight.shape().to_vec())).collect();
    write_weights(writer, folder, &shapes, kind, |writer, index| {
        let (name, stored) = &weights[index];
        let weight = Tensor::f_zeros(stored.shape(), (stored.kind(name)?, model.device()))?;
        read_tensors(&weights[index..=index], model.device(), |_| Ok(weight.shallow_clone()), |_, _| Ok(()))?;
        match model.adapters().and_then(|adapters| adapters.find(name)) {
            Some(adapter) => writer.write(&adapter.merge(&weight, kind)?, kind),
            None => writer.write(&weight, kind),
        }
    })?;
    write_config(model, folder, kind)
}

/// Merged into the weights, adapters for draft tokens would act on all tokens.
fn check_merges(model: &Transformer) -> Result<()> {
    match model.adapts_drafts() {
        true => Err(Error::internal("adapters for draft tokens are saved beside their model, not merged into it")),
        false => Ok(()),
    }
}

fn write_config(model: &Transformer, folder: &Path, kind: Kind) -> Result<()> {
    let dtype = tensor_file::dtype_names(kind)?.torch;
    atomic_file::write_json(&folder.join(CONFIG_FILE), &model.config().to_json(dtype))
}
