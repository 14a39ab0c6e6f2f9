//! Everything that the result of a run depends on. It is saved with the run, which resumes only if
//! nothing has changed; otherwise the error names the change.

use std::collections::BTreeMap;
use std::path::Path;

use cllm_core::chat_template::Date;
use cllm_core::checkpoint::{self, hub};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, fingerprint, settings, trajectory};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::settings::{Objective, Settings};

/// Settings that do not change the result of a run, and so may change between its parts.
const FREE_SETTINGS: [&str; 8] =
    ["log_every", "save_every", "max_checkpoints", "keep_state", "checkpointed_layers", "output", "device", "memory"];

/// Settings and contents that a result depends on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct RunFingerprint {
    /// Settings as JSON, by their full key.
    settings: BTreeMap<String, String>,
    /// Fingerprints of the files that settings only name; a key is for example `the model
    /// runs/teacher/final`.
    contents: BTreeMap<String, String>,
}

/// What two fingerprints do not have in common.
enum Difference {
    /// A key with both values. A section that one of them lacks is named as a whole.
    Setting { key: String, values: [Value; 2] },
    /// The name of some contents.
    Contents(String),
}

impl RunFingerprint {
    /// The fingerprint of a training run with this tokenizer, which is in `model_folder` together
    /// with the model.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn for_training(settings: &Settings, tokenizer: &Tokenizer, model_folder: &Path) -> Result<Self> {
        let mut fingerprint = RunFingerprint::default();
        fingerprint.add_settings(settings, &FREE_SETTINGS)?;
        fingerprint.add_contents("the tokenizer", tokenizer.fingerprint().to_owned());
        if let Some(template) = tokenizer.rendering_record().chat_template {
            fingerprint.add_contents("the chat template", template);
        }
        if let Some(model) = &settings.model {
            fingerprint.add_contents(format!("the model {model}"), checkpoint::fingerprint(model_folder)?);
        }
        if let Some(name) = settings.consistency.anchor.as_ref().filter(|_| settings.is_anchored()) {
            fingerprint.add_contents(format!("the anchor {name}"), checkpoint::fingerprint(&hub::locate(name)?)?);
        }
        for path in &settings.datasets {
            let contents = match settings.objective {
                Objective::Sft => fingerprint::hash_files(&[path])?,
                Objective::Consistency => trajectory::fingerprint(path)?,
            };
            fingerprint.add_contents(format!("the data set {}", path.display()), contents);
        }
        if let Some(path) = &settings.validation.prompts {
            let name = format!("the validation prompts {}", path.display());
            fingerprint.add_contents(name, fingerprint::hash_files(&[path])?);
        }
        if let Some(path) = &settings.validation.trajectories {
            let name = format!("the validation trajectories {}", path.display());
            fingerprint.add_contents(name, trajectory::fingerprint(path)?);
        }
        Ok(fingerprint)
    }

    /// Adds every setting except some keys of the first level.
    ///
    /// # Errors
    /// [`Error::Internal`] for settings that are not JSON.
    pub fn add_settings(&mut self, settings: &impl Serialize, except: &[&str]) -> Result<()> {
        let mut settings = serde_json::to_value(settings).map_err(Error::serialization)?;
        if let Some(fields) = settings.as_object_mut() {
            fields.retain(|key, _| !except.contains(&key.as_str()));
        }
        self.add_section("", &settings);
        Ok(())
    }

    fn add_section(&mut self, key: &str, value: &Value) {
        let Value::Object(section) = value else {
            self.settings.insert(key.to_owned(), value.to_string());
            return;
        };
        for (inner_key, value) in section {
            let full_key = if key.is_empty() { inner_key.clone() } else { format!("{key}.{inner_key}") };
            self.add_section(&full_key, value);
        }
    }

    /// Adds the fingerprint of some contents under a name that reads well in
    /// `from another version of NAME`.
    pub fn add_contents(&mut self, name: impl Into<String>, fingerprint: String) {
        self.contents.insert(name.into(), fingerprint);
    }

    /// The date of a training run.
    pub fn date(&self) -> Option<Date> {
        serde_json::from_str(self.settings.get("date")?).ok()
    }

    /// What has changed from `self` to `now`, if anything: a clause for an error message that
    /// follows the name of a folder and `verb`, such as `was started`.
    pub fn difference(&self, verb: &str, now: &RunFingerprint) -> Option<String> {
        Some(match self.first_difference(now)? {
            Difference::Setting { key, values: [then, now] } => settings::change(verb, &key, &then, &now),
            Difference::Contents(name) => format!("{verb} from another version of {name}"),
        })
    }

    /// How another process of the run differs from the main one, whose fingerprint is `self`, if it
    /// does: an error message.
    pub fn difference_of_process(&self, rank: usize, other: &RunFingerprint) -> Option<String> {
        Some(match self.first_difference(other)? {
            Difference::Setting { key, values } => {
                let [main, other] = values.each_ref().map(settings::written);
                format!(
                    "processes 0 and {rank} have different settings: {key}={main} and {key}={other}; start all with the \
                     same command"
                )
            }
            Difference::Contents(name) => {
                format!("processes 0 and {rank} have different versions of {name}; give all of them the same files")
            }
        })
    }

    /// The first difference, of settings before contents.
    fn first_difference(&self, other: &RunFingerprint) -> Option<Difference> {
        let first = |one: &BTreeMap<String, String>, other: &BTreeMap<String, String>| {
            let keys = one.keys().chain(other.keys());
            keys.into_iter().find(|key| one.get(*key) != other.get(*key)).cloned()
        };
        let Some(key) = first(&self.settings, &other.settings) else {
            return first(&self.contents, &other.contents).map(Difference::Contents);
        };
        let ends = key.match_indices('.').map(|(end, _)| end).chain([key.len()]);
        let has = |key: &str| [self, other].into_iter().any(|fingerprint| fingerprint.settings.contains_key(key));
        let key = ends.map(|end| &key[..end]).find(|key| has(key)).unwrap_or(&key).to_owned();
        let values = [self, other].map(|fingerprint| fingerprint.setting(&key));
        Some(Difference::Setting { key, values })
    }

    /// The value of a setting, or those of a section; null without either.
    fn setting(&self, key: &str) -> Value {
        let parsed = |value: &String| serde_json::from_str(value).unwrap_or(Value::Null);
        let in_section = |(full_key, value): (&String, &String)| {
            let inner_key = full_key.strip_prefix(key)?.strip_prefix('.')?;
            Some((inner_key.to_owned(), parsed(value)))
        };
        let section: Map<String, Value> = self.settings.iter().filter_map(in_section).collect();
        match self.settings.get(key) {
            Some(value) => parsed(value),
            None if section.is_empty() => Value::Null,
            None => Value::Object(section),
        }
    }
}

#[cfg(test)]
mod tests {
    use cllm_core::model::LoraConfig;

    use super::*;

    #[test]
    fn the_first_difference_is_named_settings_before_contents() {
        let fingerprint = |settings: &Settings, data: &str| {
            let mut fingerprint = RunFingerprint::default();
            fingerprint.add_settings(settings, &FREE_SETTINGS).unwrap();
            fingerprint.add_contents("the data set runs/clean", data.to_owned());
            fingerprint
        };
        let mut settings = Settings::plain();
        let then = fingerprint(&settings, "a");
        settings.log_every = 99;
        assert_eq!(then.difference("was started", &fingerprint(&settings, "a")), None);
        let message = then.difference("was started", &fingerprint(&settings, "b")).unwrap();
        assert_eq!(message, "was started from another version of the data set runs/clean");
        settings.optimizer.lr = 0.5;
        let message = then.difference("was started", &fingerprint(&settings, "b")).unwrap();
        assert_eq!(message, "was started with optimizer.lr=0.0001; this command says 0.5");
        let message = then.difference_of_process(3, &fingerprint(&settings, "b")).unwrap();
        assert!(
            message.starts_with("processes 0 and 3 have different settings: optimizer.lr=0.0001 and optimizer.lr=0.5;")
        );
    }

    #[test]
    fn a_section_that_one_command_lacks_is_named_as_a_whole() {
        let fingerprint = |lora: Option<LoraConfig>| {
            let mut fingerprint = RunFingerprint::default();
            fingerprint.add_settings(&Settings { lora, ..Settings::plain() }, &FREE_SETTINGS).unwrap();
            fingerprint
        };
        let (with, without) = (fingerprint(Some(LoraConfig::default())), fingerprint(None));
        let message = with.difference("was started", &without).unwrap();
        assert!(message.starts_with("was started with lora={alpha: "), "{message}");
        assert!(message.ends_with("}; this command says null"), "{message}");
        let message = without.difference("was started", &with).unwrap();
        assert!(message.starts_with("was started with lora=null; this command says {alpha: "), "{message}");
    }
}
