//! The layers above the settings file: variables of the environment, and `section.key=value` on the
//! command line.

use std::ffi::OsString;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use serde_saphyr::{Error as YamlError, options};

use super::keys::{all_keys, did_you_mean, to_value};
use super::refusal::check;
use super::repair::repaired;
use crate::{Error, Result};

/// Prefix of environment variables: `CLLM_SET_OPTIMIZER__LR=1e-4` sets `optimizer.lr`.
pub const ENVIRONMENT_PREFIX: &str = "CLLM_SET_";

/// One value of a layer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Assignment {
    /// Where it comes from; messages begin with it.
    pub(super) origin: String,
    /// Full path of the key, or the whole text of an override without `=`.
    pub(super) path: String,
    text: Option<String>,
    pub(super) is_override: bool,
}

/// Why an assignment is refused.
pub(super) enum Refused {
    UnknownKey(String),
    /// The key does not accept this value, or the text is not an assignment.
    InvalidValue(String),
}

impl Refused {
    pub(super) fn into_error(self, origin: &str) -> Error {
        let (Refused::UnknownKey(message) | Refused::InvalidValue(message)) = self;
        Error::usage(format!("{origin}: {message}"))
    }
}

/// The assignments among some environment variables, in the order of their names. Other variables
/// may hold anything, even bytes that are not UTF-8.
pub(super) fn from_environment(variables: impl Iterator<Item = (OsString, OsString)>) -> Result<Vec<Assignment>> {
    let mut assignments = Vec::new();
    for (name, value) in variables {
        let name = name.to_string_lossy();
        let Some(path) = name.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
        let origin = format!("environment variable {name}");
        let value = value.into_string().map_err(|_| Error::usage(format!("{origin}: its value is not UTF-8")))?;
        let path = path.to_lowercase().replace("__", ".");
        assignments.push(Assignment { origin, path, text: Some(value), is_override: false });
    }
    assignments.sort_by(|a, b| a.origin.cmp(&b.origin));
    Ok(assignments)
}

impl Assignment {
    /// An argument of the command line.
    pub(super) fn from_override(argument: &str) -> Self {
        let (path, text) = argument.split_once('=').map_or((argument, None), |(path, text)| (path, Some(text)));
        Assignment {
            origin: format!("`{argument}`"),
            path: path.to_owned(),
            text: text.map(str::to_owned),
            is_override: true,
        }
    }

    /// Sets the key in `root`, which does not change if the assignment is refused.
    pub(super) fn apply<T: Serialize + DeserializeOwned>(&self, root: &mut Value) -> std::result::Result<(), Refused> {
        let Some(text) = &self.text else {
            return Err(Refused::InvalidValue("expected KEY=VALUE; flags start with --".to_owned()));
        };
        let mut opened = root.clone();
        open_null_sections::<T>(&mut opened, &self.path);
        let pointer = pointer(&self.path);
        opened = with_free_key::<T>(&opened, &self.path).unwrap_or(opened);
        let Some(current) = opened.pointer(&pointer) else {
            let hint = did_you_mean(&self.path, &all_keys(&opened));
            return Err(Refused::UnknownKey(format!("unknown key `{}`{hint}", self.path)));
        };
        let changed: Vec<std::result::Result<Value, String>> = readings(text, current)
            .into_iter()
            .map(|reading| {
                let mut changed = opened.clone();
                let value = reading?;
                changed.pointer_mut(&pointer).into_iter().for_each(|current| *current = value.clone());
                Ok(changed)
            })
            .collect();
        let exact = changed.iter().flatten().find(|changed| serde_json::from_value::<T>((*changed).clone()).is_ok());
        if let Some(exact) = exact {
            *root = exact.clone();
            return Ok(());
        }
        let mut first_refusal = None;
        for changed in changed {
            match changed.and_then(|changed| check::<T>(&repaired::<T>(&changed))) {
                Ok(settings) => {
                    *root = to_value(&settings).map_err(|error| Refused::InvalidValue(error.to_string()))?;
                    return Ok(());
                }
                Err(refusal) => first_refusal = first_refusal.or(Some(refusal)),
            }
        }
        Err(Refused::InvalidValue(first_refusal.unwrap_or_default()))
    }
}

/// The possible meanings of `text`, in the order to try: YAML, then plain text; plain text comes
/// first where the current value is text, since `y`, `2024` and `a: b` are good names. Even then,
/// quotes are removed, and `null` is null if the key accepts it.
fn readings(text: &str, current: &Value) -> [std::result::Result<Value, String>; 2] {
    let yaml: std::result::Result<Value, String> =
        // In YAML 1.1, `y` in a list of names would be true.
        serde_saphyr::from_str_with_options(text, options! { with_snippet: false, strict_booleans: true }).map_err(|error| match error {
            YamlError::NonFiniteFloat { .. } => "expected a finite number".to_owned(),
            other => other.to_string(),
        });
    let plain = Ok(Value::from(text));
    let is_quoted = text.starts_with(['\'', '"']) && yaml.as_ref().is_ok_and(Value::is_string);
    if current.is_string() && text != "null" && !is_quoted { [plain, yaml] } else { [yaml, plain] }
}

/// Replaces every null section on the way to `path` by its defaults.
fn open_null_sections<T: Serialize + DeserializeOwned>(root: &mut Value, path: &str) {
    for (end, _) in path.match_indices('.') {
        let pointer = pointer(&path[..end]);
        if root.pointer(&pointer).is_some_and(Value::is_null) {
            let mut opened = root.clone();
            opened.pointer_mut(&pointer).into_iter().for_each(|section| *section = Value::Object(Map::new()));
            // A key that is not a section refuses an empty section and stays null.
            if let Some(opened) = serde_json::from_value::<T>(opened).ok().and_then(|all| to_value(&all).ok()) {
                *root = opened;
            }
        }
    }
}

/// `root` with a null at `path`, if there is no such key but its section takes any key, as
/// `chat_template_kwargs` does.
pub(super) fn with_free_key<T: Serialize + DeserializeOwned>(root: &Value, path: &str) -> Option<Value> {
    let pointer = pointer(path);
    let (section, key) = pointer.rsplit_once('/').filter(|_| root.pointer(&pointer).is_none())?;
    let mut opened = root.clone();
    opened.pointer_mut(section)?.as_object_mut()?.insert(key.to_owned(), Value::Null);
    let kept = to_value(&check::<T>(&opened).ok()?).ok()?;
    kept.pointer(&pointer).map(|_| opened)
}

fn pointer(path: &str) -> String {
    format!("/{}", path.replace('.', "/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_that_are_not_utf8_matter_only_where_they_set_something() {
        use std::os::unix::ffi::OsStringExt;
        let variable = |name: &str, value: &[u8]| (name.into(), OsString::from_vec(value.to_vec()));
        let variables = [variable("LESS", b"\xff"), variable("CLLM_SET_OPTIMIZER__LR", b"0.3")];
        let assignments = from_environment(variables.into_iter()).unwrap();
        assert_eq!(assignments.len(), 1);
        assert_eq!(assignments[0].origin, "environment variable CLLM_SET_OPTIMIZER__LR");
        assert_eq!((assignments[0].path.as_str(), assignments[0].text.as_deref()), ("optimizer.lr", Some("0.3")));
        let message = from_environment([variable("CLLM_SET_NAME", b"\xff")].into_iter()).unwrap_err().to_string();
        assert!(message.contains("CLLM_SET_NAME") && message.contains("not UTF-8"), "{message}");
    }
}
