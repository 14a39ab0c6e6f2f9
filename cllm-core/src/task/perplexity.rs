//! Perplexity: the models read texts; nothing is asked and nothing is answered.
//!
//! ```text
//! row     {"text": "Once upon a time ..."}    or a .txt file
//! prompt  Once upon a time ...
//! target  none
//! score   none; `cllm-eval run` reports the perplexity of the text under each model
//! ```

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::prompt_set::{Prompt, Sample, dataset_file};
use crate::{Error, Result, text_file};

#[derive(Deserialize)]
struct Row {
    text: String,
}

/// Reads the texts of a file, or of all files in a folder in the order of their names. A `.txt`
/// file is one text; other files have one in each row.
pub(super) fn load(data: &Path, split: &str) -> Result<Vec<Sample>> {
    let files = if data.is_dir() { list_files(data)? } else { vec![data.to_owned()] };
    let row_files = ["jsonl", "json", "gz", "parquet"];
    let mut texts = Vec::new();
    for file in &files {
        let has_rows = row_files.iter().any(|known| file.extension().is_some_and(|ending| ending == *known));
        if is_text(file) {
            texts.push(text_file::read(file)?);
        } else if file.exists() && !has_rows {
            return Err(Error::file(file, "expected a .txt file, or a .jsonl file with `text`: rename it accordingly"));
        } else {
            texts.extend(dataset_file::read_file::<Row>(file)?.into_iter().map(|row| row.text));
        }
    }
    let sample = |(index, text)| Sample {
        id: format!("text-{}", index + 1),
        source: format!("perplexity/{split}"),
        prompt: Prompt::Text(text),
        reference: None,
        meta: None,
    };
    Ok(texts.into_iter().enumerate().map(sample).collect())
}

fn is_text(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "txt")
}

fn list_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let is_wanted = |path: &PathBuf| is_text(path) || path.extension().is_some_and(|ending| ending == "jsonl");
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_wanted).collect();
    files.sort();
    if files.is_empty() {
        return Err(Error::file(folder, "expected .txt files, or .jsonl files with `text`; found none"));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_from_a_file_or_a_folder() {
        let dir = tempfile::tempdir().unwrap();
        assert!(load(dir.path(), "test").unwrap_err().to_string().contains(".txt"));
        let (rows, text) = (dir.path().join("a.jsonl"), dir.path().join("b.txt"));
        std::fs::write(&rows, "{\"text\": \"One.\"}\n{\"text\": \"Two.\", \"more\": 1}\n").unwrap();
        std::fs::write(&text, "Three.\n").unwrap();
        let prompts =
            |data: &Path| load(data, "test").unwrap().into_iter().map(|sample| sample.prompt).collect::<Vec<_>>();
        let plain = |text: &str| Prompt::Text(text.to_owned());
        assert_eq!(prompts(dir.path()), [plain("One."), plain("Two."), plain("Three.\n")]);
        assert_eq!(prompts(&text), [plain("Three.\n")]);
        let page = dir.path().join("c.md");
        std::fs::write(&page, "Four.").unwrap();
        assert!(load(&page, "test").unwrap_err().to_string().contains("c.md: expected a .txt file"));
        assert_eq!(prompts(dir.path()).len(), 3);
        assert_eq!(load(&dir.path().join("d"), "test").unwrap_err().exit_code(), 2);
        std::fs::write(&rows, "{\"txt\": \"One.\"}\n").unwrap();
        assert!(load(&rows, "test").unwrap_err().to_string().contains("line 1"));
    }
}
