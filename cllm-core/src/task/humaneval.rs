//! HumanEval: complete a Python function, scored by running the data set's tests.
//!
//! ```text
//! row     {"task_id": "HumanEval/0", "entry_point": "add",
//!          "prompt": "def add(a, b):\n    \"Add.\"\n", "canonical_solution": "    return a + b\n",
//!          "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n"}
//! prompt  Complete this Python function. Answer with code only.
//!
//!         def add(a, b):
//!             "Add."
//! target  def add(a, b):
//!             "Add."
//!             return a + b
//! score   prompt + answer + test + "check(add)" runs to its end in the sandbox
//! ```
//!
//! The official evaluator, whose program this is:
//! <https://github.com/openai/human-eval/blob/master/human_eval/execution.py>.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::python::{self, Problem};
use super::verdict::Verdict;
use crate::prompt_set::{Prompt, Sample, dataset_file};
use crate::sandbox::Sandbox;
use crate::{Error, Result};

#[derive(Deserialize)]
struct Row {
    task_id: String,
    prompt: String,
    entry_point: String,
    canonical_solution: String,
    test: String,
}

/// The fields of a row that scoring needs; they are the sample's `meta`.
#[derive(Serialize, Deserialize)]
pub(super) struct Tests {
    task_id: String,
    /// Imports, helper functions, and the head of the function.
    prompt: String,
    /// Name of the function.
    entry_point: String,
    /// Python code that defines `check(candidate)`.
    test: String,
}

pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    if split != "test" {
        return Err(Error::usage(format!("humaneval has only the split test, not `{split}`")));
    }
    let rows: Vec<Row> = dataset_file::read(data, &["HumanEval", "test", "openai_humaneval/test"])?;
    let sample = |row: Row| Sample {
        id: row.task_id.clone(),
        source: "humaneval/test".to_owned(),
        prompt: Prompt::question(format!("Complete this Python function. Answer with code only.\n\n{}", row.prompt)),
        reference: Some(format!("{}{}", row.prompt, row.canonical_solution)),
        meta: Some(json!(Tests {
            task_id: row.task_id,
            prompt: row.prompt,
            entry_point: row.entry_point,
            test: row.test,
        })),
    };
    Ok(rows.into_iter().map(sample).collect())
}

/// Runs the answer with its tests. It continues the prompt or defines the whole function, which
/// then replaces that of the prompt but keeps the imports and helpers beside it.
pub(super) fn score(sandbox: &Sandbox, sample: &Sample, answer: &str) -> Result<Verdict> {
    let Tests { prompt, entry_point, test, .. } = python::read_meta(sample)?;
    let tests = format!("{test}\ncheck({entry_point})");
    python::score(sandbox, Problem { prompt: &prompt, entry_point: Some(&entry_point), tests: &tests }, answer)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn missing_columns_are_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("HumanEval.jsonl"), "{\"task_id\": \"a\"}\n").unwrap();
        let error = load(dir.path(), "test").unwrap_err().to_string();
        assert!(error.contains("line 1") && error.contains("prompt"), "{error}");
        assert!(load(dir.path(), "train").is_err());
    }

    #[test]
    fn the_compressed_file_of_the_release_loads_and_a_truncated_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("HumanEval.jsonl.gz");
        let row = r#"{"task_id": "HumanEval/0", "prompt": "def one():\n", "entry_point": "one",
            "canonical_solution": "    return 1\n", "test": "assert one() == 1"}"#
            .replace('\n', " ");
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(row.as_bytes()).unwrap();
        let compressed = encoder.finish().unwrap();
        std::fs::write(&path, &compressed).unwrap();
        for data in [dir.path(), &path] {
            let samples = load(data, "test").unwrap();
            assert_eq!(samples[0].reference.as_deref(), Some("def one():\n    return 1\n"));
            let tests: Tests = python::read_meta(&samples[0]).unwrap();
            assert_eq!((tests.entry_point.as_str(), tests.test.as_str()), ("one", "assert one() == 1"));
        }
        std::fs::write(&path, &compressed[..compressed.len() / 2]).unwrap();
        let error = load(dir.path(), "test").unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("not a complete gzip file"), "{error}");
    }

    mod needs_data {
        use super::*;

        #[test]
        #[ignore = "needs the benchmarks' data: scripts/test --data DIR"]
        fn the_published_file_loads() {
            assert_eq!(load(&cllm_testing::benchmark_data("humaneval"), "test").unwrap().len(), 164);
        }
    }
}
