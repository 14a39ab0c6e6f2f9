//! Weights in and out: safetensors, single or sharded, mapped into memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::ModelConfig;
use crate::{Error, Result, atomic_file, torch_ext};

const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
const SHARD_BYTES: usize = 5_000_000_000;

/// Fingerprint of a model folder: its config.json and weights.
///
/// # Errors
/// When a file is missing.
pub fn fingerprint(folder: &Path) -> Result<String> {
    let mut files = vec![folder.join("config.json")];
    files.extend(weight_files(folder)?);
    crate::fingerprint::of_files(&files)
}

/// Every weight of `config`, in its order, on `device` as `kind`.
pub(super) fn read(folder: &Path, config: &ModelConfig, device: Device, kind: Kind) -> Result<Vec<(String, Tensor)>> {
    let _no_grad = tch::no_grad_guard();
    let mut found = BTreeMap::new();
    let wanted: BTreeMap<_, _> = config.shapes().into_iter().collect();
    for file in weight_files(folder)? {
        let map = torch_ext::map_file(&file)?;
        let tensors = SafeTensors::deserialize(&map).map_err(|error| {
            Error::file(&file, format!("is no whole safetensors file ({error}); copy or download it again"))
        })?;
        for (name, view) in tensors.iter() {
            if let Some(shape) = wanted.get(name) {
                found.insert(name.to_owned(), tensor(&file, name, &view, shape)?.f_to_device(device)?.f_to_kind(kind)?);
            }
        }
    }
    config
        .shapes()
        .into_iter()
        .map(|(name, _)| match found.remove(&name) {
            Some(tensor) => Ok((name, tensor)),
            None => Err(Error::file(folder, format!("the weights lack `{name}`, which config.json calls for"))),
        })
        .collect()
}

fn tensor(file: &Path, name: &str, view: &TensorView<'_>, shape: &[i64]) -> Result<Tensor> {
    let found: Vec<i64> = view.shape().iter().map(|&size| size as i64).collect();
    if found != shape {
        return Err(Error::file(file, format!("`{name}` has shape {found:?}, config.json calls for {shape:?}")));
    }
    let kind = match view.dtype() {
        Dtype::F32 => Kind::Float,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        other => {
            return Err(Error::file(file, format!("`{name}` is {other:?}: only F32, F16 and BF16 are supported")));
        }
    };
    torch_ext::tensor_from_bytes(view.data(), shape, kind)
}

/// The safetensors files of a folder, in order.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let index = folder.join(INDEX);
    if !index.exists() {
        let single = folder.join(SINGLE);
        if single.exists() {
            return Ok(vec![single]);
        }
        return Err(Error::file(folder, format!("holds neither {SINGLE} nor {INDEX}")));
    }
    let text = std::fs::read_to_string(&index).map_err(Error::io(&index))?;
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

/// Random weights, drawn on the CPU in float32 whatever the device.
pub(super) fn random(config: &ModelConfig, seed: u64, device: Device, kind: Kind) -> Vec<(String, Tensor)> {
    let _no_grad = tch::no_grad_guard();
    let draw = |index: usize, name: &str, shape: &[i64]| {
        let options = (Kind::Float, Device::Cpu);
        let tensor = if name.ends_with("norm.weight") {
            Tensor::ones(shape, options)
        } else if name.ends_with(".bias") {
            Tensor::zeros(shape, options)
        } else {
            // Not libtorch's generator: it is shared by all threads of the process.
            let mut random = ChaCha8Rng::seed_from_u64(seed);
            random.set_stream(index as u64);
            let count = shape.iter().product::<i64>() as usize;
            Tensor::from_slice(&normals(&mut random, count, 0.02)).view(shape)
        };
        tensor.to_kind(kind).to_device(device)
    };
    let shapes = config.shapes().into_iter().enumerate();
    shapes.map(|(index, (name, shape))| (name.clone(), draw(index, &name, &shape))).collect()
}

/// Normal numbers by Box and Muller's method.
fn normals(random: &mut ChaCha8Rng, count: usize, deviation: f64) -> Vec<f32> {
    let mut unit = || ((random.next_u32() as f64) + 0.5) / 2f64.powi(32);
    let mut numbers = Vec::with_capacity(count + 1);
    while numbers.len() < count {
        let radius = deviation * (-2.0 * unit().ln()).sqrt();
        let (sine, cosine) = (std::f64::consts::TAU * unit()).sin_cos();
        numbers.extend([(radius * cosine) as f32, (radius * sine) as f32]);
    }
    numbers.truncate(count);
    numbers
}

/// Writes config.json and the weights as `kind` into an existing folder.
pub(super) fn write(folder: &Path, config: &ModelConfig, parameters: &[(String, Tensor)], kind: Kind) -> Result<()> {
    let (dtype, name) = match kind {
        Kind::Float => (Dtype::F32, "float32"),
        Kind::Half => (Dtype::F16, "float16"),
        Kind::BFloat16 => (Dtype::BF16, "bfloat16"),
        other => return Err(Error::usage(format!("weights cannot be saved as {other:?}"))),
    };
    let shards = shards(parameters, kind.elt_size_in_bytes());
    let mut weight_map = serde_json::Map::new();
    for (number, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => SINGLE.to_owned(),
            count => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        let bytes: Vec<(&str, Vec<usize>, Vec<u8>)> = shard
            .iter()
            .map(|(name, tensor)| {
                let shape = tensor.size().iter().map(|&size| size as usize).collect();
                Ok((name.as_str(), shape, torch_ext::tensor_to_bytes(&tensor.f_detach()?.f_to_kind(kind)?)?))
            })
            .collect::<Result<_>>()?;
        let broken = |error| Error::file(folder.join(&file), format!("{error}"));
        let views = bytes
            .iter()
            .map(|(name, shape, bytes)| Ok((*name, TensorView::new(dtype, shape.clone(), bytes).map_err(broken)?)))
            .collect::<Result<Vec<_>>>()?;
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        let content = safetensors::serialize(views, Some(metadata)).map_err(broken)?;
        atomic_file::write(&folder.join(&file), &content)?;
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), json!(file))));
    }
    if shards.len() > 1 {
        let total: usize = parameters.iter().map(|(_, tensor)| tensor.numel() * kind.elt_size_in_bytes()).sum();
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        atomic_file::write_json(&folder.join(INDEX), &index)?;
    }
    atomic_file::write_json(&folder.join("config.json"), &config.to_json(name))
}

fn shards(parameters: &[(String, Tensor)], element_bytes: usize) -> Vec<&[(String, Tensor)]> {
    let mut shards = Vec::new();
    let (mut start, mut bytes) = (0, 0);
    for (index, (_, tensor)) in parameters.iter().enumerate() {
        let size = tensor.numel() * element_bytes;
        if bytes + size > SHARD_BYTES && index > start {
            shards.push(&parameters[start..index]);
            (start, bytes) = (index, 0);
        }
        bytes += size;
    }
    shards.push(&parameters[start..]);
    shards
}
