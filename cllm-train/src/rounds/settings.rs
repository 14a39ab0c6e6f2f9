//! Settings of the rounds: sections that all rounds share, and what each round changes.

use std::path::{Path, PathBuf};

use cllm_core::chat_template::Date;
use cllm_core::settings::{merge, required_path};
use cllm_core::{Error, Result};
use cllm_data::{augment, clean, collect};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::rounds::stage::Stage;
use crate::settings::{Objective, Settings};

/// On-policy rounds. Each collects from the student of the round before it.
#[derive(Debug, Clone, Default, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RoundsSettings {
    /// The model of the first round: a folder, or an id in the Hugging Face cache.
    #[garde(length(min = 1))]
    pub model: String,
    /// Folder of the rounds.
    #[garde(custom(required_path))]
    pub output: PathBuf,
    /// Settings of `cllm-data collect`; `rounds` sets model and output.
    #[garde(skip)]
    #[schemars(extend("elsewhere" = true))]
    pub collect: collect::Settings,
    /// Settings of `cllm-data augment`; `rounds` sets input and output. `null` augments nothing.
    #[garde(skip)]
    #[schemars(extend("elsewhere" = true))]
    pub augment: Option<augment::Settings>,
    /// Settings of `cllm-data clean`; `rounds` sets model, input and output. `null` cleans nothing.
    #[garde(skip)]
    #[schemars(extend("elsewhere" = true))]
    pub clean: Option<clean::Settings>,
    /// Settings of `cllm-train run`; `rounds` sets model, datasets and output. Unless
    /// `consistency.anchor` names another model, the anchor of every round is the model of the
    /// first round.
    #[garde(skip)]
    #[schemars(extend("elsewhere" = true))]
    pub train: Settings,
    /// What each round changes in the sections above, such as `{collect: {n: 32}}`; `{}` changes
    /// nothing. Each item is a round.
    #[garde(length(min = 1))]
    pub rounds: Vec<Map<String, Value>>,
}

/// The settings of one round.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RoundSettings {
    pub collect: collect::Settings,
    pub augment: Option<augment::Settings>,
    pub clean: Option<clean::Settings>,
    pub train: Settings,
}

impl RoundsSettings {
    /// Checks every round, before any starts.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the round and the key.
    pub fn check(&self) -> Result<()> {
        let last = self.rounds.len().saturating_sub(1);
        (0..self.rounds.len()).try_for_each(|index| {
            let round = self.round(index, Path::new("model"))?;
            if index < last && round.train.adapts_drafts() {
                return Err(Error::usage(format!(
                    "round {}: train.lora.on=drafts is for the last round: such adapters change no answer, so the next \
                     round would collect what this one did",
                    index + 1
                )));
            }
            Ok(())
        })
    }

    /// The settings of round `index` (from 0), which starts from the model in the folder `model`.
    ///
    /// # Errors
    /// [`Error::Usage`] naming the round and the key.
    pub fn round(&self, index: usize, model: &Path) -> Result<RoundSettings> {
        let in_round = |error: Error| Error::usage(format!("round {}: {error}", index + 1));
        let RoundsSettings { collect, augment, clean, train, .. } = self.clone();
        let shared = RoundSettings { collect, augment, clean, train };
        let mut round = merge(&shared, &self.rounds[index]).map_err(in_round)?;
        round.refuse_what_rounds_set().map_err(in_round)?;
        round.set_paths(&self.output.join(format!("round-{:02}", index + 1)), model);
        // If a later round were anchored to the student before it, the students would drift from
        // the teacher step by step.
        if round.train.is_anchored() {
            round.train.consistency.anchor.get_or_insert_with(|| self.model.clone());
        }
        round.check().map_err(in_round)?;
        Ok(round)
    }
}

impl RoundSettings {
    pub fn stages(&self) -> Vec<Stage<'_>> {
        let stages = [
            Some(Stage::Collect(&self.collect)),
            self.augment.as_ref().map(Stage::Augment),
            self.clean.as_ref().map(Stage::Clean),
            Some(Stage::Train(&self.train)),
        ];
        stages.into_iter().flatten().collect()
    }

    /// Sets the date of every stage that names none, so that they all render prompts alike. `clean`
    /// takes that of its input.
    pub fn set_date(&mut self, date: Date) {
        let collected_on = *self.collect.rendering.date.get_or_insert(date);
        self.train.rendering.date.get_or_insert(collected_on);
    }

    fn refuse_what_rounds_set(&self) -> Result<()> {
        let RoundSettings { collect, augment, clean, train } = self;
        let is_set = |path: &PathBuf| !path.as_os_str().is_empty();
        let set_by_rounds = [
            ("collect.model", !collect.model.is_empty()),
            ("collect.output", is_set(&collect.output)),
            ("augment.input", augment.as_ref().is_some_and(|augment| is_set(&augment.input))),
            ("augment.output", augment.as_ref().is_some_and(|augment| is_set(&augment.output))),
            ("clean.model", clean.as_ref().is_some_and(|clean| !clean.model.is_empty())),
            ("clean.input", clean.as_ref().is_some_and(|clean| is_set(&clean.input))),
            ("clean.output", clean.as_ref().is_some_and(|clean| is_set(&clean.output))),
            ("train.model", train.model.is_some()),
            ("train.init", train.init.is_some()),
            ("train.datasets", !train.datasets.is_empty()),
            ("train.output", is_set(&train.output)),
        ];
        match set_by_rounds.into_iter().find(|(_, is_set)| *is_set) {
            Some((key, _)) => Err(Error::usage(format!("{key} is set by rounds: leave it out"))),
            None if train.objective == Objective::Sft => {
                Err(Error::usage("train.objective must be consistency: rounds train on the trajectories they collect"))
            }
            None => Ok(()),
        }
    }

    /// Sets the folders that each stage reads and writes.
    fn set_paths(&mut self, folder: &Path, model: &Path) {
        let model = model.display().to_string();
        self.collect.model = model.clone();
        self.collect.output = folder.join("trajectories");
        let mut data_set = self.collect.output.clone();
        if let Some(augment) = &mut self.augment {
            (augment.input, augment.output) = (data_set, folder.join("augmented"));
            data_set = augment.output.clone();
        }
        if let Some(clean) = &mut self.clean {
            (clean.model, clean.input, clean.output) = (model.clone(), data_set, folder.join("clean"));
            data_set = clean.output.clone();
        }
        self.train.model = Some(model);
        self.train.datasets = vec![data_set];
        self.train.output = folder.join("student");
    }

    fn check(&self) -> Result<()> {
        fn in_section(section: &'static str) -> impl FnOnce(garde::Report) -> Error {
            move |report| {
                let lines = report.iter().map(|(path, error)| format!("{section}.{path}: {error}"));
                Error::usage(lines.collect::<Vec<_>>().join("\n"))
            }
        }
        self.collect.validate().map_err(in_section("collect"))?;
        self.augment.as_ref().map_or(Ok(()), Validate::validate).map_err(in_section("augment"))?;
        self.clean.as_ref().map_or(Ok(()), Validate::validate).map_err(in_section("clean"))?;
        self.train.validate().map_err(in_section("train"))?;
        self.train.check().map_err(|error| Error::usage(format!("train: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn settings(rounds: Value) -> RoundsSettings {
        let settings = json!({
            "model": "m", "output": "out", "collect": {"prompts": "p.jsonl", "n": 8},
            "clean": {}, "rounds": rounds,
            "train": {"epochs": 3, "optimizer": {"ema_decay": 0.9}, "consistency": {"ar_weight": 1, "anchor_weight": 0}},
        });
        serde_json::from_value(settings).unwrap()
    }

    #[test]
    fn a_round_has_the_shared_settings_except_those_it_changes() {
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
    fn all_stages_have_one_date() {
        let day = |text: &str| text.parse::<Date>().unwrap();
        let settings = settings(json!([{}, {"collect": {"date": "2020-01-01"}}, {"train": {"date": "2020-01-01"}}]));
        let dates = [0, 1, 2].map(|index| {
            let mut round = settings.round(index, Path::new("m")).unwrap();
            round.set_date(day("2026-11-28"));
            [round.collect.rendering.date, round.train.rendering.date].map(|date| date.unwrap().to_string())
        });
        assert_eq!(dates, [["2026-11-28"; 2], ["2020-01-01"; 2], ["2026-11-28", "2020-01-01"]]);
    }

    #[test]
    fn every_round_is_anchored_to_the_model_of_the_first() {
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
    fn adapters_for_drafts_are_for_the_last_round() {
        let whole = json!({"train": {"consistency": {"ar_weight": 0.0}}});
        let drafts = json!({"train": {"lora": {"on": "drafts"}, "consistency": {"ar_weight": 0.0}}});
        settings(json!([whole, drafts])).check().unwrap();
        let message = settings(json!([drafts, whole])).check().unwrap_err().to_string();
        assert!(message.starts_with("round 1: train.lora.on=drafts is for the last round"), "{message}");
    }

    #[test]
    fn a_bad_round_is_named_by_its_number_and_key() {
        for (round, parts) in [
            (json!({"collect": {"m": 1}}), ["collect.m", "did you mean `collect.n`"]),
            (json!({"train": {"optimizer": {"lr": 7}}}), ["train.optimizer.lr", "greater than 1"]),
            (json!({"train": {"epochs": "many"}}), ["train.epochs", "expected a whole number"]),
            (json!({"train": {"output": "x"}}), ["train.output", "leave it out"]),
            (json!({"train": {"objective": "sft"}}), ["train.objective", "consistency"]),
            (json!({"train": {"validation": {"patience": 2}}}), ["train: validation.patience", "validation.prompts"]),
        ] {
            let message = settings(json!([{}, round])).check().unwrap_err().to_string();
            assert!(message.starts_with("round 2: "), "{message}");
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
    }
}
