//! GSM8K: grade-school word problems, scored by the final number.
//!
//! ```text
//! row     {"question": "Tom has 3 pens and buys 4. How many has he now?",
//!          "answer": "He has 3 + 4 = <<3+4=7>>7 pens.\n#### 7"}
//! prompt  Tom has 3 pens and buys 4. How many has he now?
//! target  He has 3 + 4 = 7 pens.
//!         #### 7
//! score   the number in the last box or after the last `####` of the answer, or else its last
//!         number, equals 7
//! strict  what follows the first `#### ` of the answer is the text 7
//! ```
//!
//! `strict` is the official extraction (`extract_answer` in
//! <https://github.com/openai/grade-school-math/blob/master/grade_school_math/dataset.py>): it
//! accepts an answer with `#### ` only, and compares texts without commas. Models that were not
//! trained on this format end with the number alone or in a box, and a model that corrects itself
//! writes a second `####`, so accuracy counts these too.

use std::path::Path;
use std::sync::LazyLock;

use regex::Regex;
use serde::Deserialize;

use super::number::same_final_number;
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
/// The official `ANS_RE`.
static OFFICIAL: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"#### (-?[0-9.,]+)").expect("the pattern is valid"));

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

/// Scores by the final number, and by the official extraction beside it.
pub(super) fn score(reference: &str, answer: &str) -> Score {
    let verdict = Verdict::from_correct(same_final_number(reference, answer));
    let official = official_number(reference)
        .map_or(Verdict::Unscored, |expected| Verdict::from_correct(official_number(answer) == Some(expected)));
    Score::with_alternative(verdict, Metric::Strict, official)
}

/// What the official `extract_answer` returns: the text after the first `#### `, without commas.
fn official_number(text: &str) -> Option<String> {
    OFFICIAL.captures(text).map(|found| found[1].replace(',', ""))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ways in which an answer of the fixture writes a number.
    fn spelled(template: &str, number: u64) -> String {
        let digits = number.to_string();
        let grouped = |mark: &str| {
            let groups = digits.as_bytes().rchunks(3).rev().map(|group| String::from_utf8_lossy(group));
            groups.collect::<Vec<_>>().join(mark)
        };
        let devanagari = digits.bytes().filter_map(|digit| char::from_u32(0x966 + u32::from(digit - b'0')));
        template
            .replace("{,}", &grouped(","))
            .replace("{_}", &grouped(" "))
            .replace("{tex}", &grouped("{,}"))
            .replace("{thin}", &grouped(r"\,"))
            .replace("{nnbsp}", &grouped("\u{202f}"))
            .replace("{deva}", &devanagari.collect::<String>())
            .replace("{wrong}", &digits.split("").filter(|digit| !digit.is_empty()).collect::<Vec<_>>().join(","))
            .replace("{n}", &digits)
    }

    /// Ten answers of each kind in the fixture. Where the two rules differ, the fixture says why.
    #[test]
    fn every_kind_of_answer_has_its_verdict_by_both_rules() {
        #[derive(Deserialize)]
        struct Kind {
            kind: String,
            answer: String,
            numbers: Option<String>,
            correct: bool,
            strict: bool,
            why: Option<String>,
        }
        let small = [2, 5, 18, 25, 72, 104, 366, 540, 990, 999];
        let thousands = [1000, 1200, 2125, 9500, 10_000, 18_000, 95_200, 114_200, 276_000, 1_234_567];
        let mut num_answers = 0;
        for line in include_str!("../../tests/fixtures/text/number-answers.jsonl").lines() {
            let Kind { kind, answer, numbers, correct, strict, why } = serde_json::from_str(line).unwrap();
            assert_eq!(why.is_some(), correct != strict, "{kind}");
            let numbers = match numbers.as_deref() {
                None => [&small[..5], &thousands[..5]].concat(),
                Some("small") => small.to_vec(),
                Some(_) => thousands.to_vec(),
            };
            for number in numbers {
                let answer = spelled(&answer, number);
                let score = score(&format!("It is {number}.\n#### {number}"), &answer);
                let verdicts = (score.verdict, score.alternative.unwrap().verdict);
                let expected = (Verdict::from_correct(correct), Verdict::from_correct(strict));
                assert_eq!(verdicts, expected, "{kind}: {answer}, reference {number}");
                num_answers += 1;
            }
        }
        assert!(num_answers >= 500, "{num_answers}");
    }

    #[test]
    fn a_reference_without_the_official_mark_is_unscored_by_the_official_rule() {
        let score = score("18", "#### 18");
        assert_eq!((score.verdict, score.alternative.unwrap().verdict), (Verdict::Correct, Verdict::Unscored));
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
            let references = samples.iter().filter_map(|sample| sample.reference.as_deref());
            assert!(references.into_iter().all(|reference| same_final_number(reference, reference)));
        }
    }

    mod needs_solutions {
        use super::*;

        #[derive(Deserialize)]
        struct Solution {
            is_correct: bool,
            solution: String,
        }

        /// Solutions that models of the benchmark's authors wrote, with the official verdicts. They
        /// end with `A: 18`.
        #[test]
        #[ignore = "needs the recorded solutions of grade-school-math: put its example_model_solutions.jsonl into DIR/gsm8k and \
                    run CLLM_DATA=DIR cargo test --workspace --lib -- --ignored needs_solutions"]
        fn recorded_solutions_keep_their_official_verdicts() {
            let path = cllm_testing::benchmark_data("gsm8k/example_model_solutions.jsonl");
            let text = std::fs::read_to_string(path).unwrap();
            let (mut differing, mut num_solutions) = (Vec::new(), 0);
            for line in text.lines() {
                let row: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line).unwrap();
                let reference = row["ground_truth"].as_str().unwrap();
                for solution in row.values().filter(|value| value.is_object()) {
                    let Solution { is_correct: official, solution } = serde_json::from_value(solution.clone()).unwrap();
                    num_solutions += 1;
                    if same_final_number(reference, &solution) != official {
                        differing.push((reference.to_owned(), solution, official));
                    }
                }
            }
            assert_eq!((num_solutions, differing.len()), (5276, 0), "{differing:#?}");
        }
    }
}
