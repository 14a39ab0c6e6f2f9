//! The keys of a settings struct, by their full paths.

use serde::Serialize;
use serde_json::Value;

use crate::{Error, Result};

/// A key of lower likeness (Jaro-Winkler, 0 to 1) is not suggested.
const MIN_LIKENESS: f64 = 0.75;

pub(super) fn to_value(settings: &impl Serialize) -> Result<Value> {
    serde_json::to_value(settings).map_err(Error::serialization)
}

/// Every key of a section and of the sections in it, as `optimizer.lr`.
pub(super) fn all_keys(section: &Value) -> Vec<String> {
    let mut keys = Vec::new();
    if let Value::Object(object) = section {
        for (key, inner) in object {
            keys.push(key.clone());
            keys.extend(all_keys(inner).into_iter().map(|rest| format!("{key}.{rest}")));
        }
    }
    keys
}

/// `; did you mean ...?` with the word that is most like `misspelt`, or an empty text if no word is
/// like it. A key is compared by its full path, and by its last part where `misspelt` has no path.
pub(super) fn did_you_mean(misspelt: &str, words: &[String]) -> String {
    let likeness = |word: &String| {
        let last = word.rsplit('.').next().unwrap_or(word);
        let full = strsim::jaro_winkler(misspelt, word);
        if misspelt.contains('.') { full } else { full.max(strsim::jaro_winkler(misspelt, last)) }
    };
    let others = words.iter().filter(|word| *word != misspelt);
    let nearest = others.max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    nearest
        .filter(|word| likeness(word) > MIN_LIKENESS)
        .map(|word| format!("; did you mean `{word}`?"))
        .unwrap_or_default()
}
