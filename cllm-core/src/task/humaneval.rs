//! HumanEval: the head of a Python function to complete, scored by running it with the data set's tests.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{Verdict, python};
use crate::prompt_set::dataset_file;
use crate::prompt_set::{Prompt, Sample};
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

/// What scoring needs of a row.
#[derive(Serialize, Deserialize)]
pub(super) struct Tests {
    task_id: String,
    /// The head of the function, with what stands before it.
    prompt: String,
    entry_point: String,
    /// Defines `check(candidate)`.
    test: String,
}

pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    if split != "test" {
        return Err(Error::usage(format!("humaneval has the split test only, not `{split}`")));
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

/// Runs the answer with its tests.
pub(super) fn score(sandbox: &Sandbox, sample: &Sample, answer: &str) -> Result<Verdict> {
    python::verdict(sandbox, &python::meta::<Tests>(sample)?.program(answer))
}

impl Tests {
    /// The program of the official evaluator. A chat model answers with the whole function, which then stands in place of
    /// the prompt's own, behind the imports and helpers before that; any other answer goes on where the prompt ends.
    fn program(&self, answer: &str) -> String {
        let Tests { prompt, entry_point, test, .. } = self;
        let code = python::extract_code(answer, |block| python::definition(block, entry_point).is_some());
        let before = match python::definition(code, entry_point) {
            Some(_) => &prompt[..python::definition(prompt, entry_point).unwrap_or(0)],
            None => prompt,
        };
        format!("{before}{code}\n{test}\ncheck({entry_point})")
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn wrong_columns_are_named() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("HumanEval.jsonl"), "{\"task_id\": \"a\"}\n").unwrap();
        let error = load(dir.path(), "test").unwrap_err().to_string();
        assert!(error.contains("line 1") && error.contains("prompt"), "{error}");
        assert!(load(dir.path(), "train").is_err());
    }

    #[test]
    fn the_packed_file_of_the_release_loads_and_a_cut_one_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("HumanEval.jsonl.gz");
        let row = r#"{"task_id": "HumanEval/0", "prompt": "def one():\n", "entry_point": "one",
            "canonical_solution": "    return 1\n", "test": "assert one() == 1"}"#
            .replace('\n', " ");
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        packer.write_all(row.as_bytes()).unwrap();
        let packed = packer.finish().unwrap();
        std::fs::write(&path, &packed).unwrap();
        for data in [dir.path(), &path] {
            let samples = load(data, "test").unwrap();
            assert_eq!(samples[0].reference.as_deref(), Some("def one():\n    return 1\n"));
            let tests: Tests = python::meta(&samples[0]).unwrap();
            assert_eq!(tests.program("    return 1\n"), "def one():\n    return 1\n\nassert one() == 1\ncheck(one)");
        }
        std::fs::write(&path, &packed[..packed.len() / 2]).unwrap();
        let error = load(dir.path(), "test").unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("not a complete gzip file"), "{error}");
    }

    #[test]
    fn an_answer_is_the_whole_function_or_goes_on_with_it() {
        let tests = Tests {
            task_id: "a".into(),
            prompt: "import math\n\ndef help(): pass\n\ndef f(x):\n".into(),
            entry_point: "f".into(),
            test: "T".into(),
        };
        for (answer, program) in [
            ("    return x\n", "import math\n\ndef help(): pass\n\ndef f(x):\n    return x\n\nT\ncheck(f)"),
            (
                "```python\n    return x\n```",
                "import math\n\ndef help(): pass\n\ndef f(x):\n    return x\n\nT\ncheck(f)",
            ),
            (
                "So:\n```python\ndef f(y): return y\n```",
                "import math\n\ndef help(): pass\n\ndef f(y): return y\n\nT\ncheck(f)",
            ),
            ("def f(y): return y", "import math\n\ndef help(): pass\n\ndef f(y): return y\nT\ncheck(f)"),
        ] {
            assert_eq!(tests.program(answer), program, "{answer}");
        }
    }

    #[test]
    fn the_real_file_loads() {
        let Some(data) = std::env::var_os("CLLM_DATA") else {
            println!("skipped: CLLM_DATA is not set");
            return;
        };
        assert_eq!(load(&Path::new(&data).join("humaneval"), "test").unwrap().len(), 164);
    }
}
