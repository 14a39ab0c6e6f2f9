//! `rounds`: on-policy rounds of collecting and training. A student's own trajectories show it the states that it meets itself,
//! and as it gets faster n may grow (Jacobi Forcing, arXiv 2512.14681, trains a second round with twice the n).

mod report;
mod settings;

use std::path::{Path, PathBuf};

use cllm_core::checkpoint::hub;
use cllm_core::distributed::ProcessEnv;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::Reader;
use cllm_core::{Error, Result, atomic_file, fingerprint, interrupt, progress, text_file, trajectory};
use cllm_data::{augment, clean, collect};
use serde::Serialize;
use serde_json::{Value, json};

use crate::checkpoint::Origin;
use crate::trainer;
use report::{Report, Standing};
use settings::Round;
pub use settings::Settings;

/// One stage of a round.
enum Stage<'r> {
    Collect(&'r collect::Settings),
    Augment(&'r augment::Settings),
    Clean(&'r clean::Settings),
    Train(&'r crate::settings::Settings),
}

/// Does the rounds, or goes on with what the output folder holds: a finished stage is not done again, and a stage that was
/// stopped goes on where it was. Returns the path of `rounds.json`, which tells how far they are.
///
/// # Errors
/// What a stage meets; a finished stage whose inputs or output are others now.
pub fn run(settings: &Settings) -> Result<PathBuf> {
    if ProcessEnv::from_env(|name| std::env::var(name).ok())?.is_some() {
        let message = "rounds run in one process: with several, run `cllm-data collect` and `cllm-train run` in turns";
        return Err(Error::usage(message));
    }
    let output = settings.output.clone();
    let mut model = hub::locate(&settings.model)?;
    let report = Report::read(&output)?;
    let mut rounds = Rounds { settings, output, report };
    for index in 0..settings.rounds.len() {
        let round = settings.round(index, &model)?;
        for stage in round.stages() {
            interrupt::check()?;
            rounds.do_stage(index, &round, &stage)?;
        }
        model = student(&round.train.output);
        rounds.report.model = Some(model.clone());
    }
    rounds.report.complete = true;
    rounds.save()?;
    progress::log(format!("{} rounds done; the model is in {}", settings.rounds.len(), model.display()));
    Ok(rounds.output.join(report::FILE))
}

struct Rounds<'s> {
    settings: &'s Settings,
    output: PathBuf,
    report: Report,
}

impl Rounds<'_> {
    fn do_stage(&mut self, index: usize, round: &Round, stage: &Stage<'_>) -> Result<()> {
        let (name, folder, inputs) = (stage.name(), stage.folder(), stage.inputs()?);
        let found = stage.output()?;
        let standing = self.report.standing(index, name, &inputs, (folder, found.as_deref()))?;
        if standing == Standing::Finished {
            return Ok(());
        }
        progress::log(format!("round {}: {name}", index + 1));
        self.report.begin(index, round.collect.n, name, inputs);
        self.save()?;
        let figures = stage.run(standing == Standing::Begun && found.is_some())?;
        let left = stage.output()?.ok_or_else(|| Error::file(folder, "is not whole although the stage is done"))?;
        self.report.finish(index, name, left, figures);
        self.save()
    }

    fn save(&self) -> Result<()> {
        std::fs::create_dir_all(&self.output).map_err(Error::write(&self.output))?;
        let settings = cllm_core::settings::to_yaml(self.settings)?;
        atomic_file::write(&self.output.join("config.yaml"), settings.as_bytes())?;
        self.report.write(&self.output)
    }
}

/// The model that a run of training gives to the next round: its best checkpoint where a probe found one, else the last.
fn student(run: &Path) -> PathBuf {
    let best = run.join("checkpoints/best");
    if best.exists() { best } else { run.join("final") }
}

impl Round {
    fn stages(&self) -> Vec<Stage<'_>> {
        let stages = [
            Some(Stage::Collect(&self.collect)),
            self.augment.as_ref().map(Stage::Augment),
            self.clean.as_ref().map(Stage::Clean),
            Some(Stage::Train(&self.train)),
        ];
        stages.into_iter().flatten().collect()
    }
}

impl Stage<'_> {
    fn name(&self) -> &'static str {
        match self {
            Stage::Collect(_) => "collect",
            Stage::Augment(_) => "augment",
            Stage::Clean(_) => "clean",
            Stage::Train(_) => "train",
        }
    }

    fn folder(&self) -> &Path {
        match self {
            Stage::Collect(settings) => &settings.output,
            Stage::Augment(settings) => &settings.output,
            Stage::Clean(settings) => &settings.output,
            Stage::Train(settings) => &settings.output,
        }
    }

    /// Fingerprint of all that its result depends on; where things lie is no part of it, nor how many are worked on at once.
    fn inputs(&self) -> Result<String> {
        let inputs = match self {
            Stage::Collect(settings) => json!([
                without(settings, &["model", "prompts", "output", "data", "device", "batch_size"])?,
                cllm_core::checkpoint::fingerprint(Path::new(&settings.model))?,
                fingerprint::hash_contents(&settings.prompts)?
            ]),
            Stage::Augment(settings) => {
                json!([without(settings, &["input", "output"])?, trajectory::fingerprint(&settings.input)?])
            }
            Stage::Clean(settings) => {
                let prompts = settings.evaluation_prompts.iter().map(|path| fingerprint::hash_contents(path));
                json!([
                    without(settings, &["input", "output", "model", "data", "evaluation_prompts"])?,
                    trajectory::fingerprint(&settings.input)?,
                    prompts.collect::<Result<Vec<_>>>()?
                ])
            }
            Stage::Train(settings) => {
                let folder = Path::new(settings.model.as_deref().unwrap_or_default());
                json!(Origin::of(settings, &Tokenizer::load(folder)?, folder)?)
            }
        };
        Ok(fingerprint::hash_bytes(inputs.to_string().as_bytes()))
    }

    /// Fingerprint of what it left, if that is whole.
    fn output(&self) -> Result<Option<String>> {
        let folder = self.folder();
        match self {
            Stage::Train(_) if folder.join("summary.json").exists() => {
                cllm_core::checkpoint::fingerprint(&student(folder)).map(Some)
            }
            Stage::Train(_) => Ok(None),
            _ if Reader::open(folder).is_ok_and(|reader| reader.is_complete()) => {
                trajectory::fingerprint(folder).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Does it, or what is left of it; what it tells of itself. With `whole`, a stage that was killed had nothing left to do but
    /// to be noted.
    fn run(&self, whole: bool) -> Result<Value> {
        match self {
            Stage::Collect(settings) => {
                let summary = collect::collect(settings)?;
                Ok(json!(summary.total))
            }
            Stage::Augment(settings) => {
                if !whole {
                    augment::augment(settings)?;
                }
                Ok(Value::Null)
            }
            Stage::Clean(settings) => {
                if !whole {
                    clean::clean(settings)?;
                }
                read_json(&settings.output.join("clean-report.json"))
            }
            Stage::Train(settings) => {
                trainer::run((*settings).clone())?;
                read_json(&settings.output.as_path().join("summary.json"))
            }
        }
    }
}

/// Settings without some keys.
fn without(settings: &impl Serialize, keys: &[&str]) -> Result<Value> {
    let mut value = serde_json::to_value(settings).map_err(|error| Error::usage(format!("settings: {error}")))?;
    if let Some(fields) = value.as_object_mut() {
        fields.retain(|key, _| !keys.contains(&key.as_str()));
    }
    Ok(value)
}

fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_str(&text_file::read(path)?).map_err(|error| Error::file(path, format!("is no JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_checkpoint_goes_on_where_there_is_one() {
        let run = tempfile::tempdir().unwrap();
        assert_eq!(student(run.path()), run.path().join("final"));
        std::fs::create_dir_all(run.path().join("checkpoints/best")).unwrap();
        assert_eq!(student(run.path()), run.path().join("checkpoints/best"));
    }
}
