//! HumanEval: the head of a Python function to complete. Its code is not executed here, so answers stay unscored.

use std::path::Path;

use serde::Deserialize;
use serde_json::json;

use crate::prompt_set::{Prompt, Sample};
use crate::{Error, Result, rows};

#[derive(Deserialize)]
struct Row {
    task_id: String,
    prompt: String,
    entry_point: String,
    canonical_solution: String,
    test: String,
}

pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    if split != "test" {
        return Err(Error::usage(format!("humaneval has the split test only, not `{split}`")));
    }
    let rows: Vec<Row> = rows::read(data, &["HumanEval", "test", "openai_humaneval/test"])?;
    let sample = |row: Row| Sample {
        id: row.task_id.clone(),
        source: "humaneval/test".to_owned(),
        prompt: Prompt::question(format!("Complete this Python function. Answer with code only.\n\n{}", row.prompt)),
        reference: Some(format!("{}{}", row.prompt, row.canonical_solution)),
        meta: Some(json!({ "task_id": row.task_id, "entry_point": row.entry_point, "test": row.test })),
    };
    Ok(rows.into_iter().map(sample).collect())
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
        }
        std::fs::write(&path, &packed[..packed.len() / 2]).unwrap();
        let error = load(dir.path(), "test").unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("no whole gzip file"), "{error}");
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
