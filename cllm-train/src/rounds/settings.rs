//! Settings of the rounds: sections that all of them share, and what each does otherwise.

use std::path::{Path, PathBuf};

use cllm_core::settings::{merge, required_path};
use cllm_core::{Error, Result};
use cllm_data::{augment, clean, collect};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::settings::{Objective, Settings as Train};

/// On-policy rounds: each collects from the student of the round before it.
#[derive(Debug, Clone, Default, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The model of the first round: a folder, or an id in the Hugging Face cache.
    #[garde(length(min = 1))]
    pub model: String,
    /// Folder of the rounds.
    #[garde(custom(required_path))]
    pub output: PathBuf,
    /// What `cllm-data collect` takes; the rounds set model and output.
    #[garde(skip)]
    #[schemars(extend("elsewhere" = true))]
    pub collect: collect::Settings,
    /// What `cllm-data augment` takes; the rounds set input and output. Left out, nothing is augmented.
    #[garde(skip)]
    #[schemars(extend("elsewhere" = true))]
    pub augment: Option<augment::Settings>,
    /// What `cllm-data clean` takes; the rounds set model, input and output. Left out, nothing is cleaned.
    #[garde(skip)]
    #[schemars(extend("elsewhere" = true))]
    pub clean: Option<clean::Settings>,
    /// What `cllm-train run` takes; the rounds set model, data and output. Every round's anchor is the model of the first, unless
    /// another is named.
    #[garde(skip)]
    #[schemars(extend("elsewhere" = true))]
    pub train: Train,
    /// The rounds, in order: of each, what it does otherwise than the sections above, such as `{collect: {n: 32}}`; `{}` for
    /// nothing.
    #[garde(length(min = 1))]
    pub rounds: Vec<Map<String, Value>>,
}

/// What one round does, in full.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Round {
    pub collect: collect::Settings,
    pub augment: Option<augment::Settings>,
    pub clean: Option<clean::Settings>,
    pub train: Train,
}

impl Settings {
    /// Rules that no single key tells, for every round, before anything starts.
    ///
    /// # Errors
    /// [`Error::Usage`] naming round and key.
    pub fn check(&self) -> Result<()> {
        (0..self.rounds.len()).try_for_each(|index| self.round(index, Path::new("model")).map(drop))
    }

    /// Folder of a round, counted from 0.
    pub fn folder(&self, index: usize) -> PathBuf {
        self.output.join(format!("round-{:02}", index + 1))
    }

    /// What round `index` (from 0) does, whose model is in the folder `model`.
    ///
    /// # Errors
    /// [`Error::Usage`] naming round and key.
    pub fn round(&self, index: usize, model: &Path) -> Result<Round> {
        let of_round = |error: Error| Error::usage(format!("round {}: {error}", index + 1));
        let Settings { collect, augment, clean, train, .. } = self.clone();
        let mut round = merge(&Round { collect, augment, clean, train }, &self.rounds[index]).map_err(of_round)?;
        round.refuse_what_rounds_set().map_err(of_round)?;
        round.place(&self.folder(index), model);
        // A later round that held on to the student before it would lose the teacher step by step.
        if round.train.is_anchored() {
            round.train.consistency.anchor.get_or_insert_with(|| self.model.clone());
        }
        round.check().map_err(of_round)?;
        Ok(round)
    }
}

impl Round {
    fn refuse_what_rounds_set(&self) -> Result<()> {
        let Round { collect, augment, clean, train } = self;
        let some = |path: &PathBuf| !path.as_os_str().is_empty();
        let set = [
            ("collect.model", !collect.model.is_empty()),
            ("collect.output", some(&collect.output)),
            ("augment.input", augment.as_ref().is_some_and(|augment| some(&augment.input))),
            ("augment.output", augment.as_ref().is_some_and(|augment| some(&augment.output))),
            ("clean.model", clean.as_ref().is_some_and(|clean| !clean.model.is_empty())),
            ("clean.input", clean.as_ref().is_some_and(|clean| some(&clean.input))),
            ("clean.output", clean.as_ref().is_some_and(|clean| some(&clean.output))),
            ("train.model", train.model.is_some()),
            ("train.init", train.init.is_some()),
            ("train.datasets", !train.datasets.is_empty()),
            ("train.output", some(&train.output)),
        ];
        match set.into_iter().find(|(_, set)| *set) {
            Some((key, _)) => Err(Error::usage(format!("{key} is what the rounds set: leave it out"))),
            None if train.objective == Objective::Sft => {
                Err(Error::usage("train.objective is sft: a round learns from the trajectories that it collects"))
            }
            None => Ok(()),
        }
    }

    /// Sets where each stage reads and writes.
    fn place(&mut self, folder: &Path, model: &Path) {
        let model = model.display().to_string();
        let trajectories = folder.join("trajectories");
        (self.collect.model, self.collect.output) = (model.clone(), trajectories.clone());
        let mut data = trajectories;
        if let Some(augment) = &mut self.augment {
            (augment.input, augment.output) = (data, folder.join("augmented"));
            data = augment.output.clone();
        }
        if let Some(clean) = &mut self.clean {
            (clean.model, clean.input, clean.output) = (model.clone(), data, folder.join("clean"));
            data = clean.output.clone();
        }
        (self.train.model, self.train.datasets) = (Some(model), vec![data]);
        self.train.output = folder.join("student");
    }

    fn check(&self) -> Result<()> {
        let in_section = |section: &'static str| {
            move |report: garde::Report| {
                let lines = report.iter().map(|(path, error)| format!("{section}.{path}: {error}"));
                Error::usage(lines.collect::<Vec<_>>().join("\n"))
            }
        };
        self.collect.validate().map_err(in_section("collect"))?;
        self.augment.as_ref().map_or(Ok(()), |augment| augment.validate().map_err(in_section("augment")))?;
        self.clean.as_ref().map_or(Ok(()), |clean| clean.validate().map_err(in_section("clean")))?;
        self.train.validate().map_err(in_section("train"))?;
        self.train.check().map_err(|error| Error::usage(format!("train: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn settings(rounds: Value) -> Settings {
        let text = json!({
            "model": "m", "output": "out", "collect": {"prompts": "p.jsonl", "n": 8},
            "clean": {}, "train": {"epochs": 3, "optimizer": {"ema_decay": 0.9}}, "rounds": rounds,
        });
        serde_json::from_value(text).unwrap()
    }

    #[test]
    fn a_round_has_the_shared_settings_but_for_what_it_names() {
        let settings = settings(json!([
            {}, {"collect": {"n": 16}, "augment": {}, "clean": null, "train": {"optimizer": {"lr": 0.5}}}
        ]));
        settings.check().unwrap();
        let rounds = [0, 1].map(|index| settings.round(index, Path::new("m")).unwrap());
        assert_eq!(rounds.each_ref().map(|round| round.collect.n), [8, 16]);
        assert_eq!(rounds.each_ref().map(|round| round.train.optimizer.ema_decay), [Some(0.9), Some(0.9)]);
        assert!(rounds[1].train.optimizer.lr == 0.5 && rounds[0].train.optimizer.lr < 0.1);
        assert!(rounds[0].augment.is_none() && rounds[0].clean.is_some());
        assert!(rounds[1].augment.is_some() && rounds[1].clean.is_none());
        assert!(rounds.iter().all(|round| round.train.consistency.anchor.is_none()));
        assert_eq!(rounds[0].train.datasets, [Path::new("out/round-01/clean")]);
        assert_eq!(rounds[1].train.datasets, [Path::new("out/round-02/augmented")]);
    }

    #[test]
    fn every_round_holds_on_to_the_model_of_the_first() {
        let weight = |weight: f64| json!({"train": {"consistency": {"anchor_weight": weight}}});
        let other = json!({"train": {"consistency": {"anchor_weight": 1.0, "anchor": "other"}}});
        let settings = settings(json!([weight(1.0), weight(1.0), other, weight(0.0)]));
        let anchor = |index| settings.round(index, Path::new("student")).unwrap().train.consistency.anchor;
        assert_eq!(
            [0, 1, 2, 3].map(anchor),
            [Some("m"), Some("m"), Some("other"), None].map(|name| name.map(str::to_owned))
        );
    }

    #[test]
    fn what_a_round_may_not_say_is_refused_with_its_number_and_key() {
        for (round, parts) in [
            (json!({"collect": {"m": 1}}), ["collect.m", "did you mean `collect.n`"]),
            (json!({"train": {"optimizer": {"lr": 7}}}), ["train.optimizer.lr", "greater than 1"]),
            (json!({"train": {"epochs": "many"}}), ["train.epochs", "expected a whole number"]),
            (json!({"train": {"output": "x"}}), ["train.output", "leave it out"]),
            (json!({"train": {"objective": "sft"}}), ["train.objective", "sft"]),
            (json!({"train": {"validation": {"patience": 2}}}), ["train: validation.patience", "validation.prompts"]),
        ] {
            let message = settings(json!([{}, round])).check().unwrap_err().to_string();
            assert!(message.starts_with("round 2: "), "{message}");
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
    }
}
