//! Typed configuration: default < YAML file < environment < `section.key=value`.
//!
//! A settings struct derives `Serialize`, `Deserialize` (with `#[serde(default,
//! deny_unknown_fields)]`), `Default`, `garde::Validate` and, for its reference,
//! `schemars::JsonSchema`. The file is parsed straight into the struct, so that an error has its
//! line; the other layers change single keys of the resulting value.

use std::collections::BTreeMap;
use std::path::Path;

use garde::Validate;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Error, Result, progress, text_file};

mod keys;
mod layers;
mod reference;
mod refusal;
mod repair;
mod written;

pub use keys::did_you_mean;
use keys::{all_keys, to_value};
pub use layers::ENVIRONMENT_PREFIX;
use layers::{Assignment, Refused, from_environment, with_free_key};
pub use reference::{reference, template};
use refusal::{lines_of_invalid_keys, parse};
pub use written::{change, written};

/// What garde says about a required setting that is null.
const REQUIRED: &str = "not set";

/// Loads settings from an optional file, the environment and `overrides`.
///
/// # Errors
/// [`Error::Usage`] that names the file and line, the variable or the override, and suggests the
/// nearest key for an unknown one.
pub fn load<T>(file: Option<&Path>, overrides: &[String]) -> Result<T>
where
    T: Serialize + DeserializeOwned + Default + Validate<Context = ()>,
{
    let file = file.map(|path| Ok::<_, Error>((path, text_file::read(path)?))).transpose()?;
    let base: T = match &file {
        Some((path, text)) => parse(path, text)?,
        None => T::default(),
    };
    let mut value = to_value(&base)?;
    let mut layers = Vec::new();
    for assignment in from_environment(std::env::vars_os())? {
        match assignment.apply::<T>(&mut value) {
            // All verbs of all programs read the same environment, so a key that this verb lacks
            // may be meant for another. The log line still exposes a misspelt key.
            Err(Refused::UnknownKey(message)) => {
                progress::log(format!("{} is ignored: {message}", assignment.origin));
                continue;
            }
            other => other.map_err(|refused| refused.into_error(&assignment.origin))?,
        }
        layers.push(assignment);
    }
    for text in overrides {
        let assignment = Assignment::from_override(text);
        assignment.apply::<T>(&mut value).map_err(|refused| refused.into_error(&assignment.origin))?;
        layers.push(assignment);
    }
    expand_home(&mut value, std::env::var("HOME").ok().as_deref());
    let settings: T = from_value(&value)?;
    settings.validate().map_err(|report| {
        let in_file = file.as_ref().map(|(path, text)| (*path, lines_of_invalid_keys::<T>(text)));
        let lines = report
            .iter()
            .map(|(path, error)| invalid(&value, &path.to_string(), &error.to_string(), &layers, in_file.as_ref()));
        Error::usage(lines.collect::<Vec<_>>().join("\n"))
    })?;
    Ok(settings)
}

/// Returns `base` with the values in `changes`, which has the same sections and keys. The caller
/// has to check ranges.
///
/// # Errors
/// [`Error::Usage`] that names the key, and suggests the nearest one if it is unknown.
pub fn merge<T: Serialize + DeserializeOwned>(base: &T, changes: &Map<String, Value>) -> Result<T> {
    let mut value = to_value(base)?;
    let base = value.clone();
    merge_section(&mut value, changes, "", &|path| with_free_key::<T>(&base, path).is_some(), &all_keys(&base))?;
    from_value(&repair::repaired::<T>(&value))
}

fn merge_section(
    base: &mut Value,
    changes: &Map<String, Value>,
    prefix: &str,
    is_free: &dyn Fn(&str) -> bool,
    keys: &[String],
) -> Result<()> {
    for (key, value) in changes {
        let path = format!("{prefix}{key}");
        match (base.get_mut(key), value) {
            (None, _) if is_free(&path) => base[key] = value.clone(),
            (None, _) => return Err(Error::usage(format!("unknown key `{path}`{}", did_you_mean(&path, keys)))),
            (Some(section @ Value::Object(_)), Value::Object(inner)) => {
                merge_section(section, inner, &format!("{path}."), is_free, keys)?;
            }
            (Some(current), value) => *current = value.clone(),
        }
    }
    Ok(())
}

/// A garde rule for paths that have no default.
///
/// # Errors
/// For an empty path.
pub fn required_path(path: &Path, _: &()) -> garde::Result {
    if path.as_os_str().is_empty() { Err(garde::Error::new("is not set")) } else { Ok(()) }
}

/// The settings as YAML, to be saved with a run.
///
/// # Errors
/// [`Error::Internal`] when they cannot be written as YAML.
pub fn to_yaml(settings: &impl Serialize) -> Result<String> {
    serde_saphyr::to_string(settings).map_err(Error::serialization)
}

fn from_value<T: Serialize + DeserializeOwned>(value: &Value) -> Result<T> {
    refusal::check(value).map_err(Error::usage)
}

/// Replaces `~` at the beginning of paths, which a shell leaves alone after `key=`.
fn expand_home(value: &mut Value, home: Option<&str>) {
    match (value, home) {
        (Value::String(text), Some(home)) if text == "~" || text.starts_with("~/") => text.replace_range(..1, home),
        (Value::Array(items), home) => items.iter_mut().for_each(|item| expand_home(item, home)),
        (Value::Object(section), home) => section.values_mut().for_each(|value| expand_home(value, home)),
        _ => {}
    }
}

/// The message for a value that is missing or that the rules forbid.
fn invalid(
    settings: &Value,
    path: &str,
    error: &str,
    layers: &[Assignment],
    in_file: Option<&(&Path, BTreeMap<String, u64>)>,
) -> String {
    let value = path.split('.').fold(settings, |value, key| &value[key]);
    let is_missing = value.is_null() && error == REQUIRED;
    if is_missing || value.as_str() == Some("") || value.as_array().is_some_and(Vec::is_empty) {
        return format!("{path} is not set: add `{path}=...` to the command, or `{path}:` to the settings file");
    }
    let layer = layers.iter().rfind(|layer| path.starts_with(&layer.path));
    let line = in_file.and_then(|(file, lines)| Some((file, lines.get(path)?)));
    match (layer, line) {
        // The origin shows the key and its value already.
        (Some(layer), _) if layer.is_override && layer.path == path => format!("{}: {error}", layer.origin),
        (Some(layer), _) => format!("{}: {path}={value}: {error}", layer.origin),
        (None, Some((file, line))) => format!("{}, line {line}: {path}={value}: {error}", file.display()),
        (None, None) => format!("{path}={value}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Serialize, serde::Deserialize, Validate, PartialEq)]
    #[serde(default, deny_unknown_fields)]
    struct Top {
        #[garde(dive)]
        optimizer: Optimizer,
        #[garde(skip)]
        output: Option<String>,
        #[garde(length(min = 1))]
        name: String,
        #[garde(dive)]
        init: Option<Init>,
        #[garde(required)]
        seed: Option<u64>,
    }

    #[derive(Debug, Default, serde::Serialize, serde::Deserialize, Validate, PartialEq)]
    #[serde(default, deny_unknown_fields)]
    struct Init {
        #[garde(length(min = 1))]
        tokenizer: String,
        #[garde(skip)]
        layers: usize,
    }

    #[derive(Debug, serde::Serialize, serde::Deserialize, Validate, PartialEq)]
    #[serde(default, deny_unknown_fields)]
    struct Optimizer {
        #[garde(range(min = 0.0, max = 1.0))]
        lr: f64,
    }

    impl Default for Top {
        fn default() -> Self {
            Top { optimizer: Optimizer::default(), output: None, name: "run".to_owned(), init: None, seed: Some(0) }
        }
    }

    impl Default for Optimizer {
        fn default() -> Self {
            Optimizer { lr: 0.1 }
        }
    }

    fn with_file(text: &str, overrides: &[&str]) -> Result<Top> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.yaml");
        std::fs::write(&path, text).unwrap();
        let overrides: Vec<_> = overrides.iter().map(|&text| text.to_owned()).collect();
        load(Some(&path), &overrides)
    }

    #[test]
    fn overrides_win_over_the_file() {
        let top = with_file("optimizer:\n  lr: 0.2\n", &["optimizer.lr=0.3", "output=x"]).unwrap();
        assert_eq!(top.optimizer.lr, 0.3);
        assert_eq!(top.output.as_deref(), Some("x"));
    }

    #[test]
    fn a_misspelt_key_in_a_file_shows_its_line_and_the_nearest() {
        let message = with_file("optimizer:\n  lrr: 0.2\n", &[]).unwrap_err().to_string();
        assert!(
            message.ends_with("run.yaml, line 2: unknown key `optimizer.lrr`; did you mean `optimizer.lr`?"),
            "{message}"
        );
    }

    #[test]
    fn a_misspelt_override_names_the_nearest_key() {
        let message = with_file("", &["optimiser.lr=1"]).unwrap_err().to_string();
        assert_eq!(message, "`optimiser.lr=1`: unknown key `optimiser.lr`; did you mean `optimizer.lr`?");
    }

    #[test]
    fn wrong_types_and_ranges_are_refused() {
        let message = with_file("", &["optimizer.lr=fast"]).unwrap_err().to_string();
        assert_eq!(message, "`optimizer.lr=fast`: optimizer.lr: expected a number");
        let range = with_file("output: x\noptimizer:\n  lr: 3\n", &[]).unwrap_err().to_string();
        assert!(range.ends_with("run.yaml, line 3: optimizer.lr=3.0: greater than 1"), "{range}");
        let range = with_file("optimizer:\n  lr: 3\n", &["optimizer.lr=-1"]).unwrap_err().to_string();
        assert_eq!(range, "`optimizer.lr=-1`: lower than 0");
    }

    #[test]
    fn some_keys_can_be_changed_and_the_rest_stays() {
        let base = Top { output: Some("x".into()), ..Top::default() };
        let merged = |text: &str| merge(&base, serde_json::from_str::<Value>(text).unwrap().as_object().unwrap());
        let top = merged(r#"{"optimizer": {"lr": 0.5}, "init": {"layers": 2}}"#).unwrap();
        assert_eq!((top.optimizer.lr, top.output.as_deref()), (0.5, Some("x")));
        assert_eq!(top.init, Some(Init { tokenizer: String::new(), layers: 2 }));
        assert_eq!(merged(r#"{"output": null}"#).unwrap(), Top { output: None, ..Top::default() });
        for (text, part) in [
            (r#"{"optimizer": {"lrr": 0.5}}"#, "unknown key `optimizer.lrr`; did you mean `optimizer.lr`?"),
            (r#"{"init": {"layer": 2}}"#, "unknown key `init.layer`; did you mean `init.layers`?"),
            (r#"{"optimizer": {"lr": "fast"}}"#, "optimizer.lr: expected a number"),
        ] {
            let message = merged(text).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn text_needs_no_quotes() {
        for (given, text) in
            [("y", "y"), ("x # c", "x # c"), ("2024", "2024"), ("a: b # c", "a: b # c"), ("[a", "[a"), ("'2 x'", "2 x")]
        {
            let top = with_file("", &[&format!("name={given}"), &format!("output={given}")]).unwrap();
            assert_eq!((top.name.as_str(), top.output.is_some()), (text, true), "{given}");
        }
        assert_eq!(with_file("output: x", &["output=null"]).unwrap().output, None);
        assert_eq!(with_file("", &["name=null"]).unwrap().name, "null");
    }

    #[test]
    fn a_key_of_a_section_that_is_null_opens_it() {
        for file in ["", "init: null"] {
            let top = with_file(file, &["init.tokenizer=x"]).unwrap();
            assert_eq!(top.init, Some(Init { tokenizer: "x".into(), layers: 0 }));
        }
        let message = with_file("", &["init.tokeniser=x"]).unwrap_err().to_string();
        assert!(message.contains("did you mean `init.tokenizer`"), "{message}");
        let message = with_file("", &["output.x=1"]).unwrap_err().to_string();
        assert!(message.contains("unknown key `output.x`"), "{message}");
        assert!(with_file("", &["init.layers=2"]).unwrap_err().to_string().contains("init.tokenizer is not set"));
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused_with_their_line() {
        for number in [".nan", ".inf", "-.inf"] {
            let message = with_file(&format!("output: x\noptimizer: {{lr: {number}}}\n"), &[]).unwrap_err().to_string();
            assert!(
                message.contains("run.yaml, line 2: optimizer.lr: expected a finite number"),
                "{number}: {message}"
            );
        }
        let message = with_file("", &["optimizer.lr=.nan"]).unwrap_err().to_string();
        assert_eq!(message, "`optimizer.lr=.nan`: expected a finite number");
    }

    #[test]
    fn a_path_in_the_home_folder_may_begin_with_a_tilde() {
        let mut value = serde_json::json!({ "a": "~/x", "b": ["~", "y~/z", "~x"], "c": { "d": "~/" } });
        expand_home(&mut value, Some("/home/me"));
        let expected =
            serde_json::json!({ "a": "/home/me/x", "b": ["/home/me", "y~/z", "~x"], "c": { "d": "/home/me/" } });
        assert_eq!(value, expected);
    }

    #[test]
    fn a_missing_value_is_asked_for() {
        let missing = with_file("", &["name=''"]).unwrap_err().to_string();
        assert!(missing.contains("name is not set: add `name=...`"), "{missing}");
        let missing = with_file("seed: null", &[]).unwrap_err().to_string();
        assert!(missing.starts_with("seed is not set: add `seed=...`"), "{missing}");
    }
}
