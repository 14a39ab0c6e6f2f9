//! Why a value is not accepted, in the words of somebody who writes settings: "expected a number",
//! not "invalid type: string, expected f64". serde-saphyr gives its errors as data, with locations;
//! those of serde_json are prose, so a value that serde_json refuses is written as YAML and read
//! again to learn why.

use std::collections::BTreeMap;
use std::path::Path;

use garde::Validate;
use serde::Serialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::{Map, Value};
use serde_saphyr::path_map::{PathKey, PathKind};
use serde_saphyr::{Error as YamlError, options};

use super::keys::{all_keys, did_you_mean, to_value};
use super::repair::repaired;
use super::written;
use crate::{Error, Result};

/// Reads the settings of a file.
///
/// # Errors
/// [`Error::Usage`] with file, line and key.
pub(super) fn parse<T: Serialize + DeserializeOwned + Default>(file: &Path, text: &str) -> Result<T> {
    let at_line = |error: &YamlError, message: String| {
        let in_map = flattened_key(error).and_then(|key| line_of_key(text, key));
        let line = in_map.or_else(|| error.location().map(|location| location.line()));
        let line = line.map(|line| format!(", line {line}")).unwrap_or_default();
        Error::usage(format!("{}{line}: {message}", file.display()))
    };
    let settings: T = parse_typed(text).or_else(|refusal| parse_repaired(text).ok_or(refusal)).map_err(|refusal| {
        // Broken YAML also fails at some key; the error of its syntax is the more helpful one.
        match serde_saphyr::from_str_with_options::<IgnoredAny>(text, options! { with_snippet: false }) {
            Err(syntax) => at_line(&syntax, explain::<T>(&refusal.path, &syntax, &Value::Null)),
            Ok(_) => {
                let defaults = to_value(&T::default()).unwrap_or_default();
                let misspelt = misspelt_within::<T>(text, &refusal.path);
                let Refusal { path, error } = misspelt.as_deref().unwrap_or(&refusal);
                at_line(&refusal.error, explain::<T>(path, error, &defaults))
            }
        }
    })?;
    // The other layers are applied to JSON, which has no infinite numbers, and the rules for ranges
    // would not refuse them.
    if let Err(error) = serde_path_to_error::deserialize::<_, T>(&to_value(&settings)?) {
        let message = format!("{}: expected a finite number", error.path());
        let untyped = serde_saphyr::from_str_with_options::<Value>(text, options! { with_snippet: false });
        return Err(match untyped {
            Err(infinite @ YamlError::NonFiniteFloat { .. }) => at_line(&infinite, message),
            _ => Error::usage(format!("{}: {message}", file.display())),
        });
    }
    Ok(settings)
}

/// The settings of a file in which values have other forms.
fn parse_repaired<T: DeserializeOwned>(text: &str) -> Option<T> {
    serde_json::from_value(repaired_value::<T>(text)?).ok()
}

fn repaired_value<T: DeserializeOwned>(text: &str) -> Option<Value> {
    let untyped = options! { with_snippet: false, strict_booleans: true };
    let value: Value = serde_saphyr::from_str_with_options(text, untyped).ok()?;
    Some(repaired::<T>(&value))
}

/// The misspelt name that is left of the value at `path` once it is repaired. That a list was
/// expected there would mislead, since one item is accepted.
fn misspelt_within<T: DeserializeOwned>(text: &str, path: &str) -> Option<Box<Refusal>> {
    let refusal = parse_typed::<T>(&serde_saphyr::to_string(&repaired_value::<T>(text)?).ok()?).err()?;
    let is_name = matches!(refusal.error, YamlError::SerdeUnknownField { .. } | YamlError::SerdeUnknownVariant { .. });
    (is_name && refusal.path.starts_with(&format!("{path}["))).then_some(refusal)
}

/// The settings that `value` holds.
///
/// # Errors
/// The message of a refusal, with the key.
pub(super) fn check<T: Serialize + DeserializeOwned>(value: &Value) -> std::result::Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let yaml = serde_saphyr::to_string(value).unwrap_or_default();
        match parse_typed::<T>(&yaml) {
            Err(refusal) => explain::<T>(&refusal.path, &refusal.error, value),
            // YAML reads a number as text; JSON does not.
            Ok(_) => format!("{}: expected text", error.path()),
        }
    })
}

/// The lines of all values that the rules do not allow, by their keys.
pub(super) fn lines_of_invalid_keys<T: DeserializeOwned + Validate<Context = ()>>(text: &str) -> BTreeMap<String, u64> {
    let result = serde_saphyr::from_str_with_options_valid::<T>(text, options! { with_snippet: false });
    let Err(YamlError::ValidationError { issues, locations, .. }) = result else { return BTreeMap::new() };
    let line = |path: &PathKey| Some((dotted(path), locations.locations_for(path)?.primary_location()?.line()));
    issues.iter().filter_map(|issue| line(&issue.path)).collect()
}

/// A path as garde and serde_path_to_error write it: `strategies[0].n`.
fn dotted(path: &PathKey) -> String {
    let mut text = String::new();
    for (kind, name) in path.segments() {
        match kind {
            PathKind::Index => text.push_str(&format!("[{name}]")),
            PathKind::Key if text.is_empty() => text.push_str(name),
            PathKind::Key => text.push_str(&format!(".{name}")),
        }
    }
    text
}

/// An error of YAML with the path of the key where it happened.
struct Refusal {
    path: String,
    error: YamlError,
}

fn parse_typed<T: DeserializeOwned>(text: &str) -> std::result::Result<T, Box<Refusal>> {
    let mut path = String::new();
    serde_saphyr::with_deserializer_from_str_with_options(text, options! { with_snippet: false }, |deserializer| {
        serde_path_to_error::deserialize(deserializer).map_err(|error| {
            path = error.path().to_string();
            error.into_inner()
        })
    })
    .map_err(|error| Box::new(Refusal { path, error }))
}

/// What serde says about an unknown key of a struct with flattened fields.
const UNKNOWN_FIELD: &str = "unknown field `";

/// The key that an error is about which serde found among the flattened fields of a struct, where
/// neither the path nor the line of a key is known any more: the message itself names the key.
fn flattened_key(error: &YamlError) -> Option<&str> {
    let YamlError::Message { msg, .. } = error else { return None };
    match msg.strip_prefix(UNKNOWN_FIELD) {
        Some(rest) => rest.split('`').next(),
        None => msg.split_once(": expected").map(|(key, _)| key),
    }
}

/// The line of a key at the first level of a file, counted from 1.
fn line_of_key(text: &str, key: &str) -> Option<u64> {
    let index = text.lines().position(|line| line.strip_prefix(key).is_some_and(|rest| rest.starts_with(':')))?;
    Some(index as u64 + 1)
}

/// Whether settings accept null at a path.
fn accepts_null<T: DeserializeOwned>(settings: &Value, path: &str) -> bool {
    let mut changed = settings.clone();
    let Some(value) = changed.pointer_mut(&format!("/{}", path.replace('.', "/"))) else { return false };
    *value = Value::Null;
    serde_json::from_value::<T>(changed).is_ok()
}

/// The section at a path with its first key at its default.
fn section_example<T: Serialize + DeserializeOwned>(settings: &Value, path: &str) -> Option<String> {
    let mut opened = settings.clone();
    let pointer = format!("/{}", path.replace('.', "/"));
    *opened.pointer_mut(&pointer)? = Value::Object(Map::new());
    let opened = to_value(&serde_json::from_value::<T>(opened).ok()?).ok()?;
    let (key, value) = opened.pointer(&pointer)?.as_object()?.iter().next()?;
    Some(format!("{{{key}: {}}}", written(value)))
}

/// Says what was expected at `path`, in a user's words. A misspelt key is compared with those of
/// `settings`.
fn explain<T: Serialize + DeserializeOwned>(path: &str, error: &YamlError, settings: &Value) -> String {
    let keys = all_keys(settings);
    let expected_type = |name: &str| {
        let or_null = if accepts_null::<T>(settings, path) { ", or null" } else { "" };
        let mut expected = type_in_words(name).to_owned();
        if let Some(example) = section_example::<T>(settings, path).filter(|_| expected == A_SECTION) {
            expected = format!("a section, such as {example}");
        }
        format!("{path}: expected {expected}{or_null}")
    };
    match error {
        YamlError::InvalidScalar { ty: expected, .. } | YamlError::Unexpected { expected, .. } => {
            expected_type(expected)
        }
        YamlError::SerdeInvalidType { expected, .. } | YamlError::SerdeInvalidValue { expected, .. } => {
            expected_type(expected)
        }
        YamlError::SerdeUnknownVariant { variant, expected, .. } => {
            let names: Vec<String> = expected.iter().map(ToString::to_string).collect();
            let hint = did_you_mean(variant, &names);
            format!("{path}: expected one of {}, not `{variant}`{hint}", names.join(", "))
        }
        YamlError::SerdeUnknownField { field, expected, .. } => {
            let section = path.strip_suffix(field.as_str()).unwrap_or_default();
            let siblings = expected.iter().map(|key| format!("{section}{key}"));
            let keys: Vec<String> = siblings.chain(keys.iter().cloned()).collect();
            format!("unknown key `{section}{field}`{}", did_you_mean(&format!("{section}{field}"), &keys))
        }
        YamlError::Message { msg, .. } => match flattened_key(error) {
            Some(key) if msg.starts_with(UNKNOWN_FIELD) => format!("unknown key `{key}`{}", did_you_mean(key, &keys)),
            _ => msg.clone(),
        },
        YamlError::NullIntoString { .. } => format!("{path}: expected text"),
        YamlError::SerdeMissingField { field, .. } => format!("{path}: `{field}` is missing"),
        YamlError::UnexpectedValueForUnitEnumVariant { .. } => format!("{path}: has no settings of its own"),
        YamlError::ExternallyTaggedEnumExpectedScalarOrMapping { .. } => format!("{path}: expected a single choice"),
        YamlError::DuplicateMappingKey { key: Some(key), .. } => format!("the key `{key}` is listed twice"),
        other => other.to_string(),
    }
}

const A_SECTION: &str = "a section, such as {key: value}";

/// Translates the name that serde-saphyr gives a type into the words of a user.
fn type_in_words(name: &str) -> &str {
    match name {
        "floating point" | "f64" | "f32" => "a number",
        "u64" | "u32" | "u16" | "u8" | "usize" => "a whole number from 0",
        "i64" | "i32" | "i16" | "i8" | "isize" => "a whole number",
        "boolean" => "true or false",
        "sequence start" => "a list, such as [a, b]",
        "mapping start" => A_SECTION,
        "a boolean" => "true or false",
        "a sequence" => "a list, such as [a, b]",
        "a map" => A_SECTION,
        "string scalar" | "path string" | "a string" | "string" => "text",
        "unit variant" => "a name without settings",
        other if other.starts_with("struct ") => A_SECTION,
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde::Deserialize;
    use serde_json::json;

    use super::*;
    use crate::chat_template::RenderSettings;
    use crate::settings::layers::Assignment;

    #[derive(Debug, Default, Serialize, Deserialize, Validate)]
    #[serde(default, deny_unknown_fields)]
    #[garde(allow_unvalidated)]
    struct Settings {
        lr: f64,
        steps: usize,
        offset: i64,
        greedy: bool,
        datasets: Vec<PathBuf>,
        #[garde(dive)]
        lora: Option<Lora>,
        strategies: Vec<Strategy>,
        output: Option<String>,
        save_every: Option<usize>,
    }

    #[derive(Debug, Default, Serialize, Deserialize, Validate)]
    #[serde(default, deny_unknown_fields)]
    #[garde(allow_unvalidated)]
    struct Rendered {
        model: String,
        #[serde(flatten)]
        rendering: RenderSettings,
    }

    #[test]
    fn flattened_sections_refuse_as_others_do() {
        for (text, message) in [
            ("modle: x", "unknown key `modle`; did you mean `model`?"),
            ("chat_templat: x", "unknown key `chat_templat`; did you mean `chat_template`?"),
            ("model: [x]", "model: expected text"),
            ("chat_template: [x]", "chat_template: expected a file"),
            ("date: tomorrow", "date: expected a date, such as 2026-11-28"),
            ("date: 2026-13-28", "date: expected a date, such as 2026-11-28"),
            (
                "chat_template_kwargs: thinking",
                "chat_template_kwargs: expected a section, such as {enable_thinking: false}",
            ),
        ] {
            let file = format!("# A comment.\n{text}\n# Another.\n");
            let error = parse::<Rendered>(Path::new("run.yaml"), &file).unwrap_err();
            assert_eq!(error.to_string(), format!("run.yaml, line 2: {message}"));
            let mut value = to_value(&Rendered::default()).unwrap();
            let changes: Value = serde_saphyr::from_str(text).unwrap();
            value.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            assert_eq!(check::<Rendered>(&value).unwrap_err(), message);
        }
    }

    #[derive(Debug, Default, Serialize, Deserialize, Validate)]
    #[serde(default, deny_unknown_fields)]
    #[garde(allow_unvalidated)]
    struct Lora {
        #[garde(range(min = 1))]
        rank: usize,
    }

    #[derive(Debug, Serialize, Deserialize)]
    #[serde(rename_all = "lowercase", deny_unknown_fields)]
    enum Strategy {
        Ar,
        Rolling {
            #[serde(default = "sixteen")]
            n: usize,
        },
    }

    fn sixteen() -> usize {
        16
    }

    /// If this fails after an update of serde-saphyr, it reports its errors or names its types
    /// differently: adapt `explain` and `type_in_words`, so that the messages stay as they are
    /// here.
    #[test]
    fn a_refusal_says_in_a_users_words_what_was_expected() {
        for (text, message) in [
            ("lr: fast", "lr: expected a number"),
            ("steps: -1", "steps: expected a whole number from 0"),
            ("steps: 1.5", "steps: expected a whole number from 0"),
            ("offset: x", "offset: expected a whole number"),
            ("greedy: maybe", "greedy: expected true or false"),
            ("datasets: {a: 1}", "datasets: expected a list, such as [a, b]"),
            ("lora: 3", "lora: expected a section, such as {rank: 0}, or null"),
            ("lora: {rank: x}", "lora.rank: expected a whole number from 0"),
            ("lora: {rang: 1}", "unknown key `lora.rang`; did you mean `lora.rank`?"),
            ("step: 1", "unknown key `step`; did you mean `steps`?"),
            (
                "strategies: [roling]",
                "strategies[0]: expected one of ar, rolling, not `roling`; did you mean `rolling`?",
            ),
            ("strategies: [{ar: {n: 1}}]", "strategies[0].ar: has no settings of its own"),
            ("output: [x]", "output: expected text, or null"),
            ("save_every: none", "save_every: expected a whole number from 0, or null"),
        ] {
            let error = parse::<Settings>(Path::new("run.yaml"), &format!("# A comment.\n{text}\n")).unwrap_err();
            assert_eq!(error.to_string(), format!("run.yaml, line 2: {message}"));
            // The same value from another layer: in JSON.
            let mut value = to_value(&Settings::default()).unwrap();
            let changes: Value = serde_saphyr::from_str(text).unwrap();
            value.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            assert_eq!(check::<Settings>(&value).unwrap_err(), message);
        }
        assert_eq!(check::<Settings>(&json!({ "output": 3 })).unwrap_err(), "output: expected text");
        assert_eq!(
            check::<Settings>(&json!({ "datasets": null })).unwrap_err(),
            "datasets: expected a list, such as [a, b]"
        );
    }

    #[test]
    fn values_in_other_forms_mean_what_they_seem_to() {
        for (text, expected) in [
            ("datasets: x", json!({ "datasets": ["x"] })),
            ("datasets: [y, 2024]", json!({ "datasets": ["y", "2024"] })),
            ("lora: true", json!({ "lora": { "rank": 0 } })),
            ("lora: yes", json!({ "lora": { "rank": 0 } })),
            ("lora: false", json!({ "lora": null })),
            ("lora: off", json!({ "lora": null })),
            ("greedy: yes", json!({ "greedy": true })),
            ("strategies: ar", json!({ "strategies": ["ar"] })),
            ("strategies: [ar, rolling]", json!({ "strategies": ["ar", { "rolling": { "n": 16 } }] })),
            ("strategies: rolling", json!({ "strategies": [{ "rolling": { "n": 16 } }] })),
            ("strategies: {rolling: {n: 4}}", json!({ "strategies": [{ "rolling": { "n": 4 } }] })),
        ] {
            let settings = parse::<Settings>(Path::new("run.yaml"), text).unwrap();
            let (key, value) = expected.as_object().unwrap().iter().next().unwrap();
            assert_eq!(&json!(settings)[key], value, "{text}");
            // The same from the command line, where YAML is written without blanks.
            let (_, written) = text.split_once(": ").unwrap();
            let mut root = to_value(&Settings::default()).unwrap();
            let assignment = Assignment::from_override(&format!("{key}={written}"));
            assert!(assignment.apply::<Settings>(&mut root).is_ok(), "{text}");
            assert_eq!(&root[key], value, "{text}");
        }
        // A text does not become a key of a section that has no such key.
        let assignment = Assignment::from_override("lora=adam");
        let refused = assignment.apply::<Settings>(&mut to_value(&Settings::default()).unwrap()).err().unwrap();
        let message = refused.into_error(&assignment.origin).to_string();
        assert!(message.contains("lora: expected a section, such as {rank: 0}"), "{message}");
        // One item for a list is known by its name where the name is right, and named where it is not.
        for (written, refusal) in [
            ("{rolling: {m: 4}}", "unknown key `strategies[0].rolling.m`; did you mean `strategies[0].rolling.n`?"),
            ("roling", "strategies[0]: expected one of ar, rolling, not `roling`; did you mean `rolling`?"),
        ] {
            let text = format!("lr: 1\nstrategies: {written}\n");
            let message = parse::<Settings>(Path::new("run.yaml"), &text).unwrap_err().to_string();
            assert_eq!(message, format!("run.yaml, line 2: {refusal}"));
            let assignment = Assignment::from_override(&format!("strategies={written}"));
            let refused = assignment.apply::<Settings>(&mut to_value(&Settings::default()).unwrap()).err().unwrap();
            let message = refused.into_error(&assignment.origin).to_string();
            assert_eq!(message, format!("{}: {refusal}", assignment.origin));
        }
        // A text that is misspelt does not become a list of choices.
        let message = parse::<Settings>(Path::new("run.yaml"), "strategies: [ar, roling]").unwrap_err().to_string();
        assert!(message.contains("strategies[1]: expected one of ar, rolling, not `roling`"), "{message}");
    }

    #[test]
    fn an_error_in_yaml_syntax_names_its_line() {
        for (text, parts) in
            [("lr: 1\nsteps: [\n", ["line 2", "bracket"]), ("lr: 1\nlr: 2\n", ["line 2", "`lr` is listed twice"])]
        {
            let message = parse::<Settings>(Path::new("run.yaml"), text).unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        }
    }

    #[test]
    fn values_out_of_range_are_reported_with_their_lines() {
        let lines = lines_of_invalid_keys::<Settings>("lr: 1\nlora:\n  rank: 0\n");
        assert_eq!(lines, BTreeMap::from([("lora.rank".to_owned(), 3)]));
    }
}
