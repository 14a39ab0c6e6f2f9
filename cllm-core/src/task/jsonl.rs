//! Any prompts with a reference, and how answers are compared with it.

use regex::Regex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::gsm8k::{final_number, number};
use crate::prompt_set::Sample;
use crate::{Error, Result};

/// When an answer is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Scorer {
    /// It is the reference, white space at the ends aside.
    Exact,
    /// Its last number (or that after its last `####`) is that of the reference.
    Numeric,
    /// The reference, a pattern, is found anywhere in it; `^` and `$` are the ends of the answer without its outer white space.
    Regex,
}

impl Scorer {
    /// Notes on a sample how its answers are compared; what the sample says itself stays.
    pub fn note(self, sample: &mut Sample) {
        let meta = sample.meta.get_or_insert_with(|| Map::new().into());
        if !meta.is_object() {
            *meta = serde_json::json!({ "meta": meta.take() });
        }
        if meta["scorer"].is_null() {
            meta["scorer"] = serde_json::to_value(self).unwrap_or_default();
        }
    }
}

/// How a sample's answers are compared, by `scorer` in its meta; none: with both the text and the number.
fn scorer(sample: &Sample) -> Result<Option<Scorer>> {
    let named = sample.meta.as_ref().map_or(&Value::Null, |meta| &meta["scorer"]);
    let bad = |_| {
        let id = &sample.id;
        Error::usage(format!("prompt `{id}`: meta.scorer is {named}: expected exact, numeric or regex"))
    };
    Option::deserialize(named).map_err(bad)
}

fn pattern(sample: &Sample, reference: &str) -> Result<Regex> {
    let bad = |error| Error::usage(format!("prompt `{}`: its reference is no pattern: {error}", sample.id));
    Regex::new(reference).map_err(bad)
}

/// Refuses an unknown scorer and a broken pattern.
pub(super) fn check(sample: &Sample) -> Result<()> {
    match (scorer(sample)?, &sample.reference) {
        (Some(Scorer::Regex), Some(reference)) => pattern(sample, reference).map(drop),
        _ => Ok(()),
    }
}

pub(super) fn is_right(sample: &Sample, reference: &str, answer: &str) -> Result<bool> {
    let (wanted, answer) = (reference.trim(), answer.trim());
    Ok(match scorer(sample)? {
        Some(Scorer::Exact) => wanted == answer,
        Some(Scorer::Numeric) => final_number(wanted).is_some_and(|wanted| final_number(answer) == Some(wanted)),
        Some(Scorer::Regex) => pattern(sample, reference)?.is_match(answer),
        None => wanted == answer || number(wanted).is_some_and(|wanted| number(answer) == Some(wanted)),
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
    fn texts_and_numbers() {
        let is_right = |reference: &str, answer: &str| is_right(&sample(None), reference, answer).unwrap();
        assert!(is_right("Paris", " Paris\n") && !is_right("Paris", "paris"));
        assert!(is_right("1,000", "1000.0") && !is_right("1000", "1001"));
    }

    #[test]
    fn each_scorer_has_its_rule() {
        let is_right = |scorer: &str, reference: &str, answer: &str| {
            is_right(&sample(Some(json!({ "scorer": scorer }))), reference, answer).unwrap()
        };
        assert!(is_right("exact", "1000", " 1000 ") && !is_right("exact", "1000", "1,000"));
        assert!(is_right("numeric", "1000", "It is 1 or 1,000.0.") && !is_right("numeric", "1000", "1000 or 1"));
        assert!(is_right("regex", "(?i)par[ií]s", "It is Paris.") && !is_right("regex", "^Paris$", "It is Paris."));
        assert!(is_right("regex", "^Paris$", "\nParis ") && !is_right("regex", "1.0", "10"));
    }

    #[test]
    fn a_row_wins_over_the_setting_and_is_checked() {
        let mut row = sample(Some(json!({ "scorer": "exact", "level": 1 })));
        Scorer::Regex.note(&mut row);
        assert_eq!(row.meta, Some(json!({ "scorer": "exact", "level": 1 })));
        for (before, after) in
            [(None, json!({ "scorer": "regex" })), (Some(json!(3)), json!({ "scorer": "regex", "meta": 3 }))]
        {
            let mut row = sample(before);
            Scorer::Regex.note(&mut row);
            assert_eq!(row.meta, Some(after));
            row.reference = Some("(".to_owned());
            assert!(check(&row).unwrap_err().to_string().contains("`a`: its reference is no pattern"));
        }
        let error = check(&sample(Some(json!({ "scorer": "fuzzy" })))).unwrap_err().to_string();
        assert!(error.contains("fuzzy") && error.contains("exact, numeric or regex"), "{error}");
    }
}
