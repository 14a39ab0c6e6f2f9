//! CodeSearchNet, Python: a docstring, and the function that it was written for. Its functions have no tests, so there is no
//! right and wrong.

use std::path::Path;

use serde::Deserialize;

use crate::prompt_set::dataset_file;
use crate::prompt_set::{Prompt, Sample};
use crate::{Error, Result, fingerprint};

/// One in so many functions of a file without splits is of `test`.
const TEST_SHARE: u64 = 10;

/// A row of CodeSearchNet's own files, of its Hugging Face form, or of what was made from them.
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

/// Functions of `python.jsonl` that name no split of their own are split by a hash of the code: every tenth is `test`, the
/// others are `train`.
pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    if !["train", "validation", "valid", "test"].contains(&split) {
        return Err(Error::usage(format!("codesearchnet has the splits train, validation and test, not `{split}`")));
    }
    let of_split = [split.to_owned(), format!("python/{split}"), format!("data/{split}")];
    let stems = ["python", &of_split[0], &of_split[1], &of_split[2]];
    let rows: Vec<Row> = dataset_file::read(data, &stems)?;
    let whole = data.is_file()
        || ["jsonl", "jsonl.gz", "json", "parquet"]
            .iter()
            .any(|ending| data.join(format!("python.{ending}")).is_file());
    let mut samples = Vec::new();
    for (index, row) in rows.into_iter().enumerate() {
        let Some(code) = row.whole_func_string.or(row.code) else {
            let wanted = "expected the function as `code`, `whole_func_string` or `func_code_string`";
            return Err(Error::file(data, format!("row {} of {split}: {wanted}", index + 1)));
        };
        let of = row.partition.as_deref().unwrap_or(if whole { drawn(&code) } else { split });
        if of.starts_with("valid") && split.starts_with("valid") || of == split {
            samples.push(sample(index, split, &row.func_name, &row.docstring, &code));
        }
    }
    Ok(samples)
}

/// The same code is always of the same split, so that none is learnt from and tested on.
fn drawn(code: &str) -> &'static str {
    if fingerprint::derive_seed(0, code).is_multiple_of(TEST_SHARE) { "test" } else { "train" }
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
        // What says its split is in that one, and the whole function is preferred to its code.
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

    #[test]
    fn the_real_file_loads() {
        let Some(data) = std::env::var_os("CLLM_DATA") else {
            println!("skipped: CLLM_DATA is not set");
            return;
        };
        let count = |split: &str| load(&Path::new(&data).join("code_search_net"), split).unwrap().len();
        assert_eq!(count("train") + count("test"), 6226);
    }
}
