//! GSM8K: `{question, answer}`, the answer worked out and ending in `#### N`.

use std::path::Path;
use std::sync::LazyLock;

use regex::Regex;
use serde::Deserialize;

use crate::Result;
use crate::prompt_set::dataset_file;
use crate::prompt_set::{Prompt, Sample};

#[derive(Deserialize)]
struct Row {
    question: String,
    answer: String,
}

static CALCULATION: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"<<[^>]*>>").ok());
static NUMBER: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+").ok());

pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    let rows: Vec<Row> = dataset_file::read(data, &[split, &format!("main/{split}"), &format!("data/{split}")])?;
    Ok(rows.into_iter().enumerate().map(|(index, row)| sample(index, split, row)).collect())
}

fn sample(index: usize, split: &str, row: Row) -> Sample {
    let answer =
        CALCULATION.as_ref().map_or(row.answer.clone(), |marks| marks.replace_all(&row.answer, "").into_owned());
    Sample {
        id: format!("gsm8k-{split}-{index}"),
        source: format!("gsm8k/{split}"),
        prompt: Prompt::question(row.question.trim()),
        reference: Some(answer.trim().to_owned()),
        meta: None,
    }
}

/// Whether the final number of an answer equals the reference's.
pub(super) fn is_right(reference: &str, answer: &str) -> bool {
    final_number(reference).is_some_and(|wanted| final_number(answer) == Some(wanted))
}

/// The number after the last `####`, else the last number.
pub(super) fn final_number(text: &str) -> Option<f64> {
    let numbers = NUMBER.as_ref()?;
    let marked = text.rsplit_once("####").and_then(|(_, after)| numbers.find(after));
    marked.or_else(|| numbers.find_iter(text).last()).and_then(|found| number(found.as_str()))
}

/// `1,000`, `$18.00`, `50%`, `7.` as numbers.
pub(super) fn number(text: &str) -> Option<f64> {
    let plain: String = text.chars().filter(|c| !matches!(c, ',' | '$' | '%') && !c.is_whitespace()).collect();
    plain.trim_end_matches('.').parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_final_number_is_found_and_normalised() {
        for (text, wanted) in [
            ("so 3 * 4 = 12\n#### 12", Some(12.0)),
            ("#### 1,234", Some(1234.0)),
            ("The answer is $18.00.", Some(18.0)),
            ("It is -5", Some(-5.0)),
            ("#### 7 apples, not 8", Some(7.0)),
            ("none", None),
        ] {
            assert_eq!(final_number(text), wanted, "{text}");
        }
        assert!(is_right("#### 18", "18.0") && !is_right("#### 18", "") && !is_right("#### 18", "#### 81"));
    }

    #[test]
    fn files_load_and_broken_rows_are_named() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path(), "test").unwrap_err().to_string().contains("test.jsonl"));
        let path = dir.path().join("test.jsonl");
        std::fs::write(&path, "{\"question\": \"2+2?\", \"answer\": \"2+2=<<2+2=4>>4\\n#### 4\"}\n").unwrap();
        let samples = load(dir.path(), "test").unwrap();
        assert_eq!(samples[0].reference.as_deref(), Some("2+2=4\n#### 4"));
        std::fs::write(&path, "{\"question\": \"x\"}\n").unwrap();
        assert!(load(dir.path(), "test").unwrap_err().to_string().contains("line 1"));
    }

    #[test]
    fn the_real_files_load() {
        let Some(data) = std::env::var_os("CLLM_DATA") else {
            println!("skipped: CLLM_DATA is not set");
            return;
        };
        let samples = load(&Path::new(&data).join("gsm8k"), "test").unwrap();
        assert_eq!(samples.len(), 1319);
        assert!(samples.iter().all(|s| final_number(s.reference.as_deref().unwrap()).is_some()));
    }
}
