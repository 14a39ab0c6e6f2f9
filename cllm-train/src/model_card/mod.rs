//! The model card of what a run trained, README.md in the folder `final`: what the Hugging Face Hub
//! reads, how to decode with it, and how it was trained. `cllm-eval report` writes one with results.

use std::path::Path;

use cllm_core::checkpoint::hub;
use cllm_core::{Error, Result, settings};
use serde_json::Value;

use crate::settings::{Objective, Settings};

/// What a folder holds, which decides how to decode with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A model that decodes one token at a time, such as a teacher.
    Plain,
    /// A model that decodes several tokens per forward.
    Student,
    /// A model that drafts for its teacher.
    DraftModel,
    /// Adapters that act on draft tokens alone.
    DraftAdapters,
}

/// The model that training began with.
#[derive(Debug)]
struct Base {
    /// As the settings name it.
    given: String,
    /// What people call it.
    name: String,
    /// The id on the Hub of the model that the chain of fine-tunings began with.
    root: Option<String>,
    license: Option<String>,
}

/// Everything that the card of a run says.
#[derive(Debug)]
pub struct ModelCard {
    kind: Kind,
    /// `None` for a model with random weights, and where nothing is known of the run.
    base: Option<Base>,
    /// The settings that differ from the defaults, as YAML.
    settings: Option<String>,
}

impl ModelCard {
    /// The card of the model that a run trains. `folder` has its initial model.
    ///
    /// # Errors
    /// [`Error::Internal`] for settings that cannot be written.
    pub fn of_run(settings: &Settings, folder: &Path) -> Result<Self> {
        let base = settings.model.as_ref().map(|given| Base {
            given: given.clone(),
            name: hub::name(folder),
            root: hub::base_model(folder),
            license: hub::license(folder),
        });
        Ok(ModelCard { kind: Kind::of(settings), base, settings: Some(changed_settings(settings)?) })
    }

    /// The card of a student of which nothing else is known.
    pub fn of_student() -> Self {
        ModelCard { kind: Kind::Student, base: None, settings: None }
    }

    /// Whether `transformers` decodes with the model, several tokens per forward.
    pub fn has_custom_generate(&self) -> bool {
        self.kind == Kind::Student
    }

    /// Writes the card into the folder of the model.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join("README.md");
        std::fs::write(&path, self.text()).map_err(Error::write(path))
    }

    fn text(&self) -> String {
        let teacher = self.base.as_ref().map_or("TEACHER", |base| base.given.as_str());
        let (title, what, how) = match self.kind {
            Kind::Plain => ("A fine-tuned model", include_str!("plain.md"), include_str!("plain-decoding.md")),
            Kind::Student => ("A consistency LLM", include_str!("student.md"), include_str!("student-decoding.md")),
            Kind::DraftModel => ("A draft model", include_str!("draft-model.md"), include_str!("draft-decoding.md")),
            Kind::DraftAdapters => {
                ("Adapters for draft tokens", include_str!("draft-adapters.md"), include_str!("adapter-decoding.md"))
            }
        };
        let title = self
            .base
            .as_ref()
            .map_or(title.to_owned(), |base| format!("{title}, from {}", base.root.as_ref().unwrap_or(&base.name)));
        let fill = |text: &str| text.replace("{teacher}", teacher);
        let (front_matter, what, how) = (self.front_matter(), fill(what), fill(how));
        let training = self.settings.as_ref().map_or_else(String::new, |settings| {
            let lines: String = settings.lines().map(|line| format!("    {line}\n")).collect();
            format!(
                "\n## How it was trained\n\nBy `cllm-train run` of the CLLM toolkit {} with these settings, and defaults for the \
                 rest:\n\n{lines}",
                cllm_core::VERSION
            )
        });
        format!(
            "---\n{front_matter}---\n\n# {title}\n\n{what}\n## How to decode with it\n\n`MODEL` is this folder. {how}{training}\n## Results\n\n`cllm-eval \
             run` measures accuracy and speed beside the teacher's, and `cllm-eval report` writes them into\na card of its \
             own, `model-card.md`, to use in place of this one.\n"
        )
    }

    fn front_matter(&self) -> String {
        let field = |key: &str, text: &str| format!("{key}: {}\n", settings::written(&text.into()));
        let library = if self.kind == Kind::DraftAdapters { None } else { Some("transformers") };
        let base = self.base.as_ref();
        let lines = [
            library.map(|name| format!("library_name: {name}\n")),
            Some("pipeline_tag: text-generation\n".to_owned()),
            base.and_then(|base| base.root.as_deref()).map(|id| field("base_model", id)),
            base.and_then(|base| base.license.as_deref()).map(|name| field("license", name)),
        ];
        let tags: &[&str] = match self.kind {
            Kind::Plain => &[hub::CARD_TAG],
            Kind::Student => &["consistency-llm", "jacobi-decoding", hub::CARD_TAG, "custom_generate"],
            Kind::DraftModel => &["consistency-llm", "speculative-decoding", hub::CARD_TAG],
            Kind::DraftAdapters => &["consistency-llm", "jacobi-decoding", hub::CARD_TAG, "lora"],
        };
        let tags: String = tags.iter().map(|tag| format!("- {tag}\n")).collect();
        lines.into_iter().flatten().collect::<String>() + "tags:\n" + &tags
    }
}

impl Kind {
    fn of(settings: &Settings) -> Self {
        match settings.objective {
            Objective::Sft => Kind::Plain,
            Objective::Consistency if settings.adapts_drafts() => Kind::DraftAdapters,
            // Its own answers are nobody's concern.
            Objective::Consistency if settings.consistency.has_frozen_targets() => Kind::DraftModel,
            Objective::Consistency => Kind::Student,
        }
    }
}

/// The settings of the first level that differ from their defaults.
fn changed_settings(of_run: &Settings) -> Result<String> {
    let values = |settings: &Settings| serde_json::to_value(settings).map_err(Error::serialization);
    let (mut changed, defaults) = (values(of_run)?, values(&Settings::default())?);
    if let Value::Object(changed) = &mut changed {
        changed.retain(|key, value| key != "output" && defaults[key.as_str()] != *value);
    }
    settings::to_yaml(&changed)
}

#[cfg(test)]
mod tests {
    use cllm_core::model::{AdaptedTokens, LoraConfig};

    use super::*;

    #[test]
    fn every_kind_of_model_has_a_card_that_says_how_to_decode_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("models--org--base/snapshots/abc");
        std::fs::create_dir_all(&base).unwrap();
        std::fs::write(base.join("README.md"), "---\nlanguage: en\nlicense: apache-2.0\n---\n# Base\n").unwrap();
        let card = |change: &dyn Fn(&mut Settings)| {
            let mut settings = Settings { model: Some("org/base".to_owned()), ..Settings::default() };
            change(&mut settings);
            ModelCard::of_run(&settings, &base).unwrap().text()
        };
        let draft = |settings: &mut Settings| {
            settings.consistency.ar_weight = 0.0;
            settings.consistency.anchor_weight = 0.0;
        };
        let adapters = |settings: &mut Settings| {
            draft(settings);
            settings.lora = Some(LoraConfig { on: AdaptedTokens::Drafts, ..LoraConfig::default() });
        };
        let cases: [(&str, String, &[&str]); 4] = [
            (
                "plain",
                card(&|settings| settings.objective = Objective::Sft),
                &["library_name: transformers", "objective: sft"],
            ),
            ("student", card(&|_| ()), &["library_name: transformers", "custom_generate=\"MODEL\""]),
            ("draft model", card(&draft), &["{drafted: {n: 16}}", "teacher=org/base student=MODEL"]),
            ("adapters", card(&adapters), &["strategies=[ar, {gated: {n: 16}}]", ": drafts\n", "Do not merge"]),
        ];
        for (kind, card, parts) in &cases {
            let common =
                ["base_model: org/base\n", "license: apache-2.0\n", "\n## How to decode with it\n", "model: org/base"];
            for part in common.iter().chain(*parts) {
                assert!(card.contains(part), "{kind} lacks `{part}`: {card}");
            }
            assert!(!card.contains("{teacher}"), "{card}");
        }
        // Nothing in PEFT or transformers may load these.
        assert!(!cases[3].1.contains("library_name"), "{}", cases[3].1);
        // Of a chain of fine-tunings, the card names the model at its beginning.
        let teacher = dir.path().join("sums/teacher/final");
        let (cards, settings) =
            (["student", "round"], Settings { model: Some("given".to_owned()), ..Settings::default() });
        let mut folder = base;
        for name in cards {
            let tuned = teacher.join(name);
            std::fs::create_dir_all(&tuned).unwrap();
            ModelCard::of_run(&settings, &folder).unwrap().write(&tuned).unwrap();
            folder = tuned;
        }
        let last = std::fs::read_to_string(folder.join("README.md")).unwrap();
        for part in ["base_model: org/base\n", "license: apache-2.0\n", "# A consistency LLM, from org/base\n"] {
            assert!(last.contains(part), "{last}");
        }
        // A teacher from elsewhere is not the model that its own card names.
        let card = "---\nlicense: \"1.0\"\nbase_model: org/base\ntags:\n- chat\n---\n";
        std::fs::write(teacher.join("README.md"), card).unwrap();
        let local = ModelCard::of_run(&settings, &teacher).unwrap().text();
        assert!(local.contains("license: \"1.0\"\n") && local.contains("# A consistency LLM, from sums\n"), "{local}");
        assert!(!local.contains("base_model"), "{local}");
        let unknown = ModelCard::of_student().text();
        assert!(!unknown.contains("base_model") && unknown.contains("custom_generate=\"MODEL\""), "{unknown}");
    }
}
