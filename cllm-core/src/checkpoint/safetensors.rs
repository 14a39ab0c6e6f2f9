//! Weights in one or several safetensors files, which are memory-mapped for reading.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde_json::{Map, Value, json};
use tch::{Kind, Tensor};

use crate::cuda::libtorch;
use crate::model::ModelConfig;
use crate::{Error, Result, atomic_file, text_file};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const EMBEDDING: &str = "model.embed_tokens.weight";
const LM_HEAD: &str = "lm_head.weight";

/// A tensor and the file that holds it.
struct Stored<'m> {
    file: &'m Path,
    view: TensorView<'m>,
}

/// Calls `visit` with the file, the name and the data of every weight of `config`.
///
/// # Errors
/// When a weight is missing, has another shape, or is not one of the model's, and when tied
/// embeddings come with an output projection of their own.
pub(super) fn for_each_weight(
    folder: &Path,
    config: &ModelConfig,
    mut visit: impl FnMut(&Path, &str, &TensorView<'_>) -> Result<()>,
) -> Result<()> {
    let shapes = config.parameter_shapes();
    let files = weight_files(folder)?;
    let maps = files.iter().map(|file| libtorch::map_file(file)).collect::<Result<Vec<_>>>()?;
    let mut stored = read_tensors(&files, &maps, &shapes)?;
    if config.tied_embeddings {
        tie(&mut stored)?;
    }
    for (name, shape) in &shapes {
        let Some(Stored { file, view }) = stored.remove(name) else {
            let file = if files.len() == 1 { files[0].clone() } else { folder.join(INDEX_FILE) };
            let advice =
                if name == LM_HEAD { ": if it is the embedding, set tie_word_embeddings to true there" } else { "" };
            return Err(Error::file(file, format!("the weights lack `{name}`, which config.json calls for{advice}")));
        };
        let actual = shape_of(&view);
        if actual != *shape {
            let message = format!("`{name}` has shape {actual:?}, but config.json calls for {shape:?}");
            return Err(Error::file(file, message));
        }
        visit(file, name, &view)?;
    }
    match stored.first_key_value() {
        None => Ok(()),
        Some((name, Stored { file, .. })) => {
            let message = format!(
                "`{name}` is not a weight of the model that config.json describes: correct config.json, or remove the \
                 tensor if it is no part of the model"
            );
            Err(Error::file(*file, message))
        }
    }
}

/// The tensors of all files under the names that the model has for them. Files that were written
/// without the output projection lack the prefix of the others.
fn read_tensors<'m>(
    files: &'m [PathBuf],
    maps: &'m [memmap2::Mmap],
    shapes: &[(String, Vec<i64>)],
) -> Result<BTreeMap<String, Stored<'m>>> {
    let expected: BTreeSet<&str> = shapes.iter().map(|(name, _)| name.as_str()).collect();
    let mut stored = BTreeMap::new();
    for (file, map) in files.iter().zip(maps) {
        for (name, view) in parse(file, map)?.tensors() {
            // Older files hold this table, which the model computes itself.
            if name.ends_with(".rotary_emb.inv_freq") {
                continue;
            }
            let prefixed = format!("model.{name}");
            let name = if expected.contains(prefixed.as_str()) { prefixed } else { name };
            if let Some(Stored { file: other, .. }) = stored.get(&name) {
                let message = format!("`{name}` is in {} as well: remove one of the two", other.display());
                return Err(Error::file(file, message));
            }
            stored.insert(name, Stored { file, view });
        }
    }
    Ok(stored)
}

/// Leaves one of the two tensors that tied embeddings may be stored as. `transformers` keeps both
/// where they differ, and so does this toolkit once config.json says it.
fn tie(stored: &mut BTreeMap<String, Stored<'_>>) -> Result<()> {
    let Some(head) = stored.remove(LM_HEAD) else { return Ok(()) };
    let Some(embedding) = stored.get(EMBEDDING) else {
        stored.insert(EMBEDDING.to_owned(), head);
        return Ok(());
    };
    let load = |name: &str, stored: &Stored<'_>| -> Result<Tensor> {
        Ok(to_tensor(stored.file, name, &stored.view)?.f_to_kind(Kind::Float)?)
    };
    if embedding.view == head.view || load(EMBEDDING, embedding)? == load(LM_HEAD, &head)? {
        return Ok(());
    }
    let message = format!(
        "`{LM_HEAD}` differs from `{EMBEDDING}`, although config.json ties them: set tie_word_embeddings to false there \
         to use both, or remove `{LM_HEAD}`"
    );
    Err(Error::file(head.file, message))
}

/// Parses the content of a file.
pub(super) fn parse<'m>(file: &Path, bytes: &'m [u8]) -> Result<SafeTensors<'m>> {
    SafeTensors::deserialize(bytes).map_err(|error| {
        Error::file(file, format!("is not a complete safetensors file ({error}); copy or download it again"))
    })
}

fn shape_of(view: &TensorView<'_>) -> Vec<i64> {
    view.shape().iter().map(|&size| size as i64).collect()
}

pub(super) fn to_kind(file: &Path, name: &str, view: &TensorView<'_>) -> Result<Kind> {
    match view.dtype() {
        Dtype::F64 => Ok(Kind::Double),
        Dtype::F32 => Ok(Kind::Float),
        Dtype::F16 => Ok(Kind::Half),
        Dtype::BF16 => Ok(Kind::BFloat16),
        other => {
            let message = format!(
                "`{name}` is {other:?}, but only F64, F32, F16 and BF16 are supported: use the checkpoint in bfloat16"
            );
            Err(Error::file(file, message))
        }
    }
}

/// A copy on the CPU, in the type of the file.
pub(super) fn to_tensor(file: &Path, name: &str, view: &TensorView<'_>) -> Result<Tensor> {
    libtorch::tensor_from_bytes(view.data(), &shape_of(view), to_kind(file, name, view)?)
}

/// The safetensors files of a folder, in order. As in `transformers`, a single file is preferred to
/// several.
pub(super) fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let (single, index) = (folder.join(SINGLE_FILE), folder.join(INDEX_FILE));
    if single.exists() {
        return Ok(vec![single]);
    }
    if !folder.is_dir() {
        return Err(Error::file(folder, "there is no such model folder"));
    }
    if !index.exists() {
        let message = format!(
            "holds neither {SINGLE_FILE} nor {INDEX_FILE}: for weights in another format, `transformers` writes them with \
             AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        );
        return Err(Error::file(folder, message));
    }
    let text = text_file::read(&index)?;
    let json: Value = serde_json::from_str(&text).map_err(|error| Error::file(&index, error.to_string()))?;
    let weight_map = json["weight_map"].as_object().ok_or_else(|| Error::file(&index, "has no `weight_map`"))?;
    let mut files = Vec::new();
    for (name, file) in weight_map {
        let file = file.as_str().ok_or_else(|| Error::file(&index, format!("weight_map.{name}: expected a file")))?;
        files.push(folder.join(file));
    }
    files.sort();
    files.dedup();
    match files.iter().find(|file| !file.exists()) {
        Some(missing) => Err(Error::file(missing, format!("is missing, although {INDEX_FILE} names it"))),
        None => Ok(files),
    }
}

/// The names of a type in safetensors files and in config.json.
pub(super) struct DtypeNames {
    pub(super) safetensors: &'static str,
    /// As in config.json and in PyTorch.
    pub(super) torch: &'static str,
}

pub(super) fn dtype_names(kind: Kind) -> Result<DtypeNames> {
    match kind {
        Kind::Float => Ok(DtypeNames { safetensors: "F32", torch: "float32" }),
        Kind::Half => Ok(DtypeNames { safetensors: "F16", torch: "float16" }),
        Kind::BFloat16 => Ok(DtypeNames { safetensors: "BF16", torch: "bfloat16" }),
        other => Err(Error::internal(format!("weights cannot be saved as {other:?}"))),
    }
}

/// Writes weights as `kind` into an existing folder, in files of at most `max_shard_bytes` (a
/// larger tensor gets a file of its own).
pub(super) fn write_weights(
    folder: &Path,
    weights: &[(String, Tensor)],
    kind: Kind,
    max_shard_bytes: usize,
) -> Result<()> {
    let dtype = dtype_names(kind)?.safetensors;
    let element_bytes = kind.elt_size_in_bytes();
    let shards = split_into_shards(weights, element_bytes, max_shard_bytes);
    let mut weight_map = Map::new();
    for (index, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => SINGLE_FILE.to_owned(),
            num_shards => format!("model-{:05}-of-{num_shards:05}.safetensors", index + 1),
        };
        let shapes: Vec<_> = shard.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect();
        write_safetensors(&folder.join(&file), dtype, element_bytes, &shapes, |index| {
            libtorch::tensor_to_bytes(&shard[index].1.f_detach()?.f_to_kind(kind)?)
        })?;
        weight_map.extend(shard.iter().map(|(name, _)| (name.clone(), json!(file))));
    }
    if shards.len() > 1 {
        let total_bytes: usize = weights.iter().map(|(_, tensor)| tensor.numel() * element_bytes).sum();
        let index = json!({ "metadata": { "total_size": total_bytes }, "weight_map": weight_map });
        atomic_file::write_json(&folder.join(INDEX_FILE), &index)?;
    }
    // An earlier save may have left the other form, and a reader could not tell which of the two is
    // current.
    let stale = folder.join(if shards.len() > 1 { SINGLE_FILE } else { INDEX_FILE });
    if stale.exists() {
        std::fs::remove_file(&stale).map_err(Error::write(&stale))?;
    }
    Ok(())
}

fn split_into_shards(
    weights: &[(String, Tensor)],
    element_bytes: usize,
    max_shard_bytes: usize,
) -> Vec<&[(String, Tensor)]> {
    let mut shards = Vec::new();
    let (mut start, mut shard_bytes) = (0, 0);
    for (index, (_, tensor)) in weights.iter().enumerate() {
        let tensor_bytes = tensor.numel() * element_bytes;
        if shard_bytes + tensor_bytes > max_shard_bytes && index > start {
            shards.push(&weights[start..index]);
            (start, shard_bytes) = (index, 0);
        }
        shard_bytes += tensor_bytes;
    }
    shards.push(&weights[start..]);
    shards
}

/// Writes one safetensors file of tensors of one type. `tensor_bytes` returns the data of the
/// tensor at an index and is called for one tensor at a time, so that memory never holds a second
/// copy of the model.
///
/// # Errors
/// Those of `tensor_bytes`, and file-system errors.
pub fn write_safetensors(
    path: &Path,
    dtype: &str,
    element_bytes: usize,
    tensors: &[(String, Vec<i64>)],
    mut tensor_bytes: impl FnMut(usize) -> Result<Vec<u8>>,
) -> Result<()> {
    let mut header = Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]);
    let mut end = 0;
    for (name, shape) in tensors {
        let start = end;
        end += shape.iter().product::<i64>() as usize * element_bytes;
        header.insert(name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }));
    }
    let mut header = Value::Object(header).to_string();
    // The format asks for data aligned to 8 bytes.
    header.push_str(&" ".repeat(header.len().next_multiple_of(8) - header.len()));
    atomic_file::write_with(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes()).map_err(Error::write(path))?;
        file.write_all(header.as_bytes()).map_err(Error::write(path))?;
        for index in 0..tensors.len() {
            file.write_all(&tensor_bytes(index)?).map_err(Error::write(path))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::checkpoint;
    use crate::model::Transformer;

    #[test]
    fn shards_are_read_back_and_a_missing_one_is_named() {
        let json = json!({
            "model_type": "qwen3", "vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "tie_word_embeddings": true,
        });
        let config = ModelConfig::from_json(&json).unwrap();
        let model = Transformer::random(config, 3, Device::Cpu, Kind::Float);
        let weights = model.named_parameters();
        let dir = tempfile::tempdir().unwrap();
        checkpoint::save(&model, dir.path(), Kind::Float).unwrap();
        write_weights(dir.path(), &weights, Kind::Float, 1500).unwrap();
        let files = weight_files(dir.path()).unwrap();
        assert!(files.len() > 2, "{files:?}");
        let load = || checkpoint::load(dir.path(), Device::Cpu, Kind::Float);
        for ((name, written), (_, read)) in weights.iter().zip(load().unwrap().named_parameters()) {
            assert_eq!(*written, read, "{name}");
        }
        std::fs::remove_file(&files[1]).unwrap();
        let error = load().err().expect("a shard is missing").to_string();
        assert!(error.contains("model-00002-of-"), "{error}");
        checkpoint::save(&model, dir.path(), Kind::BFloat16).unwrap();
        assert_eq!(weight_files(dir.path()).unwrap(), [dir.path().join(SINGLE_FILE)]);
    }
}
