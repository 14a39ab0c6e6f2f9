//! Weights in and out: safetensors, single or sharded, mapped into memory.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::{base_folder, peft};
use crate::cuda::libtorch;
use crate::model::{ModelConfig, ParamBuffer};
use crate::{Error, Result, atomic_file, text_file};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// Most bytes of one file, as in `transformers`.
pub(crate) const SHARD_BYTES: usize = 5_000_000_000;

/// Fingerprint of a model folder: its config.json and weights, and those of an adapter.
///
/// # Errors
/// When a file is missing.
pub fn fingerprint(folder: &Path) -> Result<String> {
    let base = base_folder(folder)?;
    let mut files = vec![base.join("config.json")];
    files.extend(weight_files(&base)?);
    files.extend(peft::files(folder));
    crate::fingerprint::hash_files(&files)
}

/// Every weight of `config` in one buffer on `device` as `kind`. An adapter is merged in float32, and rounded once.
pub(crate) fn read_params(folder: &Path, config: &ModelConfig, device: Device, kind: Kind) -> Result<ParamBuffer> {
    let _no_grad = tch::no_grad_guard();
    let adapters = peft::read(folder, config, device)?;
    let weights = ParamBuffer::zeros(config.parameter_shapes(), device, kind);
    visit(&base_folder(folder)?, config, |file, name, view| {
        let mut weight = weights.get(name).unwrap_or_else(|| unreachable!("`visit` names weights of the config"));
        let found = tensor(file, name, view)?;
        match adapters.as_ref().and_then(|adapters| adapters.find(name)) {
            Some(adapter) => weight.f_copy_(&adapter.merge(&found.f_to_device(device)?, kind)?)?,
            None => weight.f_copy_(&found)?,
        }
        Ok(())
    })?;
    Ok(weights)
}

/// Checks that a folder holds every weight that its config.json calls for, whole and of its shape, without loading them.
///
/// # Errors
/// Names a file that is missing, cut off, or of an unsupported family or feature.
pub fn check(folder: &Path) -> Result<()> {
    let config = super::load_config(folder)?;
    peft::read(folder, &config, Device::Cpu)?;
    visit(&base_folder(folder)?, &config, kind_of).map(drop)
}

/// What `take` makes of every weight of `config`, in its order; names and shapes are checked.
fn visit<T>(
    folder: &Path,
    config: &ModelConfig,
    take: impl Fn(&Path, &str, &TensorView<'_>) -> Result<T>,
) -> Result<Vec<(String, T)>> {
    let mut found = BTreeMap::new();
    let wanted: BTreeMap<_, _> = config.parameter_shapes().into_iter().collect();
    let files = weight_files(folder)?;
    for file in &files {
        let map = libtorch::map_file(file)?;
        let tensors = SafeTensors::deserialize(&map).map_err(|error| {
            Error::file(file, format!("is no whole safetensors file ({error}); copy or download it again"))
        })?;
        for (name, view) in tensors.iter() {
            if let Some(shape) = wanted.get(name) {
                let size: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
                if size != *shape {
                    let message = format!("`{name}` has shape {size:?}, config.json calls for {shape:?}");
                    return Err(Error::file(file, message));
                }
                found.insert(name.to_owned(), take(file, name, &view)?);
            } else if !is_redundant(name, config) {
                let message = format!("`{name}` has no place in the model that config.json describes");
                return Err(Error::file(file, message));
            }
        }
    }
    config
        .parameter_shapes()
        .into_iter()
        .map(|(name, _)| match found.remove(&name) {
            Some(taken) => Ok((name, taken)),
            None => {
                let file = if files.len() == 1 { files[0].clone() } else { folder.join(INDEX) };
                Err(Error::file(file, format!("the weights lack `{name}`, which config.json calls for")))
            }
        })
        .collect()
}

/// What older files store beside the weights: tables that are computed, and a second copy of tied embeddings.
fn is_redundant(name: &str, config: &ModelConfig) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || (config.tied_embeddings && name == "lm_head.weight")
}

fn kind_of(file: &Path, name: &str, view: &TensorView<'_>) -> Result<Kind> {
    match view.dtype() {
        Dtype::F32 => Ok(Kind::Float),
        Dtype::F16 => Ok(Kind::Half),
        Dtype::BF16 => Ok(Kind::BFloat16),
        other => Err(Error::file(file, format!("`{name}` is {other:?}: only F32, F16 and BF16 are supported"))),
    }
}

pub(crate) fn tensor(file: &Path, name: &str, view: &TensorView<'_>) -> Result<Tensor> {
    let shape: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
    libtorch::tensor_from_bytes(view.data(), &shape, kind_of(file, name, view)?)
}

/// The safetensors files of a folder, in order.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    // As in `transformers`, the single file wins where both exist.
    let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
    if single.exists() {
        return Ok(vec![single]);
    }
    if !folder.is_dir() {
        return Err(Error::file(folder, "there is no such model folder"));
    }
    if !index.exists() {
        return Err(Error::file(folder, format!("holds neither {SINGLE} nor {INDEX}")));
    }
    let text = text_file::read(&index)?;
    let value: Value = serde_json::from_str(&text).map_err(|error| Error::file(&index, error.to_string()))?;
    let map = value["weight_map"].as_object().ok_or_else(|| Error::file(&index, "has no `weight_map`"))?;
    let mut files: Vec<_> = map.values().filter_map(Value::as_str).map(|name| folder.join(name)).collect();
    files.sort();
    files.dedup();
    match files.iter().find(|file| !file.exists()) {
        Some(missing) => Err(Error::file(missing, format!("is named by {INDEX} but missing"))),
        None => Ok(files),
    }
}

/// Writes config.json and the weights as `kind` into an existing folder, in shards of at most `shard_bytes`.
pub(crate) fn write(
    folder: &Path,
    config: &ModelConfig,
    parameters: &[(String, Tensor)],
    kind: Kind,
    shard_bytes: usize,
) -> Result<()> {
    let (code, dtype) = type_names(kind)?;
    let shards = shards(parameters, kind.elt_size_in_bytes(), shard_bytes);
    let mut weight_map = Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => SINGLE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let shapes: Vec<_> = shard.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect();
        write_safetensors(&folder.join(&file), code, kind.elt_size_in_bytes(), &shapes, |index| {
            libtorch::tensor_to_bytes(&shard[index].1.f_detach()?.f_to_kind(kind)?)
        })?;
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), json!(file))));
    }
    if shards.len() > 1 {
        let total: usize = parameters.iter().map(|(_, tensor)| tensor.numel() * kind.elt_size_in_bytes()).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        atomic_file::write_json(&folder.join(INDEX), &index)?;
    }
    // Of an earlier save in the other form; a reader would have to guess which one counts.
    let stale = folder.join(if shards.len() > 1 { SINGLE } else { INDEX });
    if stale.exists() {
        std::fs::remove_file(&stale).map_err(Error::write(&stale))?;
    }
    atomic_file::write_json(&folder.join("config.json"), &config.to_json(dtype))
}

/// A type's names in safetensors and in config.json.
pub(crate) fn type_names(kind: Kind) -> Result<(&'static str, &'static str)> {
    match kind {
        Kind::Float => Ok(("F32", "float32")),
        Kind::Half => Ok(("F16", "float16")),
        Kind::BFloat16 => Ok(("BF16", "bfloat16")),
        other => Err(Error::usage(format!("weights cannot be saved as {other:?}"))),
    }
}

/// One safetensors file of tensors of one type, a tensor at a time, so that memory never holds a second copy of the
/// model; `data` gives the bytes of the tensor of that index.
pub fn write_safetensors(
    path: &Path,
    code: &str,
    element_bytes: usize,
    tensors: &[(String, Vec<i64>)],
    mut data: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]);
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += shape.iter().product::<i64>() as usize * element_bytes;
        let entry = json!({ "dtype": code, "shape": shape, "data_offsets": [start, end] });
        header.insert(name.clone(), entry);
    }
    let mut header = Value::Object(header).to_string();
    // The data that follows is aligned to 8 bytes, as the format asks.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    atomic_file::write_with(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(Error::write(path))?;
        file.write_all(header.as_bytes()).map_err(Error::write(path))?;
        for index in 0..tensors.len() {
            file.write_all(&data(index)?).map_err(Error::write(path))?;
        }
        Ok(())
    })
}

fn shards(parameters: &[(String, Tensor)], element_bytes: usize, shard_bytes: usize) -> Vec<&[(String, Tensor)]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (index, (_, tensor)) in parameters.iter().enumerate() {
        let size = tensor.numel() * element_bytes;
        if bytes + size > shard_bytes && index > start {
            shards.push(&parameters[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes += size;
    }
    shards.push(&parameters[start..]);
    shards
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Transformer;

    #[test]
    fn shards_are_read_back_and_a_missing_one_is_named() {
        let json = json!({
            "model_type": "qwen3", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "head_dim": 4, "tie_word_embeddings": true,
        });
        let config = ModelConfig::from_json(&json).unwrap();
        let parameters = Transformer::random(config.clone(), 3, Device::Cpu, Kind::Float).named_parameters();
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &config, &parameters, Kind::Float, SHARD_BYTES).unwrap();
        write(dir.path(), &config, &parameters, Kind::Float, 1500).unwrap();
        let files = weight_files(dir.path()).unwrap();
        assert!(files.len() > 2, "{files:?}");
        let read_back = read_params(dir.path(), &config, Device::Cpu, Kind::Float).unwrap().tensors();
        for ((name, written), (_, read)) in parameters.iter().zip(&read_back) {
            assert_eq!(written, read, "{name}");
        }
        std::fs::remove_file(&files[1]).unwrap();
        let error = read_params(dir.path(), &config, Device::Cpu, Kind::Float).unwrap_err().to_string();
        assert!(error.contains("model-00002-of-"), "{error}");
        write(dir.path(), &config, &parameters, Kind::BFloat16, SHARD_BYTES).unwrap();
        assert_eq!(weight_files(dir.path()).unwrap(), [dir.path().join(SINGLE)]);
    }
}
