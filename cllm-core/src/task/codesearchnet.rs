//! CodeSearchNet (Python): write a function from its docstring. Its functions have no tests, so
//! that answers are compared with the reference but not scored.
//!
//! ```text
//! row     {"func_name": "area", "docstring": "The area of a circle.",
//!          "code": "def area(r): return 3.14 * r * r"}
//! prompt  Write the Python function `area` from its docstring. Answer with code only.
//!
//!         The area of a circle.
//! target  def area(r): return 3.14 * r * r
//! score   none
//! ```
//!
//! The data: <https://github.com/github/CodeSearchNet>.

use std::path::Path;

use serde::Deserialize;

use crate::prompt_set::{Prompt, Sample, dataset_file};
use crate::{Error, Result, fingerprint};

/// In a file without splits, one in this many functions belongs to `test`.
const TEST_INTERVAL: u64 = 10;

/// A row of CodeSearchNet's own files, of its Hugging Face form, or of a data set derived from
/// them.
#[derive(Deserialize)]
struct Row {
    #[serde(alias = "func_documentation_string")]
    docstring: String,
    func_name: String,
    whole_func_string: Option<String>,
    #[serde(alias = "func_code_string")]
    code: Option<String>,
    #[serde(alias = "split_name")]
    partition: Option<String>,
}

/// Reads the functions of a split. Rows of `python.jsonl` that name no split are split by a hash of
/// their code.
pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    if !["train", "validation", "valid", "test"].contains(&split) {
        return Err(Error::usage(format!("codesearchnet has the splits train, validation and test, not `{split}`")));
    }
    let of_split = [split.to_owned(), format!("python/{split}"), format!("data/{split}")];
    let stems = ["python", &of_split[0], &of_split[1], &of_split[2]];
    let rows: Vec<Row> = dataset_file::read(data, &stems)?;
    let holds_all_splits = data.is_file()
        || ["jsonl", "jsonl.gz", "json", "parquet"]
            .iter()
            .any(|ending| data.join(format!("python.{ending}")).is_file());
    let mut samples = Vec::new();
    for (index, row) in rows.into_iter().enumerate() {
        let Some(code) = row.whole_func_string.or(row.code) else {
            let expected = "expected the function as `code`, `whole_func_string` or `func_code_string`";
            return Err(Error::file(data, format!("row {} of {split}: {expected}", index + 1)));
        };
        let row_split = row.partition.as_deref().unwrap_or(if holds_all_splits { split_by_hash(&code) } else { split });
        if row_split.starts_with("valid") && split.starts_with("valid") || row_split == split {
            samples.push(sample(index, split, &row.func_name, &row.docstring, &code));
        }
    }
    Ok(samples)
}

/// The same code is always in the same split, so that no function is both trained on and tested on.
fn split_by_hash(code: &str) -> &'static str {
    if fingerprint::derive_seed(0, code).is_multiple_of(TEST_INTERVAL) { "test" } else { "train" }
}

fn sample(index: usize, split: &str, name: &str, docstring: &str, code: &str) -> Sample {
    Sample {
        id: format!("codesearchnet-{index}"),
        source: format!("codesearchnet/{split}"),
        prompt: Prompt::question(format!(
            "Write the Python function `{name}` from its docstring. Answer with code only.\n\n{}",
            docstring.trim()
        )),
        reference: Some(code.trim().to_owned()),
        meta: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_every_form_load_and_splits_are_disjoint() {
        let dir = tempfile::tempdir().unwrap();
        let row =
            |index: usize| format!(r#"{{"func_name": "f{index}", "docstring": "D", "code": "def f{index}(): pass"}}"#);
        std::fs::write(dir.path().join("python.jsonl"), (0..200).map(row).collect::<Vec<_>>().join("\n")).unwrap();
        let ids =
            |split: &str| load(dir.path(), split).unwrap().into_iter().map(|sample| sample.id).collect::<Vec<_>>();
        let (train, test) = (ids("train"), ids("test"));
        assert_eq!(train.len() + test.len(), 200);
        assert!((5..40).contains(&test.len()) && train.iter().all(|id| !test.contains(id)), "{}", test.len());
        assert!(load(dir.path(), "dev").is_err());
        // A row that names its split belongs to it, and the whole function is preferred to its
        // code.
        let path = dir.path().join("other.jsonl");
        let row = r#"{"func_name": "f", "func_documentation_string": "D", "func_code_string": "pass",
            "whole_func_string": "def f(): pass", "split_name": "test"}"#;
        std::fs::write(&path, row.replace('\n', " ")).unwrap();
        assert_eq!(load(&path, "test").unwrap()[0].reference.as_deref(), Some("def f(): pass"));
        assert!(load(&path, "train").unwrap().is_empty());
        std::fs::write(&path, r#"{"func_name": "f", "docstring": "D"}"#).unwrap();
        let error = load(&path, "test").unwrap_err().to_string();
        assert!(error.contains("row 1") && error.contains("func_code_string"), "{error}");
    }

    mod needs_data {
        use super::*;

        #[test]
        #[ignore = "needs the benchmarks' data: scripts/test --data DIR"]
        fn the_published_file_loads() {
            let data = cllm_testing::benchmark_data("code_search_net");
            let num_samples = |split: &str| load(&data, split).unwrap().len();
            assert_eq!(num_samples("train") + num_samples("test"), 6226);
        }
    }
}
