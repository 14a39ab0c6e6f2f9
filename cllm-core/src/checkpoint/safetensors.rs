//! The weights of a model in one or several safetensors files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};
use tch::Kind;

use super::tensor_file::{StoredTensor, TensorFile, TensorSpec, have_same_numbers};
use super::tensor_writer::TensorWriter;
use crate::model::ModelConfig;
use crate::{Error, Result, atomic_file, checksum, text_file};

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
const EMBEDDING: &str = "model.embed_tokens.weight";
const LM_HEAD: &str = "lm_head.weight";
/// Maximum size of a weights file, as in `transformers`.
const MAX_SHARD_BYTES: usize = 5_000_000_000;
/// What to do about a file that is not complete.
pub(super) const DOWNLOAD_ADVICE: &str = "copy or download it again";

/// Every weight of `config` with its name, in the order of the configuration.
///
/// # Errors
/// When a weight is missing, has another shape or a type that is not supported, or is not one of
/// the model's, and when tied embeddings come with an output projection of their own.
pub fn find_weights(folder: &Path, config: &ModelConfig) -> Result<Vec<(String, StoredTensor)>> {
    let shapes = config.parameter_shapes();
    let files = weight_files(folder)?;
    let mut stored = open_files(&files, &shapes)?;
    if config.tied_embeddings {
        tie(&mut stored)?;
    }
    let mut weights = Vec::new();
    for (name, shape) in shapes {
        let Some(tensor) = stored.remove(&name) else {
            let file = if files.len() == 1 { files[0].clone() } else { folder.join(INDEX_FILE) };
            let advice =
                if name == LM_HEAD { ": if it is the embedding, set tie_word_embeddings to true there" } else { "" };
            return Err(Error::file(file, format!("the weights lack `{name}`, which config.json calls for{advice}")));
        };
        let actual = tensor.shape();
        if actual != shape {
            let message = format!("`{name}` has shape {actual:?}, but config.json calls for {shape:?}");
            return Err(Error::file(tensor.path(), message));
        }
        tensor.kind(&name)?;
        weights.push((name, tensor));
    }
    match stored.first_key_value() {
        None => Ok(weights),
        Some((name, tensor)) => {
            let message = format!(
                "`{name}` is not a weight of the model that config.json describes: correct config.json, or remove the \
                 tensor if it is no part of the model"
            );
            Err(Error::file(tensor.path(), message))
        }
    }
}

/// The tensors of all files under the names that the model has for them. Files that were written
/// without the output projection lack the prefix of the others.
fn open_files(files: &[PathBuf], shapes: &[(String, Vec<i64>)]) -> Result<BTreeMap<String, StoredTensor>> {
    let expected: BTreeSet<&str> = shapes.iter().map(|(name, _)| name.as_str()).collect();
    let mut stored: BTreeMap<String, StoredTensor> = BTreeMap::new();
    for file in files {
        for (name, tensor) in TensorFile::open(file, DOWNLOAD_ADVICE)?.tensors() {
            // Older files hold this table, which the model computes itself.
            if name.ends_with(".rotary_emb.inv_freq") {
                continue;
            }
            let prefixed = format!("model.{name}");
            let name = if expected.contains(prefixed.as_str()) { prefixed } else { name };
            if let Some(other) = stored.get(&name) {
                let message = format!("`{name}` is in {} as well: remove one of the two", other.path().display());
                return Err(Error::file(file, message));
            }
            stored.insert(name, tensor);
        }
    }
    Ok(stored)
}

/// Leaves one of the two tensors that tied embeddings may be stored as. `transformers` keeps both
/// where they differ, and so does this toolkit once config.json says it.
fn tie(stored: &mut BTreeMap<String, StoredTensor>) -> Result<()> {
    let Some(head) = stored.remove(LM_HEAD) else { return Ok(()) };
    let Some(embedding) = stored.get(EMBEDDING) else {
        stored.insert(EMBEDDING.to_owned(), head);
        return Ok(());
    };
    if have_same_numbers((EMBEDDING, embedding), (LM_HEAD, &head))? {
        return Ok(());
    }
    let message = format!(
        "`{LM_HEAD}` differs from `{EMBEDDING}`, although config.json ties them: set tie_word_embeddings to false there \
         to use both, or remove `{LM_HEAD}`"
    );
    Err(Error::file(head.path(), message))
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
        if !checksum::is_inside(Path::new(file)) {
            let message =
                format!("weight_map.{name} names `{file}`, which is outside of the folder: copy the file into it");
            return Err(Error::file(&index, message));
        }
        files.push(folder.join(file));
    }
    files.sort();
    files.dedup();
    match files.iter().find(|file| !file.exists()) {
        Some(missing) => Err(Error::file(missing, format!("is missing, although {INDEX_FILE} names it"))),
        None => Ok(files),
    }
}

/// Name and shape of a weight to write.
pub type NamedShape = (String, Vec<i64>);

/// Writes weights as `kind` into an existing folder, in files of at most 5 GB (a larger tensor gets
/// a file of its own). `write` gives the writer the data of the weight at an index; it is called for
/// one at a time, in order.
///
/// # Errors
/// Those of `write` and of [`TensorWriter`]; file-system errors.
pub fn write_weights(
    writer: &mut TensorWriter,
    folder: &Path,
    shapes: &[NamedShape],
    kind: Kind,
    write: impl FnMut(&mut TensorWriter, usize) -> Result<()>,
) -> Result<()> {
    write_shards(writer, folder, shapes, kind, MAX_SHARD_BYTES, write)
}

fn write_shards(
    writer: &mut TensorWriter,
    folder: &Path,
    shapes: &[NamedShape],
    kind: Kind,
    max_shard_bytes: usize,
    mut write: impl FnMut(&mut TensorWriter, usize) -> Result<()>,
) -> Result<()> {
    let specs: Vec<_> =
        shapes.iter().map(|(name, shape)| TensorSpec { name: name.clone(), kind, shape: shape.clone() }).collect();
    let shards = split_into_shards(&specs, max_shard_bytes);
    let mut weight_map = Map::new();
    let mut index = 0;
    for (number, shard) in shards.iter().enumerate() {
        let file = match shards.len() {
            1 => SINGLE_FILE.to_owned(),
            num_shards => format!("model-{:05}-of-{num_shards:05}.safetensors", number + 1),
        };
        writer.begin_file(&folder.join(&file), &[], shard)?;
        for spec in *shard {
            write(writer, index)?;
            weight_map.insert(spec.name.clone(), json!(file));
            index += 1;
        }
    }
    if shards.len() > 1 {
        let total_bytes: usize = specs.iter().map(TensorSpec::num_bytes).sum();
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

fn split_into_shards(specs: &[TensorSpec], max_shard_bytes: usize) -> Vec<&[TensorSpec]> {
    let mut shards = Vec::new();
    let (mut start, mut shard_bytes) = (0, 0);
    for (index, spec) in specs.iter().enumerate() {
        if shard_bytes + spec.num_bytes() > max_shard_bytes && index > start {
            shards.push(&specs[start..index]);
            (start, shard_bytes) = (index, 0);
        }
        shard_bytes += spec.num_bytes();
    }
    shards.push(&specs[start..]);
    shards
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::checkpoint::{self, STREAMING_BYTES};
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
        let shapes: Vec<_> = weights.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect();
        let mut writer = TensorWriter::new(Device::Cpu, STREAMING_BYTES);
        let write = |writer: &mut TensorWriter, index: usize| writer.write(&weights[index].1, Kind::Float);
        write_shards(&mut writer, dir.path(), &shapes, Kind::Float, 1500, write).unwrap();
        writer.finish().unwrap();
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
