//! Any prompts with a reference, from a JSONL, JSON or Parquet file.
//!
//! ```text
//! row     {"prompt": "What is the capital of France?", "reference": "Paris", "scorer": "exact"}
//! prompt  What is the capital of France?
//! target  Paris
//! score   by the row's `scorer`, or else the settings'; without one, equal texts or equal numbers
//! ```

use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::number::{same_final_number, whole_number};
use crate::prompt_set::Sample;
use crate::{Error, Result};

/// When an answer is correct.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scorer {
    /// The answer is the reference, apart from white space at the ends.
    Exact,
    /// The final number of the answer equals that of the reference: the number in its last box or
    /// after its last `####`, or else its last number.
    Numeric,
    /// The reference is a regular expression that matches anywhere in the answer; `^` and `$` are
    /// the ends of the answer without outer white space.
    Regex,
}

impl Scorer {
    /// Makes this the scorer of a sample that names none.
    pub fn set_default(self, sample: &mut Sample) {
        let meta = sample.meta.get_or_insert_with(|| Map::new().into());
        if !meta.is_object() {
            *meta = serde_json::json!({ "meta": meta.take() });
        }
        if meta["scorer"].is_null() {
            meta["scorer"] = serde_json::json!(self);
        }
    }
}

/// The scorer that a sample names in its meta.
fn scorer(sample: &Sample) -> Result<Option<Scorer>> {
    let name = sample.meta.as_ref().map_or(&Value::Null, |meta| &meta["scorer"]);
    let invalid = |_| {
        let id = &sample.id;
        Error::usage(format!("prompt `{id}`: meta.scorer is {name}: expected exact, numeric or regex"))
    };
    Option::deserialize(name).map_err(invalid)
}

fn compile_pattern(sample: &Sample, reference: &str) -> Result<Regex> {
    let invalid =
        |error| Error::usage(format!("prompt `{}`: its reference is not a valid pattern: {error}", sample.id));
    Regex::new(reference).map_err(invalid)
}

/// Refuses an unknown scorer and a broken pattern.
pub(super) fn check(sample: &Sample) -> Result<()> {
    match (scorer(sample)?, &sample.reference) {
        (Some(Scorer::Regex), Some(reference)) => compile_pattern(sample, reference).map(drop),
        _ => Ok(()),
    }
}

pub(super) fn is_correct(sample: &Sample, reference: &str, answer: &str) -> Result<bool> {
    let (expected, answer) = (reference.trim(), answer.trim());
    Ok(match scorer(sample)? {
        Some(Scorer::Exact) => expected == answer,
        Some(Scorer::Numeric) => same_final_number(expected, answer),
        Some(Scorer::Regex) => compile_pattern(sample, reference)?.is_match(answer),
        None => expected == answer || whole_number(expected).is_some_and(|number| whole_number(answer) == Some(number)),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::prompt_set::Prompt;

    fn sample(meta: Option<Value>) -> Sample {
        let (id, source) = ("a".to_owned(), "jsonl".to_owned());
        Sample { id, source, prompt: Prompt::question("?"), reference: None, meta }
    }

    #[test]
    fn texts_and_numbers_are_compared() {
        let is_correct = |reference: &str, answer: &str| is_correct(&sample(None), reference, answer).unwrap();
        assert!(is_correct("Paris", " Paris\n") && !is_correct("Paris", "paris"));
        assert!(is_correct("1,000", "1000.0") && !is_correct("1000", "1001"));
    }

    #[test]
    fn each_scorer_has_its_rule() {
        let is_correct = |scorer: &str, reference: &str, answer: &str| {
            is_correct(&sample(Some(json!({ "scorer": scorer }))), reference, answer).unwrap()
        };
        assert!(is_correct("exact", "1000", " 1000 ") && !is_correct("exact", "1000", "1,000"));
        assert!(is_correct("numeric", "1000", "It is 1 or 1,000.0.") && !is_correct("numeric", "1000", "1000 or 1"));
        assert!(is_correct("regex", "(?i)par[ií]s", "It is Paris.") && !is_correct("regex", "^Paris$", "It is Paris."));
        assert!(is_correct("regex", "^Paris$", "\nParis ") && !is_correct("regex", "1.0", "10"));
    }

    #[test]
    fn a_row_overrides_the_setting_and_is_checked() {
        let mut row = sample(Some(json!({ "scorer": "exact", "level": 1 })));
        Scorer::Regex.set_default(&mut row);
        assert_eq!(row.meta, Some(json!({ "scorer": "exact", "level": 1 })));
        for (before, after) in
            [(None, json!({ "scorer": "regex" })), (Some(json!(3)), json!({ "scorer": "regex", "meta": 3 }))]
        {
            let mut row = sample(before);
            Scorer::Regex.set_default(&mut row);
            assert_eq!(row.meta, Some(after));
            row.reference = Some("(".to_owned());
            assert!(check(&row).unwrap_err().to_string().contains("`a`: its reference is not a valid pattern"));
        }
        let error = check(&sample(Some(json!({ "scorer": "fuzzy" })))).unwrap_err().to_string();
        assert!(error.contains("fuzzy") && error.contains("exact, numeric or regex"), "{error}");
    }
}
