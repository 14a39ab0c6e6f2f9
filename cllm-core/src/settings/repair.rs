//! Reads what people mean where they write a value in another form: one item for a list of one, the
//! name of a choice that has settings, `true` for a section with its defaults, a number for a text.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use serde_path_to_error::Segment;

/// More values of other forms than this are not repaired.
const MAX_REPAIRS: usize = 64;

/// The value with as many of its parts repaired as it takes to be the settings `T`, or as can be.
pub(super) fn repaired<T: DeserializeOwned>(value: &Value) -> Value {
    let mut value = value.clone();
    for _ in 0..MAX_REPAIRS {
        let Some(Failure { pointer, expects_list, .. }) = failing_part::<T>(&value) else { return value };
        let forms = value.pointer(&pointer).map(|part| other_forms(part, expects_list)).unwrap_or_default();
        let with = |form: Value| {
            let mut changed = value.clone();
            changed.pointer_mut(&pointer).into_iter().for_each(|part| *part = form.clone());
            changed
        };
        // A form helps if something else is wrong afterwards, or nothing. A section without such a key
        // is not meant by the key's name. One item for a list is meant, also with a misspelt key.
        let within = format!("{pointer}/");
        let helps = |changed: &Value| {
            failing_part::<T>(changed).is_none_or(|other| {
                let is_misread = other.is_unknown_key && !expects_list && other.pointer.starts_with(&within);
                other.pointer != pointer && !is_misread
            })
        };
        match forms.into_iter().map(with).find(helps) {
            Some(changed) => value = changed,
            None => return value,
        }
    }
    value
}

/// The part of a value that is not as settings expect it.
struct Failure {
    /// The JSON pointer to it.
    pointer: String,
    expects_list: bool,
    is_unknown_key: bool,
}

fn failing_part<T: DeserializeOwned>(value: &Value) -> Option<Failure> {
    let error = serde_path_to_error::deserialize::<_, T>(value).err()?;
    let mut pointer = String::new();
    for segment in error.path().iter() {
        let name = match segment {
            Segment::Seq { index } => index.to_string(),
            Segment::Map { key } => key.replace('~', "~0").replace('/', "~1"),
            Segment::Enum { variant } => variant.clone(),
            Segment::Unknown => break,
        };
        // The name of a choice is a level of its own only where its settings are written.
        let longer = format!("{pointer}/{name}");
        if value.pointer(&longer).is_none() {
            break;
        }
        pointer = longer;
    }
    let message = error.inner().to_string();
    Some(Failure {
        pointer,
        // Without a list, one is also read as a section whose keys are left out.
        expects_list: message.contains("expected a sequence"),
        is_unknown_key: message.starts_with("unknown field"),
    })
}

/// A section with its defaults, or none.
fn section(is_there: bool) -> Value {
    if is_there { json!({}) } else { Value::Null }
}

/// What else a value may mean.
fn other_forms(value: &Value, expects_list: bool) -> Vec<Value> {
    match value {
        Value::Null | Value::Array(_) => Vec::new(),
        value if expects_list => vec![json!([value])],
        Value::String(text) => {
            let of_bool = |value: bool| vec![json!(value), section(value)];
            let truth = match text.as_str() {
                "yes" | "on" => of_bool(true),
                "no" | "off" => of_bool(false),
                _ => Vec::new(),
            };
            let choice = Value::Object(Map::from_iter([(text.clone(), json!({}))]));
            [truth, vec![choice]].concat()
        }
        Value::Bool(value) => vec![section(*value)],
        Value::Number(number) => vec![json!(number.to_string())],
        Value::Object(_) => Vec::new(),
    }
}
