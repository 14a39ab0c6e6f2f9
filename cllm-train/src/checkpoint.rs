//! Checkpoints of a run: a Hugging Face folder (or an adapter alone) with the training state beside it; whole or not at all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cllm_core::checkpoint::hub;
use cllm_core::cuda::libtorch;
use cllm_core::model::Transformer;
use cllm_core::tokenizer::{self, Tokenizer};
use cllm_core::{Error, Result, atomic_file, fingerprint, text_file, trajectory};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Kind, Tensor};

use crate::optimizer::State;
use crate::settings::{Objective, Settings};
use crate::validation::best_checkpoint::Selection;

/// Where a run stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Position {
    /// Steps done.
    pub step: usize,
    /// Tokens seen, padding aside.
    pub tokens: usize,
    /// Noisy blocks seen.
    pub blocks: usize,
    /// Steps skipped because a gradient was not finite.
    pub skipped: usize,
    /// Seconds of training.
    pub seconds: f64,
    /// What the probes found.
    pub selection: Selection,
    /// What the course of the run depends on.
    pub origin: Origin,
}

/// What the course of a run depends on: a run goes on only from the same.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// Each setting, and fingerprints of what settings only name: the model, the tokenizer, each data set.
    contents: BTreeMap<String, String>,
}

impl Origin {
    /// That of a run which takes its tokenizer, and with it the model, from `folder`.
    pub fn of(settings: &Settings, tokenizer: &Tokenizer, folder: &Path) -> Result<Self> {
        // What changes nothing of it may be changed on the way.
        let course = Settings {
            log_every: 1,
            save_every: None,
            max_checkpoints: 1,
            checkpointed_layers: 0,
            output: PathBuf::new(),
            device: String::new(),
            ..settings.clone()
        };
        let course = serde_json::to_value(&course).map_err(|error| Error::usage(format!("settings: {error}")))?;
        let mut contents = BTreeMap::from([("the tokenizer".to_owned(), tokenizer.fingerprint().to_owned())]);
        add_settings(&mut contents, "", &course);
        if let Some(model) = &settings.model {
            contents.insert(format!("the model {}", model), cllm_core::checkpoint::fingerprint(folder)?);
        }
        if let Some(name) = settings.consistency.anchor.as_ref().filter(|_| settings.is_anchored()) {
            contents.insert(format!("the anchor {name}"), cllm_core::checkpoint::fingerprint(&hub::locate(name)?)?);
        }
        for path in &settings.datasets {
            let content = match settings.objective {
                Objective::Sft => fingerprint::hash_files(&[path])?,
                Objective::Consistency => trajectory::fingerprint(path)?,
            };
            contents.insert(format!("the data {}", path.display()), content);
        }
        let probe = &settings.validation;
        if let Some(prompts) = &probe.prompts {
            contents.insert(format!("the probe {}", prompts.display()), fingerprint::hash_files(&[prompts])?);
        }
        if let Some(trajectories) = &probe.trajectories {
            let name = format!("the probe {}", trajectories.display());
            contents.insert(name, trajectory::fingerprint(trajectories)?);
        }
        Ok(Origin { contents })
    }

    /// In what a run that began from `self` differs from one that begins from `now`.
    fn difference(&self, now: &Origin) -> Option<String> {
        let then = |name: &String| self.contents.get(name).map_or("none", String::as_str);
        let (name, now) = now.contents.iter().find(|(name, now)| then(name) != now.as_str())?;
        Some(format!("holds a run for which {name} was another ({} then, {now} now)", then(name)))
    }
}

/// Adds every setting below `value`, whose own name is `name`.
fn add_settings(contents: &mut BTreeMap<String, String>, name: &str, value: &Value) {
    match value {
        Value::Object(section) => {
            for (key, value) in section {
                add_settings(contents, &if name.is_empty() { key.clone() } else { format!("{name}.{key}") }, value);
            }
        }
        value => {
            contents.insert(format!("`{name}`"), value.to_string());
        }
    }
}

/// Writes checkpoints/step-NNNNNN, moves `latest`, and removes old ones. Every process calls it, one writes.
pub fn save(
    run: &Path,
    model: &Transformer,
    tokenizer_of: &Path,
    state: &State,
    position: &Position,
    settings: &Settings,
    writes: bool,
) -> Result<()> {
    let tensors = state.tensors()?;
    if !writes {
        return state.with_average(|| Ok(()));
    }
    let all = run.join("checkpoints");
    let name = format!("step-{:06}", position.step);
    atomic_file::write_folder_with(&all.join(&name), |folder| {
        // First: the masters may be the weights themselves.
        write_tensors(&folder.join("optimizer.safetensors"), &tensors)?;
        state.with_average(|| {
            if settings.lora.is_some() {
                save_adapter(folder, model, tokenizer_of, settings)
            } else {
                save_model(folder, model, tokenizer_of, settings)
            }
        })?;
        atomic_file::write_json(&folder.join("state.json"), position)
    })?;
    // First: a kill between the two must not leave `latest` with a best that nothing points to.
    let best = position.selection.best.map(|(step, _)| step);
    if best == Some(position.step) {
        point(&all, "best", &name)?;
    }
    point(&all, "latest", &name)?;
    rotate(&all, settings.max_checkpoints, best)
}

/// Writes a model with its tokenizer into a folder; adapters are merged, and stand once more by themselves in `adapter`.
pub fn save_model(folder: &Path, model: &Transformer, tokenizer_of: &Path, settings: &Settings) -> Result<()> {
    cllm_core::checkpoint::save(&model, folder, model.kind())?;
    save_tokenizer(folder, tokenizer_of, settings)?;
    if settings.lora.is_some() {
        let adapter = folder.join("adapter");
        std::fs::create_dir(&adapter).map_err(Error::write(&adapter))?;
        save_adapter(&adapter, model, tokenizer_of, settings)?;
    }
    Ok(())
}

/// Writes the adapters alone, with the tokenizer, into a folder.
fn save_adapter(folder: &Path, model: &Transformer, tokenizer_of: &Path, settings: &Settings) -> Result<()> {
    cllm_core::checkpoint::save_adapter(&model, folder, settings.model.as_deref().unwrap_or_default())?;
    save_tokenizer(folder, tokenizer_of, settings)
}

fn save_tokenizer(folder: &Path, tokenizer_of: &Path, settings: &Settings) -> Result<()> {
    tokenizer::copy_files(tokenizer_of, folder)?;
    settings.eos_ids.as_ref().map_or(Ok(()), |ids| tokenizer::write_eos_ids(folder, ids))
}

/// Clears away what a killed process left half-written.
pub fn recover(run: &Path) -> Result<()> {
    [run, &run.join("checkpoints")].into_iter().try_for_each(atomic_file::recover)
}

/// Restores the newest checkpoint of a run, if it has one. Every process calls it.
pub fn resume(run: &Path, state: &mut State, origin: &Origin) -> Result<Option<Position>> {
    let all = run.join("checkpoints");
    let mut folder = all.join("latest");
    if !folder.exists() {
        // Someone may have deleted the newest: the one before it is nearer than the start.
        let Some((_, newest)) = steps(&all)?.pop() else { return Ok(None) };
        folder = newest;
    }
    let damaged = |path: &Path, what: &dyn std::fmt::Display| {
        let advice = format!("delete {} to go on from the checkpoint before it", real_path(&folder).display());
        Error::file(path, format!("is no whole training state ({what}): {advice}"))
    };
    let path = folder.join("state.json");
    let text = text_file::read(&path)?;
    let position: Position = serde_json::from_str(&text).map_err(|error| damaged(&path, &error))?;
    if let Some(difference) = position.origin.difference(origin) {
        let advice = "choose another output folder, or delete it to start anew";
        return Err(Error::file(run, format!("{difference}; {advice}")));
    }
    let path = folder.join("optimizer.safetensors");
    let map = libtorch::map_file(&path)?;
    let tensors = SafeTensors::deserialize(&map).map_err(|error| damaged(&path, &error))?;
    state.restore(position.skipped, |name, like| {
        let view = tensors.tensor(name).ok()?;
        libtorch::tensor_from_bytes(view.data(), &like.size(), like.kind()).ok()
    })?;
    Ok(Some(position))
}

fn write_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let broken = |error| Error::file(path, format!("{error}"));
    let bytes = tensors.iter().map(|(_, tensor)| libtorch::tensor_to_bytes(tensor)).collect::<Result<Vec<_>>>()?;
    let views = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, tensor), bytes)| {
            let shape = tensor.size().iter().map(|&size| size as usize).collect();
            let dtype = if tensor.kind() == Kind::BFloat16 { Dtype::BF16 } else { Dtype::F32 };
            Ok((name.as_str(), TensorView::new(dtype, shape, bytes).map_err(broken)?))
        })
        .collect::<Result<Vec<_>>>()?;
    atomic_file::write(path, &safetensors::serialize(views, None).map_err(broken)?)
}

/// Makes the link `name` point to `target`, at once.
fn point(folder: &Path, name: &str, target: &str) -> Result<()> {
    let new = folder.join(format!(".{name}"));
    let _ = std::fs::remove_file(&new);
    std::os::unix::fs::symlink(target, &new).map_err(Error::write(&new))?;
    std::fs::rename(&new, folder.join(name)).map_err(Error::write(folder))
}

fn rotate(folder: &Path, max_checkpoints: usize, best: Option<usize>) -> Result<()> {
    let mut steps = steps(folder)?;
    steps.retain(|(step, _)| Some(*step) != best);
    let old = steps.len().saturating_sub(max_checkpoints);
    steps[..old].iter().try_for_each(|(_, path)| std::fs::remove_dir_all(path).map_err(Error::write(path)))
}

/// The checkpoints of a folder, oldest first.
fn steps(folder: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let mut steps = Vec::new();
    if !folder.exists() {
        return Ok(steps);
    }
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let path = entry.map_err(Error::io(folder))?.path();
        let step = path.file_name().and_then(|name| name.to_str()?.strip_prefix("step-")?.parse().ok());
        steps.extend(step.map(|step| (step, path)));
    }
    steps.sort();
    Ok(steps)
}

/// Where a link leads.
fn real_path(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}
