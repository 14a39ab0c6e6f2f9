//! GSM8K: grade-school word problems, scored by the final number.
//!
//! ```text
//! row     {"question": "Tom has 3 pens and buys 4. How many has he now?",
//!          "answer": "He has 3 + 4 = <<3+4=7>>7 pens.\n#### 7"}
//! prompt  Tom has 3 pens and buys 4. How many has he now?
//! target  He has 3 + 4 = 7 pens.
//!         #### 7
//! score   the number after the last `####` of the answer, or else its last number, equals 7
//! ```
//!
//! The official normaliser (`extract_answer` in
//! <https://github.com/openai/grade-school-math/blob/master/grade_school_math/dataset.py>) accepts
//! an answer with `####` only, and compares texts. Models that were not trained on this format end
//! with the number alone, so it counts here too.

use std::path::Path;
use std::sync::LazyLock;

use regex::Regex;
use serde::Deserialize;

use super::verdict::{Metric, Score, Verdict};
use crate::Result;
use crate::prompt_set::{Prompt, Sample, dataset_file};

#[derive(Deserialize)]
struct Row {
    question: String,
    answer: String,
}

/// A calculator annotation: `<<3+4=7>>`.
static ANNOTATION: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"<<[^>]*>>").expect("the pattern is valid"));
static NUMBER: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+").expect("the pattern is valid"));

pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    let rows: Vec<Row> = dataset_file::read(data, &[split, &format!("main/{split}"), &format!("data/{split}")])?;
    Ok(rows.into_iter().enumerate().map(|(index, row)| sample(index, split, &row)).collect())
}

fn sample(index: usize, split: &str, row: &Row) -> Sample {
    Sample {
        id: format!("gsm8k-{split}-{index}"),
        source: format!("gsm8k/{split}"),
        prompt: Prompt::question(row.question.trim()),
        reference: Some(ANNOTATION.replace_all(&row.answer, "").trim().to_owned()),
        meta: None,
    }
}

/// The official extraction, without the check that its group holds a number.
static OFFICIAL: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"#### (-?[0-9.,]+)").expect("the pattern is valid"));

/// Scores by the final number, and by the official rule beside it.
pub(super) fn score(reference: &str, answer: &str) -> Score {
    let verdict = Verdict::from_correct(is_correct(reference, answer));
    let official = official_number(reference).is_some_and(|expected| official_number(answer) == Some(expected));
    Score::with_alternative(verdict, Metric::Strict, Verdict::from_correct(official))
}

/// What the official `extract_answer` returns: the text after the first `#### `, without commas.
fn official_number(text: &str) -> Option<String> {
    OFFICIAL.captures(text).map(|found| found[1].replace(',', ""))
}

/// Whether the final number of an answer equals the reference's.
pub(super) fn is_correct(reference: &str, answer: &str) -> bool {
    final_number(reference).is_some_and(|expected| final_number(answer) == Some(expected))
}

/// The first number after the last `####`, or else the last number.
pub(super) fn final_number(text: &str) -> Option<f64> {
    let marked = text.rsplit_once("####").and_then(|(_, after)| NUMBER.find(after));
    marked.or_else(|| NUMBER.find_iter(text).last()).and_then(|number| parse_number(number.as_str()))
}

/// Parses `1,000`, `$18.00`, `50%` or `7.`.
pub(super) fn parse_number(text: &str) -> Option<f64> {
    let plain: String = text.chars().filter(|c| !matches!(c, ',' | '$' | '%') && !c.is_whitespace()).collect();
    plain.trim_end_matches('.').parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_final_number_is_normalised() {
        for (text, number) in [
            ("so 3 * 4 = 12\n#### 12", Some(12.0)),
            ("#### 1,234", Some(1234.0)),
            ("The answer is $18.00.", Some(18.0)),
            ("It is -5", Some(-5.0)),
            ("#### 7 apples, not 8", Some(7.0)),
            ("none", None),
        ] {
            assert_eq!(final_number(text), number, "{text}");
        }
        assert!(is_correct("#### 18", "18.0") && !is_correct("#### 18", "") && !is_correct("#### 18", "#### 81"));
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

    mod needs_data {
        use super::*;

        #[test]
        #[ignore = "needs the benchmarks' data: scripts/test --data DIR"]
        fn the_published_files_load() {
            let samples = load(&cllm_testing::benchmark_data("gsm8k"), "test").unwrap();
            assert_eq!(samples.len(), 1319);
            assert!(samples.iter().all(|sample| final_number(sample.reference.as_deref().unwrap()).is_some()));
        }
    }
}
