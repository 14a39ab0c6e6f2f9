//! The optimizer state of a checkpoint. Every process writes its shards to a file of its own. To
//! resume, it reads the elements of its shards from the files that hold them, so the number of
//! processes may differ.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use cllm_core::checkpoint::{self, StoredTensor, TensorFile, TensorSpec, TensorWriter, read_tensors};
use cllm_core::distributed::ProcessGroup;
use cllm_core::model::ModelConfig;
use cllm_core::{Error, Result};
use tch::Tensor;

use crate::optimizer::{MASTER_WEIGHTS, OptimizerState};

/// The one file of checkpoints by earlier versions, with the state of each weight under
/// `NAME.WEIGHT`.
const OLD_FILE: &str = "optimizer.safetensors";
/// Keys of a file's metadata: the first element of its shards in the layout of all weights, and the
/// fingerprint of that layout.
const FIRST_ELEMENT: &str = "first_element";
const LAYOUT: &str = "layout";

fn file_name(rank: usize, world_size: usize) -> String {
    format!("optimizer-{:05}-of-{world_size:05}.safetensors", rank + 1)
}

/// Whether a file of a checkpoint has optimizer state.
pub fn is_optimizer_file(name: &str) -> bool {
    name == OLD_FILE || world_size_of(name).is_some()
}

/// The number of processes in a file's name.
fn world_size_of(name: &str) -> Option<usize> {
    let (rank, world_size) = name.strip_prefix("optimizer-")?.strip_suffix(".safetensors")?.split_once("-of-")?;
    rank.parse::<usize>().ok().and(world_size.parse().ok())
}

/// Writes this process's shards, without master weights if `skip_masters`: the model beside them
/// has them.
///
/// # Errors
/// As [`TensorWriter::write`].
pub fn write(
    writer: &mut TensorWriter,
    folder: &Path,
    optimizer: &OptimizerState,
    group: &ProcessGroup,
    skip_masters: bool,
) -> Result<()> {
    let elements = own_weights(optimizer);
    let mut shards: Vec<(&str, Tensor)> = Vec::new();
    for (name, shard) in optimizer.shards() {
        if !(skip_masters && name == MASTER_WEIGHTS) {
            shards.push((name, shard.f_narrow(0, 0, elements.end - elements.start)?));
        }
    }
    let spec = |(name, shard): &(&str, Tensor)| TensorSpec {
        name: (*name).to_owned(),
        kind: shard.kind(),
        shape: shard.size(),
    };
    let metadata = [(FIRST_ELEMENT, elements.start.to_string()), (LAYOUT, optimizer.layout().layout_fingerprint())];
    let path = folder.join(file_name(group.rank(), group.world_size()));
    writer.begin_file(&path, &metadata, &shards.iter().map(spec).collect::<Vec<_>>())?;
    shards.iter().try_for_each(|(_, shard)| writer.write(shard, shard.kind()))
}

/// This process's elements up to those of the last weight; only padding follows.
fn own_weights(optimizer: &OptimizerState) -> Range<i64> {
    let Range { start, end } = optimizer.shard_elements();
    let num_weights = optimizer.layout().ranges().map(|(_, range)| range.end).max().unwrap_or(0);
    start..end.min(num_weights).max(start)
}

/// How many elements of a range belong to a weight. The others are padding between two of them.
fn num_of_weights(optimizer: &OptimizerState, elements: &Range<i64>) -> i64 {
    let overlap = |(_, weight): (&str, Range<i64>)| weight.end.min(elements.end) - weight.start.max(elements.start);
    optimizer.layout().ranges().map(|range| overlap(range).max(0)).sum()
}

/// Fills this process's shards. `advice` says what to do about a damaged file.
///
/// # Errors
/// [`Error::File`] for files that are missing or incomplete or belong to other weights.
pub fn read(folder: &Path, optimizer: &OptimizerState, config: &ModelConfig, advice: &str) -> Result<()> {
    let files = StateFiles::open(folder, optimizer, advice)?;
    for (name, shard) in optimizer.shards() {
        let mut stretches = files.stretches(name, optimizer);
        if stretches.is_empty() && name == MASTER_WEIGHTS {
            stretches = model_weights(folder, optimizer, config, advice)?;
        }
        fill((folder, advice), name, shard, optimizer, stretches)?;
    }
    Ok(())
}

/// Consecutive elements of the layout, from the given one on, and where they are stored.
type Stretch = (i64, StoredTensor);

/// Fills a shard from the stretches that have some of its elements.
fn fill(
    (folder, advice): (&Path, &str),
    name: &str,
    shard: &Tensor,
    optimizer: &OptimizerState,
    stretches: Vec<Stretch>,
) -> Result<()> {
    let own = own_weights(optimizer);
    let (mut stored, mut targets, mut num_found) = (Vec::new(), Vec::new(), 0);
    for (first, tensor) in stretches {
        let elements = own.start.max(first)..own.end.min(first + tensor.num_elements());
        if elements.is_empty() {
            continue;
        }
        let kind = tensor.kind(name)?;
        if kind != shard.kind() {
            let message = format!("`{name}` is {kind:?}, but this run keeps it as {:?}", shard.kind());
            return Err(Error::file(tensor.path(), message));
        }
        num_found += num_of_weights(optimizer, &elements);
        stored.push((name.to_owned(), tensor.narrow(elements.start - first..elements.end - first)));
        targets.push(elements.start - own.start..elements.end - own.start);
    }
    if num_found != num_of_weights(optimizer, &own) {
        return Err(Error::file(folder, format!("the optimizer state lacks a part of `{name}`: {advice}")));
    }
    let target = |index: usize| {
        let Range { start, end } = targets[index];
        Ok(shard.f_narrow(0, start, end - start)?)
    };
    read_tensors(&stored, shard.device(), target, |_, _| Ok(()))
}

/// The master weights of a checkpoint whose model has them.
fn model_weights(
    folder: &Path,
    optimizer: &OptimizerState,
    config: &ModelConfig,
    advice: &str,
) -> Result<Vec<Stretch>> {
    let weights = checkpoint::find_weights(folder, config).map_err(|error| match error {
        // The advice for models of other origins would be of no help.
        Error::File { path, .. } => Error::file(path, format!("holds no complete model: {advice}")),
        other => other,
    })?;
    let mut weights: HashMap<_, _> = weights.into_iter().collect();
    let stretch = |(name, range): (&str, Range<i64>)| Some((range.start, weights.remove(name)?));
    Ok(optimizer.layout().ranges().filter_map(stretch).collect())
}

/// The open files of a checkpoint's optimizer state.
enum StateFiles {
    /// Those of all processes: the first element of their shards, and these by name.
    Shards(Vec<(i64, HashMap<String, StoredTensor>)>),
    /// That of an earlier version.
    ByWeight(HashMap<String, StoredTensor>),
}

impl StateFiles {
    fn open(folder: &Path, optimizer: &OptimizerState, advice: &str) -> Result<Self> {
        if folder.join(OLD_FILE).exists() {
            let file = TensorFile::open(&folder.join(OLD_FILE), advice)?;
            return Ok(StateFiles::ByWeight(file.tensors().collect()));
        }
        let mut world_size = 0;
        for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
            let name = entry.map_err(Error::io(folder))?.file_name();
            world_size = world_size.max(name.to_str().and_then(world_size_of).unwrap_or(0));
        }
        if world_size == 0 {
            return Err(Error::file(folder, format!("has no optimizer state: {advice}")));
        }
        let layout = optimizer.layout().layout_fingerprint();
        let shards = (0..world_size).map(|rank| {
            let path = folder.join(file_name(rank, world_size));
            if !path.exists() {
                return Err(Error::file(path, format!("is missing: {advice}")));
            }
            let file = TensorFile::open(&path, advice)?;
            let first_element = file.metadata(FIRST_ELEMENT).and_then(|text| text.parse().ok());
            match first_element.filter(|_| file.metadata(LAYOUT) == Some(&layout)) {
                Some(first_element) => Ok((first_element, file.tensors().collect())),
                None => Err(Error::file(path, format!("belongs to other weights than those of this run: {advice}"))),
            }
        });
        Ok(StateFiles::Shards(shards.collect::<Result<_>>()?))
    }

    fn stretches(&self, name: &str, optimizer: &OptimizerState) -> Vec<Stretch> {
        match self {
            StateFiles::Shards(shards) => {
                shards.iter().filter_map(|(first, tensors)| Some((*first, tensors.get(name)?.clone()))).collect()
            }
            StateFiles::ByWeight(tensors) => {
                let stretch = |(weight, range): (&str, Range<i64>)| {
                    let tensor = tensors.get(&format!("{name}.{weight}"))?;
                    (tensor.num_elements() == range.end - range.start).then(|| (range.start, tensor.clone()))
                };
                optimizer.layout().ranges().filter_map(stretch).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use cllm_core::checkpoint::STREAMING_BYTES;
    use cllm_core::cuda::libtorch::with_peak_cpu_memory;
    use cllm_core::model::Transformer;
    use serde_json::json;
    use tch::{Device, Kind};

    use super::*;
    use crate::settings::{OptimizerSettings, Settings, StateDtype};

    fn random_state(config: &ModelConfig, seed: u64) -> (Transformer, OptimizerState) {
        let model = Transformer::random(config.clone(), seed, Device::Cpu, Kind::BFloat16);
        let optimizer = OptimizerSettings {
            state_dtype: StateDtype::Bfloat16,
            ema_decay: Some(0.9),
            ..Settings::plain().optimizer
        };
        let settings = Settings { optimizer, ..Settings::plain() };
        let state = OptimizerState::new(&model, &settings, Rc::new(ProcessGroup::single())).unwrap();
        tch::manual_seed(seed as i64);
        for (_, shard) in state.shards() {
            let _ = tch::no_grad(|| shard.shallow_clone().normal_(0.0, 1.0));
        }
        (model, state)
    }

    /// Three tensors of two bytes for each weight, and the average of four.
    #[test]
    fn an_average_beside_a_bf16_state_is_written_in_pieces_and_read_back() {
        let config = json!({
            "model_type": "llama", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 2048,
            "num_hidden_layers": 2, "num_attention_heads": 8, "tie_word_embeddings": true,
        });
        let config = ModelConfig::from_json(&config).unwrap();
        let weight_bytes = 2 * config.num_parameters() as u64;
        let piece_bytes = STREAMING_BYTES as u64 / 8;
        assert!(5 * weight_bytes > 6 * piece_bytes, "the state is much larger than a piece");
        let dir = tempfile::tempdir().unwrap();
        let (model, state) = random_state(&config, 1);
        let group = ProcessGroup::single();
        let writing = |write: &dyn Fn(&mut TensorWriter) -> Result<()>| {
            let write = || {
                let mut writer = TensorWriter::new(Device::Cpu, piece_bytes as usize);
                write(&mut writer).unwrap();
                writer.finish().unwrap();
            };
            let ((), peak) = with_peak_cpu_memory(write).unwrap();
            peak as f64 / piece_bytes as f64
        };
        let of_state = writing(&|writer| write(writer, dir.path(), &state, &group, false));
        assert!((1.0..1.05).contains(&of_state), "{of_state} pieces");
        // While the model has the average, its own weights are kept beside it.
        let of_model =
            writing(&|writer| state.with_average(|| checkpoint::save_with(writer, &model, dir.path(), model.kind())));
        let expected = 1.0 + weight_bytes as f64 / piece_bytes as f64;
        assert!((0.95..1.05).contains(&(of_model / expected)), "{of_model} pieces, expected {expected}");

        let without_padding = |shard: &Tensor| shard.narrow(0, 0, own_weights(&state).end);
        let (name, average) = state.shards()[3];
        let saved = checkpoint::load(dir.path(), Device::Cpu, Kind::BFloat16).unwrap();
        let expected = without_padding(average).to_kind(Kind::BFloat16);
        assert_eq!((name, without_padding(saved.weights().buffer())), ("ema", expected));
        let (_, other) = random_state(&config, 2);
        read(dir.path(), &other, &config, "").unwrap();
        for ((name, shard), (_, expected)) in other.shards().into_iter().zip(state.shards()) {
            assert_eq!(without_padding(shard), without_padding(expected), "{name}");
        }
    }
}
