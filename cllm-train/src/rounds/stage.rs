//! The stages of a round: what each depends on, what it produces, and how it runs.

use std::path::{Path, PathBuf};

use cllm_core::chat_template::today;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::Reader;
use cllm_core::{Error, Result, checkpoint, device, fingerprint, text_file, trajectory};
use cllm_data::{augment, clean, collect};
use serde_json::{Value, json};

use crate::export::export;
use crate::run_fingerprint::RunFingerprint;
use crate::run_folder::{BEST, FINAL, checkpoints_folder};
use crate::settings::Settings;
use crate::summary::SUMMARY_FILE;
use crate::trainer;

/// The folder in a run's that has its best checkpoint with the adapters merged.
const MERGED: &str = "best-merged";

/// One stage of a round, with its settings.
pub enum Stage<'r> {
    Collect(&'r collect::Settings),
    Augment(&'r augment::Settings),
    Clean(&'r clean::Settings),
    Train(&'r Settings),
}

impl Stage<'_> {
    pub fn name(&self) -> &'static str {
        match self {
            Stage::Collect(_) => "collect",
            Stage::Augment(_) => "augment",
            Stage::Clean(_) => "clean",
            Stage::Train(_) => "train",
        }
    }

    /// The folder that the stage writes.
    pub fn folder(&self) -> &Path {
        match self {
            Stage::Collect(settings) => &settings.output,
            Stage::Augment(settings) => &settings.output,
            Stage::Clean(settings) => &settings.output,
            Stage::Train(settings) => &settings.output,
        }
    }

    /// Everything that the result depends on. The contents of paths are part of it, but not the
    /// paths themselves, nor the batch size.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn inputs(&self) -> Result<RunFingerprint> {
        let mut inputs = RunFingerprint::default();
        match self {
            Stage::Collect(settings) => {
                inputs.add_settings(settings, &["model", "prompts", "output", "data", "device", "batch_size"])?;
                inputs.add_contents("the model", checkpoint::fingerprint(Path::new(&settings.model))?);
                inputs.add_contents("the prompts", fingerprint::hash_contents(&settings.prompts)?);
            }
            Stage::Augment(settings) => {
                inputs.add_settings(settings, &["input", "output"])?;
                inputs.add_contents("the trajectories", trajectory::fingerprint(&settings.input)?);
            }
            Stage::Clean(settings) => {
                inputs.add_settings(settings, &["input", "output", "model", "data", "evaluation_prompts"])?;
                inputs.add_contents("the trajectories", trajectory::fingerprint(&settings.input)?);
                if settings.drop_incorrect {
                    // Some tasks cannot tell what is incorrect without it.
                    inputs.add_settings(&json!({ "data": settings.data.is_some() }), &[])?;
                }
                for (index, path) in settings.evaluation_prompts.iter().enumerate() {
                    let name = format!("evaluation prompts {}", index + 1);
                    inputs.add_contents(name, fingerprint::hash_contents(path)?);
                }
            }
            Stage::Train(settings) => {
                let model = settings.model.as_ref().ok_or_else(|| Error::internal("a round trains without a model"))?;
                let folder = Path::new(model);
                let tokenizer = Tokenizer::load_for(folder, &settings.rendering.resolve(today())?)?;
                return RunFingerprint::for_training(settings, &tokenizer, folder);
            }
        }
        Ok(inputs)
    }

    /// The fingerprint of the stage's output, if that is complete.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn output_fingerprint(&self) -> Result<Option<String>> {
        let folder = self.folder();
        if let Stage::Train(_) = self {
            let is_complete = folder.join(SUMMARY_FILE).exists();
            return is_complete.then(|| checkpoint::fingerprint(&best_model(folder))).transpose();
        }
        match Reader::open(folder) {
            Ok(_) => trajectory::fingerprint(folder).map(Some),
            Err(interrupted @ Error::Interrupted(_)) => Err(interrupted),
            Err(_) => Ok(None),
        }
    }

    /// Runs the stage, or the rest of it, and returns its summary.
    ///
    /// # Errors
    /// Those of the stage.
    pub fn run(&self) -> Result<Value> {
        match self {
            Stage::Collect(settings) => {
                let summary = collect::collect(settings)?;
                Ok(json!(summary.total))
            }
            Stage::Augment(settings) => {
                augment::augment(settings)?;
                Ok(Value::Null)
            }
            Stage::Clean(settings) => {
                let report = clean::clean(settings)?;
                Ok(json!(report))
            }
            Stage::Train(settings) => {
                trainer::run((*settings).clone())?;
                read_json(&settings.output.join(SUMMARY_FILE))
            }
        }
    }
}

/// The model that a training run hands to the next round: its best model. Adapters are merged, since
/// those of the next round cannot be trained on top of them.
///
/// # Errors
/// Those of loading and writing the model.
pub fn hand_on(settings: &Settings) -> Result<PathBuf> {
    let (best, merged) = (best_model(&settings.output), settings.output.join(MERGED));
    if !checkpoint::is_adapter(&best) || settings.adapts_drafts() {
        return Ok(best);
    }
    if !merged.exists() {
        export(&best, device::default_kind(device::parse(&settings.device)?), &merged, false)?;
    }
    Ok(merged)
}

/// The best checkpoint of a training run if validation chose one, otherwise its final model.
fn best_model(run: &Path) -> PathBuf {
    let best = checkpoints_folder(run).join(BEST);
    if best.exists() { best } else { run.join(FINAL) }
}

fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_str(&text_file::read(path)?).map_err(|error| Error::file(path, format!("is not JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_round_starts_from_the_best_checkpoint_if_there_is_one() {
        let run = tempfile::tempdir().unwrap();
        assert_eq!(best_model(run.path()), run.path().join("final"));
        std::fs::create_dir_all(run.path().join("checkpoints/best")).unwrap();
        assert_eq!(best_model(run.path()), run.path().join("checkpoints/best"));
    }
}
