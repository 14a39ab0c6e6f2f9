//! The keys of a settings struct, by their full paths.

use serde::Serialize;
use serde_json::Value;

use crate::{Error, Result};

/// Keys that are less similar (Jaro-Winkler, 0 to 1) are not suggested.
const MIN_SIMILARITY: f64 = 0.75;

pub(super) fn to_value(settings: &impl Serialize) -> Result<Value> {
    serde_json::to_value(settings).map_err(Error::serialization)
}

/// Every key of a section and of the sections in it, such as `optimizer.lr`.
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

/// `; did you mean ...?` with the word that is most similar to `misspelt`, or an empty text if no
/// word is similar enough. Keys are compared by their full path and, if `misspelt` has no path,
/// also by their last segment.
pub fn did_you_mean(misspelt: &str, words: &[String]) -> String {
    let similarity = |word: &String| {
        let last = word.rsplit('.').next().unwrap_or(word);
        let full = strsim::jaro_winkler(misspelt, word);
        if misspelt.contains('.') { full } else { full.max(strsim::jaro_winkler(misspelt, last)) }
    };
    let others = words.iter().filter(|word| *word != misspelt);
    let nearest = others.max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    nearest
        .filter(|word| similarity(word) > MIN_SIMILARITY)
        .map(|word| format!("; did you mean `{word}`?"))
        .unwrap_or_default()
}
