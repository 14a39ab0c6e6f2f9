//! Everything that goes into a rendered prompt beside its own row: as settings, as what a run
//! resolves them to, and as the record that is stored with what the run makes.

use std::path::PathBuf;

use garde::Validate;
use jiff::civil::Date;
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::RESERVED_KWARGS;
use crate::{Error, Result, text_file};

/// Settings of every verb that renders prompts. They are flattened into the verb's own.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default)]
pub struct RenderSettings {
    /// Variables of the chat template, such as `{enable_thinking: false}`. The
    /// `chat_template_kwargs` of a prompt's own row win.
    #[garde(skip)]
    #[serde(deserialize_with = "kwargs")]
    pub chat_template_kwargs: Map<String, Value>,
    /// File with a chat template (Jinja) to use instead of the model's own. Base models have none.
    #[garde(skip)]
    #[serde(deserialize_with = "template")]
    pub chat_template: Option<PathBuf>,
    /// The date for chat templates that print it, such as 2026-11-28. Default: today, or the date
    /// on which an interrupted run was started.
    #[garde(skip)]
    #[serde(deserialize_with = "date")]
    #[schemars(with = "Option<String>")]
    pub date: Option<Date>,
}

// Flattened fields lose their key and line on the way to an error, so they name the key themselves.
fn kwargs<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Map<String, Value>, D::Error> {
    let map = Option::deserialize(deserializer);
    Ok(named(map, "chat_template_kwargs: expected a section, such as {enable_thinking: false}")?.unwrap_or_default())
}

fn template<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<PathBuf>, D::Error> {
    named(Option::deserialize(deserializer), "chat_template: expected a file")
}

fn date<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<Date>, D::Error> {
    named(Option::deserialize(deserializer), "date: expected a date, such as 2026-11-28")
}

fn named<T, E: serde::de::Error>(value: std::result::Result<T, E>, message: &str) -> std::result::Result<T, E> {
    value.map_err(|_| E::custom(message))
}

impl RenderSettings {
    /// Reads the template file, and takes `default_date` where no date is set.
    ///
    /// # Errors
    /// A template file that cannot be read.
    pub fn resolve(&self, default_date: Date) -> Result<Rendering> {
        if let Some(name) = RESERVED_KWARGS.into_iter().find(|&name| self.chat_template_kwargs.contains_key(name)) {
            let message = format!("chat_template_kwargs: `{name}` comes from the prompts: leave it out");
            return Err(Error::usage(message));
        }
        Ok(Rendering {
            chat_template_kwargs: self.chat_template_kwargs.clone(),
            chat_template: self.chat_template.as_deref().map(text_file::read).transpose()?,
            chat_template_path: self.chat_template.clone(),
            date: self.date.unwrap_or(default_date),
        })
    }
}

/// The date of the local time zone.
pub fn today() -> Date {
    jiff::ZonedDateTime::now().date()
}

/// Resolved [`RenderSettings`].
#[derive(Debug, Clone)]
pub struct Rendering {
    /// Variables of the template; those of a row win.
    pub chat_template_kwargs: Map<String, Value>,
    /// Source of the template that replaces the model's own.
    pub chat_template: Option<String>,
    /// The file of that template, for messages.
    pub chat_template_path: Option<PathBuf>,
    /// What `strftime_now` prints, at midnight.
    pub date: Date,
}

impl Rendering {
    /// The model's own template without variables.
    pub fn on(date: Date) -> Self {
        Rendering { chat_template_kwargs: Map::new(), chat_template: None, chat_template_path: None, date }
    }
}

/// How prompts were rendered: part of the identity of what was made from them. All fields are
/// empty where nothing was recorded.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct RenderingRecord {
    /// Fingerprint of the chat template; null for a model without one.
    pub chat_template: Option<String>,
    /// Variables of the template that the settings named.
    pub chat_template_kwargs: Map<String, Value>,
    /// The date that templates were given; null if none of them prints it.
    pub date: Option<Date>,
}

impl RenderingRecord {
    /// The setting in which two records differ, if any.
    pub fn difference(&self, other: &RenderingRecord) -> Option<&'static str> {
        let differs = [
            ("chat_template", self.chat_template != other.chat_template),
            ("chat_template_kwargs", self.chat_template_kwargs != other.chat_template_kwargs),
            ("date", self.date != other.date),
        ];
        differs.into_iter().find_map(|(key, differs)| differs.then_some(key))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::settings;

    #[derive(Debug, Default, Serialize, Deserialize, Validate)]
    #[serde(default, deny_unknown_fields)]
    struct Verb {
        #[garde(skip)]
        limit: usize,
        #[garde(dive)]
        #[serde(flatten)]
        rendering: RenderSettings,
    }

    fn load(overrides: &[&str]) -> Result<RenderSettings> {
        let overrides: Vec<String> = overrides.iter().map(|&text| text.to_owned()).collect();
        settings::load::<Verb>(None, &overrides).map(|verb| verb.rendering)
    }

    #[test]
    fn settings_are_given_whole_or_key_by_key() {
        let whole = load(&["chat_template_kwargs={enable_thinking: false, n: 2}", "date=2026-11-28"]).unwrap();
        let single =
            load(&["chat_template_kwargs.enable_thinking=false", "chat_template_kwargs.n=2", "date=2026-11-28"]);
        assert_eq!(whole, single.unwrap());
        assert_eq!(json!(whole.chat_template_kwargs), json!({ "enable_thinking": false, "n": 2 }));
        assert_eq!(whole.date.unwrap().to_string(), "2026-11-28");
        for (given, part) in [
            ("date=tomorrow", "date: expected a date"),
            ("chat_template_kwargs=3", "chat_template_kwargs: expected a section"),
            ("chat_template.x=3", "unknown key `chat_template.x`"),
            ("limits=3", "unknown key `limits`; did you mean `limit`?"),
        ] {
            let message = load(&[given]).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
        let merged = settings::merge(
            &Verb { limit: 1, rendering: whole },
            json!({ "chat_template_kwargs": { "n": 3, "more": true } }).as_object().unwrap(),
        );
        let kwargs = merged.unwrap().rendering.chat_template_kwargs;
        assert_eq!(json!(kwargs), json!({ "enable_thinking": false, "n": 3, "more": true }));
        let reserved = load(&["chat_template_kwargs={messages: []}"]).unwrap();
        assert!(reserved.resolve(today()).unwrap_err().to_string().contains("`messages` comes from the prompts"));
    }
}
