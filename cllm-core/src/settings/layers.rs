//! What is laid over the file: variables of the environment, and `section.key=value`.

use std::ffi::OsString;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{all_keys, check, nearest, to_value};
use crate::{Error, Result};

/// Prefix of environment variables: `CLLM_SET_OPTIMIZER__LR=1e-4` sets `optimizer.lr`.
pub const ENVIRONMENT_PREFIX: &str = "CLLM_SET_";

/// Variables that set something; others may hold what they like, even what is no text.
pub(super) fn from_environment(variables: impl Iterator<Item = (OsString, OsString)>) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    for (name, value) in variables {
        let name = name.to_string_lossy();
        let Some(path) = name.strip_prefix(ENVIRONMENT_PREFIX) else { continue };
        let origin = format!("environment variable {name}");
        let value = value.into_string().map_err(|_| Error::usage(format!("{origin}: its value is not UTF-8")))?;
        found.push((origin, format!("{}={value}", path.to_lowercase().replace("__", "."))));
    }
    found.sort();
    Ok(found)
}

/// Why an assignment is refused.
pub(super) enum Refused {
    /// There is no such key.
    Unknown(String),
    /// The key does not take this value, or the assignment is none.
    Wrong(String),
}

impl Refused {
    pub(super) fn into_error(self, origin: &str) -> Error {
        let (Refused::Unknown(message) | Refused::Wrong(message)) = self;
        Error::usage(format!("{origin}: {message}"))
    }
}

/// Lays one `a.b=value` over `root`, which stays as it is where that is refused.
pub(super) fn set<T: Serialize + DeserializeOwned>(
    root: &mut Value,
    assignment: &str,
) -> std::result::Result<(), Refused> {
    let form = || Refused::Wrong("expected section.key=value; flags start with --".to_owned());
    let (path, text) = assignment.split_once('=').ok_or_else(form)?;
    let mut changed = root.clone();
    open_sections::<T>(&mut changed, path);
    let unknown = || {
        let hint = nearest(path, &all_keys(&changed)).map(|key| format!("; did you mean `{key}`?")).unwrap_or_default();
        Refused::Unknown(format!("unknown key `{path}`{hint}"))
    };
    let pointer = format!("/{}", path.replace('.', "/"));
    let is_text = changed.pointer(&pointer).ok_or_else(unknown)?.is_string();
    let as_yaml = serde_saphyr::from_str(text).map_err(|error| format!("`{text}`: {error}"));
    // In place of text, text is taken as it is, unless it is quoted or null: `y`, `2024` and `a: b` are good names.
    let plain = text != "null" && !(text.starts_with(['\'', '"']) && as_yaml.as_ref().is_ok_and(Value::is_string));
    let as_text = Ok(Value::from(text));
    let readings = if is_text && plain { [as_text, as_yaml] } else { [as_yaml, as_text] };
    let mut refused = None;
    for reading in readings {
        let tried = reading.and_then(|value| {
            let mut tried = changed.clone();
            tried.pointer_mut(&pointer).into_iter().for_each(|place| *place = value.clone());
            check::<T>(&tried).map(|()| tried)
        });
        match tried {
            Ok(tried) => {
                *root = tried;
                return Ok(());
            }
            Err(message) => refused = refused.or(Some(message)),
        }
    }
    Err(Refused::Wrong(refused.unwrap_or_default()))
}

/// Puts the defaults of a section in its place where it is null and `path` leads into it.
fn open_sections<T: Serialize + DeserializeOwned>(root: &mut Value, path: &str) {
    for (end, _) in path.match_indices('.') {
        let pointer = format!("/{}", path[..end].replace('.', "/"));
        if root.pointer(&pointer).is_some_and(Value::is_null) {
            let mut opened = root.clone();
            opened.pointer_mut(&pointer).into_iter().for_each(|place| *place = Value::Object(Map::new()));
            // What is no section is refused here, and stays null.
            if let Some(opened) = serde_json::from_value::<T>(opened).ok().and_then(|all| to_value(&all).ok()) {
                *root = opened;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_that_are_no_text_matter_only_where_they_set_something() {
        use std::os::unix::ffi::OsStringExt;
        let variable = |name: &str, value: &[u8]| (name.into(), OsString::from_vec(value.to_vec()));
        let foreign = [variable("LESS", b"\xff"), variable("CLLM_SET_OPTIMIZER__LR", b"0.3")];
        let found = from_environment(foreign.into_iter()).unwrap();
        assert_eq!(found, [("environment variable CLLM_SET_OPTIMIZER__LR".into(), "optimizer.lr=0.3".into())]);
        let message = from_environment([variable("CLLM_SET_NAME", b"\xff")].into_iter()).unwrap_err().to_string();
        assert!(message.contains("CLLM_SET_NAME") && message.contains("not UTF-8"), "{message}");
    }
}
