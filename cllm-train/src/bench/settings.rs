//! Settings of `bench`.

use std::path::PathBuf;

use cllm_core::model::{BaseDtype, ModelShape};
use cllm_core::settings::required_path;
use cllm_core::{Error, Result};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::synthetic::SyntheticSettings;
use crate::settings::{Objective, Settings};

/// Settings of `cllm-train bench`.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BenchSettings {
    /// Folder or id of the model to train. Alternatively, set `shape` or `train.init`.
    #[garde(skip)]
    pub model: Option<String>,
    /// Train random weights in the shape of a published model instead of the weights of `model`. If
    /// both are set, the vocabulary is that of `model`.
    #[garde(skip)]
    pub shape: Option<ModelShape>,
    /// Name of the model in the results. Default: its shape, or the last part of its folder.
    #[garde(skip)]
    pub name: Option<String>,
    /// Data sets to train on, as in `run`. Without any, `bench` trains on `synthetic` trajectories.
    #[garde(skip)]
    pub datasets: Vec<PathBuf>,
    /// Trajectories of random tokens, for measurements without data.
    #[garde(dive)]
    pub synthetic: SyntheticSettings,
    /// Number of steps to time, after three warm-up steps.
    #[garde(range(min = 1, max = 1_000_000))]
    pub num_steps: usize,
    /// After the steps, also write the trained model as a run does, beside the results, read it again,
    /// and remove it. Measures time, host memory and disk. Not with `train.lora.base_dtype=int8`.
    #[garde(skip)]
    pub files: bool,
    /// All other settings of the training, as in `run`; `bench` sets model, datasets, output and
    /// device.
    #[garde(skip)]
    #[schemars(extend("elsewhere" = true))]
    pub train: Settings,
    /// Output of scripts/bench-train-transformers, to report beside the results.
    #[garde(skip)]
    pub baseline: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
    /// File for the results. It keeps the results of other models if they were measured on the same
    /// machine.
    #[garde(custom(required_path))]
    pub output: PathBuf,
}

impl Default for BenchSettings {
    fn default() -> Self {
        BenchSettings {
            model: None,
            shape: None,
            name: None,
            datasets: Vec::new(),
            synthetic: SyntheticSettings::default(),
            num_steps: 20,
            files: false,
            train: Settings::default(),
            baseline: None,
            device: "auto".to_owned(),
            output: PathBuf::from("runs/bench-train.json"),
        }
    }
}

impl BenchSettings {
    /// Whether the examples are made up.
    pub(super) fn is_synthetic(&self) -> bool {
        self.datasets.is_empty()
    }

    /// The settings of the training to measure.
    ///
    /// # Errors
    /// [`Error::Usage`] naming a key that is out of range or must not be set.
    pub fn training(&self) -> Result<Settings> {
        let defaults = Settings::default();
        let set_by_bench = [
            ("train.model", self.train.model.is_some()),
            ("train.datasets", !self.train.datasets.is_empty()),
            ("train.output", self.train.output != defaults.output),
            ("train.device", self.train.device != defaults.device),
        ];
        if let Some((key, _)) = set_by_bench.into_iter().find(|(_, is_set)| *is_set) {
            let own_key = key.trim_start_matches("train.");
            return Err(Error::usage(format!("{key} is set by bench: leave it out and set {own_key}")));
        }
        if self.is_synthetic() && self.train.objective == Objective::Sft {
            return Err(Error::usage("train.objective=sft needs datasets: synthetic examples are trajectories"));
        }
        if self.files && self.train.lora.as_ref().is_some_and(|lora| lora.base_dtype == BaseDtype::Int8) {
            return Err(Error::usage(
                "files=true measures weights that are written from the device, and a run with train.lora.base_dtype=int8 \
                 merges its adapters into the files of its base: leave one of the two out",
            ));
        }
        // What stands for a model, a data set or a folder that there is none of is never opened.
        let training = Settings {
            model: self.model.clone().or(self.shape.map(|shape| shape.to_string())),
            datasets: if self.is_synthetic() { vec!["synthetic".into()] } else { self.datasets.clone() },
            output: "unused".into(),
            device: self.device.clone(),
            ..self.train.clone()
        };
        training.validate().map_err(|report| {
            let lines = report.iter().map(|(path, error)| format!("train.{path}: {error}"));
            Error::usage(lines.collect::<Vec<_>>().join("\n"))
        })?;
        training.check().map_err(|error| Error::usage(format!("train: {error}")))?;
        Ok(training)
    }
}
