//! MBPP: small Python tasks (the full or the sanitized set), scored by running the data set's
//! assertions.
//!
//! ```text
//! row     {"task_id": 11, "text": "Write a function to add two numbers.",
//!          "code": "def add(a, b): return a + b", "test_list": ["assert add(1, 2) == 3"]}
//! prompt  Write a function to add two numbers. Answer with Python code only. It must pass these
//!         tests:
//!
//!         assert add(1, 2) == 3
//! target  def add(a, b): return a + b
//! score   answer + assertions run to their end in the sandbox
//! ```
//!
//! The data and its evaluation:
//! <https://github.com/google-research/google-research/tree/master/mbpp>.

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
    task_id: u32,
    /// Called `text` in the full set.
    #[serde(alias = "text")]
    prompt: String,
    code: String,
    test_list: Vec<String>,
    #[serde(default)]
    test_imports: Vec<String>,
    #[serde(default)]
    test_setup_code: String,
}

/// The fields of a row that scoring needs; they are the sample's `meta`.
#[derive(Serialize, Deserialize)]
pub(super) struct Tests {
    task_id: u32,
    /// Assertions, one a line.
    test_list: Vec<String>,
    #[serde(default)]
    test_imports: Vec<String>,
    /// Objects that the assertions use, made of classes that the answer defines.
    #[serde(default)]
    test_setup_code: String,
}

pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    // The published files hold all splits; the paper defines them by task id.
    let ids = match split {
        "test" => 11..=510,
        "validation" => 511..=600,
        "train" => 601..=974,
        "prompt" => 1..=10,
        other => {
            let splits = "train, validation, test and prompt";
            return Err(Error::usage(format!("mbpp has the splits {splits}, not `{other}`")));
        }
    };
    let (plain, sanitized, full) = (split.to_owned(), format!("sanitized/{split}"), format!("full/{split}"));
    let rows: Vec<Row> = dataset_file::read(data, &["sanitized-mbpp", "mbpp", &plain, &sanitized, &full])?;
    let sample = |row: Row| Sample {
        id: format!("mbpp-{}", row.task_id),
        source: format!("mbpp/{split}"),
        prompt: Prompt::question(format!(
            "{} Answer with Python code only. It must pass these tests:\n\n{}",
            row.prompt.trim(),
            row.test_list.join("\n")
        )),
        reference: Some(row.code.trim().to_owned()),
        meta: Some(json!(Tests {
            task_id: row.task_id,
            test_list: row.test_list,
            test_imports: row.test_imports,
            test_setup_code: row.test_setup_code,
        })),
    };
    Ok(rows.into_iter().filter(|row| ids.contains(&row.task_id)).map(sample).collect())
}

/// Runs the answer with its tests.
pub(super) fn score(sandbox: &Sandbox, sample: &Sample, answer: &str) -> Result<Verdict> {
    let tests = python::read_meta::<Tests>(sample)?.program();
    python::score(sandbox, Problem { prompt: "", entry_point: None, tests: &tests }, answer)
}

impl Tests {
    /// What runs after the answer.
    fn program(&self) -> String {
        let setup = std::iter::once(&self.test_setup_code);
        let lines = self.test_imports.iter().chain(setup).chain(&self.test_list);
        lines.map(String::as_str).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_task_id_decides_the_split() {
        let dir = tempfile::tempdir().unwrap();
        let row =
            |id: u32| format!("{{\"task_id\": {id}, \"text\": \"T\", \"code\": \"c\", \"test_list\": [\"t\"]}}\n");
        std::fs::write(dir.path().join("mbpp.jsonl"), [10, 11, 510, 601].map(row).concat()).unwrap();
        for (split, count) in [("prompt", 1), ("test", 2), ("validation", 0), ("train", 1)] {
            assert_eq!(load(dir.path(), split).unwrap().len(), count, "{split}");
        }
        assert!(load(dir.path(), "dev").is_err());
    }

    #[test]
    fn assertions_follow_their_imports_and_setup() {
        let dir = tempfile::tempdir().unwrap();
        let row = json!({ "task_id": 11, "text": "T", "code": "c", "test_list": ["assert a", "assert b"],
            "test_imports": ["import math"], "test_setup_code": "a = Node(1)\r\nb = a", "challenge_test_list": ["c"] });
        std::fs::write(dir.path().join("mbpp.jsonl"), row.to_string()).unwrap();
        let sample = &load(dir.path(), "test").unwrap()[0];
        let tests: Tests = python::read_meta(sample).unwrap();
        assert_eq!(tests.program(), "import math\na = Node(1)\r\nb = a\nassert a\nassert b");
        // Prompt sets made before there was a setup have none.
        let tests: Tests = serde_json::from_value(json!({ "task_id": 1, "test_list": ["assert a"] })).unwrap();
        assert_eq!(tests.program(), "\nassert a");
    }

    mod needs_data {
        use super::*;

        #[test]
        #[ignore = "needs the benchmarks' data: scripts/test --data DIR"]
        fn the_published_file_loads() {
            let path = cllm_testing::benchmark_data("mbpp/sanitized-mbpp-100.json");
            assert!(!load(&path, "test").unwrap().is_empty());
        }
    }
}
