//! MBPP: small Python tasks with tests, the full or the sanitized set. Its code is not executed here, so answers stay
//! unscored.

use std::path::Path;

use serde::Deserialize;
use serde_json::json;

use crate::prompt_set::{Prompt, Sample};
use crate::{Error, Result, rows};

#[derive(Deserialize)]
struct Row {
    task_id: u32,
    /// `text` in the full set.
    #[serde(alias = "text")]
    prompt: String,
    code: String,
    test_list: Vec<String>,
    #[serde(default)]
    test_imports: Vec<String>,
}

pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    // The published files hold all splits; the paper tells them apart by task id.
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
    let rows: Vec<Row> = rows::read(data, &["sanitized-mbpp", "mbpp", &plain, &sanitized, &full])?;
    let sample = |row: Row| Sample {
        id: format!("mbpp-{}", row.task_id),
        source: format!("mbpp/{split}"),
        prompt: Prompt::question(format!(
            "{} Answer with Python code only. It must pass these tests:\n\n{}",
            row.prompt.trim(),
            row.test_list.join("\n")
        )),
        reference: Some(row.code.trim().to_owned()),
        meta: Some(json!({ "task_id": row.task_id, "test_list": row.test_list, "test_imports": row.test_imports })),
    };
    Ok(rows.into_iter().filter(|row| ids.contains(&row.task_id)).map(sample).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_are_told_apart_by_id() {
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
    fn the_real_file_loads() {
        let Some(data) = std::env::var_os("CLLM_DATA") else {
            println!("skipped: CLLM_DATA is not set");
            return;
        };
        let path = Path::new(&data).join("mbpp/sanitized-mbpp-100.json");
        assert!(!load(&path, "test").unwrap().is_empty());
    }
}
