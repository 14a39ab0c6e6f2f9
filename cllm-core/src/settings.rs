//! Typed configuration: default < YAML file < environment < `section.key=value`.
//!
//! A settings struct derives `Serialize`, `Deserialize` (with `#[serde(default, deny_unknown_fields)]`), `Default`,
//! `garde::Validate` and, for its reference, `schemars::JsonSchema`. The file is parsed straight into the struct, so that errors show its line; the other layers are
//! laid over the resulting value.

use std::collections::BTreeMap;
use std::path::Path;

use garde::Validate;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Error, Result, progress, text_file};

mod layers;
mod reference;

pub use layers::ENVIRONMENT_PREFIX;
use layers::{Refused, from_environment, set};
pub use reference::reference;

/// Loads settings from an optional file, the environment and `overrides`.
///
/// # Errors
/// [`Error::Usage`] naming file and line, variable or override, with the nearest key where one is unknown.
pub fn load<T>(file: Option<&Path>, overrides: &[String]) -> Result<T>
where
    T: Serialize + DeserializeOwned + Default + Validate<Context = ()>,
{
    let text = file.map(text_file::read).transpose()?;
    let base: T = match (file, &text) {
        (Some(path), Some(text)) => parse(text, &path.display().to_string())?,
        _ => T::default(),
    };
    let mut value = to_value(&base)?;
    if let (Some(path), Some(text)) = (file, &text) {
        finite::<T>(&value, path, text)?;
    }
    let mut layers = Vec::new();
    for (origin, assignment) in from_environment(std::env::vars_os())? {
        match set::<T>(&mut value, &assignment) {
            // The programs share their prefix, and verbs have settings of their own: what is meant for one is no fault of
            // another. A slip of the hand is seen all the same.
            Err(Refused::Unknown(message)) => {
                progress::log(format!("{origin} is passed over: {message}"));
                continue;
            }
            other => other.map_err(|refused| refused.into_error(&origin))?,
        }
        layers.push((origin, assignment));
    }
    for assignment in overrides {
        let origin = format!("override `{assignment}`");
        set::<T>(&mut value, assignment).map_err(|refused| refused.into_error(&origin))?;
        layers.push((origin, assignment.clone()));
    }
    let settings: T = serde_path_to_error::deserialize(&value)
        .map_err(|error| Error::usage(format!("{}: {}", error.path(), error.inner())))?;
    settings.validate().map_err(|report| {
        let in_file = file.zip(text.as_deref()).map(|(path, text)| (path, lines_of_invalid::<T>(text)));
        let lines = report.iter().map(|(path, error)| {
            let origin = origin(&path.to_string(), &layers, in_file.as_ref());
            origin + &out_of_range(&value, &path.to_string(), &error.to_string())
        });
        Error::usage(lines.collect::<Vec<_>>().join("\n"))
    })?;
    Ok(settings)
}

/// Settings in which what `over` names, section by section, is as it says, and all else as in `base`.
///
/// # Errors
/// [`Error::Usage`] naming the key, with the nearest where it is unknown. Ranges are left to the caller.
pub fn merge<T: Serialize + DeserializeOwned>(base: &T, over: &Map<String, Value>) -> Result<T> {
    let mut value = to_value(base)?;
    let keys = all_keys(&value);
    lay(&mut value, over, "", &keys)?;
    serde_path_to_error::deserialize(&value)
        .map_err(|error| Error::usage(format!("{}: {}", error.path(), error.inner())))
}

fn lay(base: &mut Value, over: &Map<String, Value>, prefix: &str, keys: &[String]) -> Result<()> {
    for (key, value) in over {
        let path = format!("{prefix}{key}");
        match (base.get_mut(key), value) {
            (None, _) => {
                let hint = nearest(&path, keys).map(|key| format!("; did you mean `{key}`?")).unwrap_or_default();
                return Err(Error::usage(format!("unknown key `{path}`{hint}")));
            }
            (Some(section @ Value::Object(_)), Value::Object(inner)) => lay(section, inner, &format!("{path}."), keys)?,
            (Some(place), value) => *place = value.clone(),
        }
    }
    Ok(())
}

/// A rule of paths that must be given.
///
/// # Errors
/// For an empty path.
pub fn required_path(path: &Path, _: &()) -> garde::Result {
    if path.as_os_str().is_empty() { Err(garde::Error::new("is not set")) } else { Ok(()) }
}

/// The settings as YAML, to be saved with a run.
///
/// # Errors
/// When they cannot be written as YAML.
pub fn to_yaml(settings: &impl Serialize) -> Result<String> {
    serde_saphyr::to_string(settings).map_err(|error| Error::usage(format!("settings as YAML: {error}")))
}

fn parse<T: Serialize + DeserializeOwned + Default>(text: &str, name: &str) -> Result<T> {
    serde_saphyr::from_str(text).map_err(|error| {
        let message = error.to_string();
        let hint = unknown_field(&message)
            .and_then(|key| nearest(&key, &all_keys(&to_value(&T::default()).ok()?)))
            .map(|key| format!("\ndid you mean `{key}`?"))
            .unwrap_or_default();
        Error::usage(format!("{name}: {message}{hint}"))
    })
}

fn unknown_field(message: &str) -> Option<String> {
    let rest = message.split_once("unknown field `")?.1;
    Some(rest.split_once('`')?.0.to_owned())
}

fn to_value(settings: &impl Serialize) -> Result<Value> {
    serde_json::to_value(settings).map_err(|error| Error::usage(format!("settings: {error}")))
}

/// Refuses numbers of a file that are not finite: no rule of a range does, and JSON has none.
fn finite<T: DeserializeOwned>(value: &Value, file: &Path, text: &str) -> Result<()> {
    let Err(error) = serde_path_to_error::deserialize::<_, T>(value) else { return Ok(()) };
    let path = error.path().to_string();
    let key = format!("{}:", path.rsplit('.').next().unwrap_or_default());
    let infinite = |line: &str| {
        let (_, rest) = line.split_once(&key)?;
        let number = rest.trim_start().split([',', '}', ' ', '#']).next()?.parse::<f64>();
        Some(!number.is_ok_and(f64::is_finite))
    };
    let line = text
        .lines()
        .position(|line| infinite(line) == Some(true))
        .map(|index| format!(", line {}", index + 1))
        .unwrap_or_default();
    Err(Error::usage(format!("{}{line}: {path}: expected a finite number", file.display())))
}

fn check<T: DeserializeOwned>(value: &Value) -> std::result::Result<(), String> {
    serde_path_to_error::deserialize::<_, T>(value)
        .map(drop)
        .map_err(|error| format!("{}: {}", error.path(), error.inner()))
}

/// Every key with its full path.
fn all_keys(value: &Value) -> Vec<String> {
    let mut keys = Vec::new();
    if let Value::Object(object) = value {
        for (key, inner) in object {
            keys.push(key.clone());
            keys.extend(all_keys(inner).into_iter().map(|rest| format!("{key}.{rest}")));
        }
    }
    keys
}

/// The key most like `wanted`, by its full path or by its last part.
fn nearest(wanted: &str, keys: &[String]) -> Option<String> {
    let likeness = |key: &String| {
        let last = key.rsplit('.').next().unwrap_or(key);
        let full = strsim::jaro_winkler(wanted, key);
        if wanted.contains('.') { full } else { full.max(strsim::jaro_winkler(wanted, last)) }
    };
    let best = keys.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(best) > 0.75).then(|| best.clone())
}

/// A value that is not allowed, or not there: `optimizer.lr=3: greater than 1`.
fn out_of_range(settings: &Value, path: &str, error: &str) -> String {
    let value = path.split('.').fold(settings, |value, key| &value[key]);
    if value.as_str() == Some("") || value.as_array().is_some_and(Vec::is_empty) {
        return format!("{path} is not set: add `{path}=...` to the command, or `{path}:` to the settings file");
    }
    format!("{path}={value}: {error}")
}

/// Where the value of `path` was given, as the beginning of a message.
fn origin(path: &str, layers: &[(String, String)], file: Option<&(&Path, BTreeMap<String, String>)>) -> String {
    let sets = |assignment: &str| assignment.split_once('=').is_some_and(|(key, _)| path.starts_with(key));
    if let Some((origin, _)) = layers.iter().rfind(|(_, assignment)| sets(assignment)) {
        return format!("{origin}: ");
    }
    let line = |(file, lines): &(&Path, BTreeMap<String, String>)| {
        lines.get(path).map(|line| format!("{}, line {line}: ", file.display()))
    };
    file.and_then(line).unwrap_or_default()
}

/// The line in the file of each value that is not allowed. The parser alone knows it, and tells it in words:
/// `validation error at optimizer.lr: greater than 1 at line 2, column 7`.
fn lines_of_invalid<T: DeserializeOwned + Validate<Context = ()>>(text: &str) -> BTreeMap<String, String> {
    let options = serde_saphyr::options! { with_snippet: false };
    let Err(error) = serde_saphyr::from_str_with_options_valid::<T>(text, options) else { return BTreeMap::new() };
    let message = error.to_string();
    let issue = |line: &str| {
        let (path, rest) = line.strip_prefix("validation error at ")?.split_once(": ")?;
        let (line, _) = rest.rsplit_once(" at line ")?.1.split_once(',')?;
        Some((path.to_owned(), line.to_owned()))
    };
    message.lines().filter_map(issue).collect()
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
            Top { optimizer: Optimizer::default(), output: None, name: "run".to_owned(), init: None }
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
        assert!(message.contains("run.yaml") && message.contains('2'), "{message}");
        assert!(message.contains("did you mean `optimizer.lr`"), "{message}");
    }

    #[test]
    fn a_misspelt_override_names_the_nearest_key() {
        let message = with_file("", &["optimiser.lr=1"]).unwrap_err().to_string();
        assert!(message.contains("did you mean `optimizer.lr`"), "{message}");
    }

    #[test]
    fn wrong_types_and_ranges_are_refused() {
        let wrong = with_file("", &["optimizer.lr=fast"]).unwrap_err().to_string();
        assert!(wrong.contains("optimizer.lr"), "{wrong}");
        let range = with_file("output: x\noptimizer:\n  lr: 3\n", &[]).unwrap_err().to_string();
        assert!(range.ends_with("run.yaml, line 3: optimizer.lr=3.0: greater than 1"), "{range}");
        let range = with_file("optimizer:\n  lr: 3\n", &["optimizer.lr=-1"]).unwrap_err().to_string();
        assert_eq!(range, "override `optimizer.lr=-1`: optimizer.lr=-1: lower than 0");
    }

    #[test]
    fn a_part_of_the_settings_is_laid_over_the_rest() {
        let base = Top { output: Some("x".into()), ..Top::default() };
        let over = |text: &str| merge(&base, serde_json::from_str::<Value>(text).unwrap().as_object().unwrap());
        let top = over(r#"{"optimizer": {"lr": 0.5}, "init": {"layers": 2}}"#).unwrap();
        assert_eq!((top.optimizer.lr, top.output.as_deref()), (0.5, Some("x")));
        assert_eq!(top.init, Some(Init { tokenizer: String::new(), layers: 2 }));
        assert_eq!(over(r#"{"output": null}"#).unwrap(), Top { output: None, ..Top::default() });
        for (text, part) in [
            (r#"{"optimizer": {"lrr": 0.5}}"#, "unknown key `optimizer.lrr`; did you mean `optimizer.lr`?"),
            (r#"{"init": {"layer": 2}}"#, "init.layer: unknown field"),
            (r#"{"optimizer": {"lr": "fast"}}"#, "optimizer.lr: invalid type"),
        ] {
            let message = over(text).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn text_is_taken_as_it_is() {
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
    fn numbers_that_are_not_finite_are_told_by_their_line() {
        for number in [".nan", ".inf", "-.inf"] {
            let message = with_file(&format!("output: x\noptimizer: {{lr: {number}}}\n"), &[]).unwrap_err().to_string();
            assert!(
                message.contains("run.yaml, line 2: optimizer.lr: expected a finite number"),
                "{number}: {message}"
            );
        }
        let message = with_file("", &["optimizer.lr=.nan"]).unwrap_err().to_string();
        assert!(message.contains("override `optimizer.lr=.nan`") && message.contains("optimizer.lr"), "{message}");
    }

    #[test]
    fn what_must_be_given_is_asked_for() {
        let missing = with_file("", &["name=''"]).unwrap_err().to_string();
        assert!(missing.contains("name is not set: add `name=...`"), "{missing}");
    }
}
