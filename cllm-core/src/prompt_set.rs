//! Prompt sets: JSONL rows of prompts with what a task needs to score the answers.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::chat_template::Message;
use crate::{Error, Result, atomic_file};

/// A prompt: plain text, or a conversation for the model's chat template.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Prompt {
    /// `prompt`: text as it is.
    #[serde(rename = "prompt")]
    Text(String),
    /// `messages`: a conversation.
    #[serde(rename = "messages")]
    Messages(Vec<Message>),
}

impl Prompt {
    /// A conversation of one question.
    pub fn question(content: impl Into<String>) -> Self {
        Prompt::Messages(vec![Message { role: "user".to_owned(), content: content.into() }])
    }
}

/// One row of a prompt set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Stable, unique in the set.
    pub id: String,
    /// Benchmark and split, such as `gsm8k/train`.
    pub source: String,
    /// `prompt` or `messages`.
    #[serde(flatten)]
    pub prompt: Prompt,
    /// The data set's own answer; the target of supervised fine-tuning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// What the task needs to score an answer, such as `db_id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<Value>,
}

/// Reads a prompt set in JSONL.
///
/// # Errors
/// Names file and line of a bad row, and a doubled id.
pub fn read(path: &Path) -> Result<Vec<Sample>> {
    let samples: Vec<Sample> = read_rows(path)?;
    let mut ids = HashSet::new();
    for (row, sample) in samples.iter().enumerate() {
        if !ids.insert(sample.id.as_str()) {
            return Err(Error::file(path, format!("row {}: id `{}` occurs twice", row + 1, sample.id)));
        }
    }
    Ok(samples)
}

/// Writes a prompt set in JSONL.
///
/// # Errors
/// File-system errors.
pub fn write(path: &Path, samples: &[Sample]) -> Result<()> {
    atomic_file::write_with(path, |file| {
        for sample in samples {
            let line = serde_json::to_string(sample).map_err(|error| Error::file(path, error.to_string()))?;
            writeln!(file, "{line}").map_err(Error::write(path))?;
        }
        Ok(())
    })
}

/// The rows of a JSONL file; empty lines are skipped.
///
/// # Errors
/// Names file and line of a row that does not fit `T`.
pub fn read_rows<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut rows = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(Error::io(path))?;
        if !line.trim().is_empty() {
            let row = serde_json::from_str(&line)
                .map_err(|error| Error::file(path, format!("line {}: {error}", number + 1)))?;
            rows.push(row);
        }
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_survive_a_round_trip_and_bad_ones_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prompts.jsonl");
        let sample = |id: &str, prompt| Sample {
            id: id.into(),
            source: "jsonl/test".into(),
            prompt,
            reference: Some("4".into()),
            meta: None,
        };
        let samples = [sample("a", Prompt::Text("2+2=".into())), sample("b", Prompt::question("2+2?"))];
        write(&path, &samples).unwrap();
        assert_eq!(read(&path).unwrap(), samples);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}{}", text.lines().next().unwrap())).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("`a` occurs twice"));
        std::fs::write(&path, format!("{text}{{\"id\": 1}}\n")).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("line 3"));
    }
}
