//! Prompt sets: rows of prompts with what a task needs to score the answers, in JSONL or Parquet.

mod columns;
pub(crate) mod dataset_file;

use std::collections::HashSet;
use std::io::Write;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::chat_template::Message;
use crate::task::Task;
use crate::{Error, Result, atomic_file, interrupt};

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
#[serde(try_from = "Row")]
pub struct Sample {
    /// Stable, unique in the set.
    pub id: String,
    /// Benchmark and split, such as `gsm8k/train`.
    pub source: String,
    /// `prompt` or `messages`.
    #[serde(flatten)]
    pub prompt: Prompt,
    /// The data set's own answer; the target of supervised fine-tuning.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// What the task needs to score an answer, such as `db_id`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub meta: Option<Value>,
}

/// A row as others write it: little of it must be there, and what this toolkit has no name for is kept.
#[derive(Deserialize)]
struct Row {
    id: Option<Id>,
    source: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    reference: Option<String>,
    meta: Option<Value>,
    #[serde(flatten)]
    more: Map<String, Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Id {
    Text(String),
    Number(i64),
}

impl TryFrom<Row> for Sample {
    type Error = &'static str;

    fn try_from(row: Row) -> std::result::Result<Self, Self::Error> {
        Ok(Sample {
            id: match row.id {
                Some(Id::Text(id)) => id,
                Some(Id::Number(id)) => id.to_string(),
                None => return Err("missing field `id`: `cllm-data prepare jsonl` gives each row its own"),
            },
            source: row.source.unwrap_or_else(|| Task::Jsonl.name().to_owned()),
            prompt: match (row.prompt, row.messages) {
                (Some(text), None) => Prompt::Text(text),
                (None, Some(messages)) => Prompt::Messages(messages),
                (None, None) => return Err("missing field `prompt` or `messages`"),
                (Some(_), Some(_)) => return Err("`prompt` and `messages` are both there: keep the one to answer"),
            },
            reference: row.reference,
            meta: with_more(row.meta, row.more),
        })
    }
}

/// The fields that have no place of their own stand in `meta`, whose own win.
fn with_more(meta: Option<Value>, mut more: Map<String, Value>) -> Option<Value> {
    more.retain(|_, value| !value.is_null());
    match meta {
        meta if more.is_empty() => meta,
        Some(Value::Object(own)) => {
            more.extend(own);
            Some(more.into())
        }
        Some(other) => {
            more.insert("meta".to_owned(), other);
            Some(more.into())
        }
        None => Some(more.into()),
    }
}

/// Reads a prompt set: Parquet where the name ends in `.parquet`, a list where it ends in `.json`, else JSONL.
///
/// # Errors
/// Names file and line of a bad row, and a doubled id.
pub fn read(path: &Path) -> Result<Vec<Sample>> {
    distinct(path, read_rows(path)?)
}

/// Reads a prompt set whose rows may have no id: such a row gets one of its number, from 1.
///
/// # Errors
/// As [`read`].
pub fn read_with_generated_ids(path: &Path) -> Result<Vec<Sample>> {
    let numbered = |(index, mut row): (usize, Row)| {
        row.id.get_or_insert_with(|| Id::Text(format!("{}-{}", Task::Jsonl.name(), index + 1)));
        Sample::try_from(row).map_err(|message| Error::file(path, format!("row {}: {message}", index + 1)))
    };
    let samples = read_rows(path)?.into_iter().enumerate().map(numbered).collect::<Result<_>>()?;
    distinct(path, samples)
}

fn read_rows<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if path.is_dir() {
        let message = "is a folder: expected a prompt set, the JSONL or Parquet file that `cllm-data prepare` made";
        return Err(Error::file(path, message));
    }
    if dataset_file::is_parquet(path) { columns::read(path) } else { dataset_file::read_file(path) }
}

fn distinct(path: &Path, samples: Vec<Sample>) -> Result<Vec<Sample>> {
    let mut ids = HashSet::new();
    for (row, sample) in samples.iter().enumerate() {
        if !ids.insert(sample.id.as_str()) {
            return Err(Error::file(path, format!("row {}: id `{}` occurs twice", row + 1, sample.id)));
        }
    }
    Ok(samples)
}

/// Writes a prompt set: Parquet where the name ends in `.parquet`, else JSONL.
///
/// # Errors
/// File-system errors.
pub fn write(path: &Path, samples: &[Sample]) -> Result<()> {
    if dataset_file::is_parquet(path) {
        return columns::write(path, samples);
    }
    atomic_file::write_with(path, |file| {
        for sample in samples {
            interrupt::check()?;
            let line = serde_json::to_string(sample).map_err(|error| Error::file(path, error.to_string()))?;
            writeln!(file, "{line}").map_err(Error::write(path))?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, RecordBatch, StringArray, StructArray};
    use arrow::datatypes::{DataType, Field};
    use serde_json::json;

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
        let other = Sample {
            reference: None,
            meta: Some(json!({ "db_id": "zoo", "n": [1, 2.5] })),
            ..sample("c", Prompt::Messages(vec![]))
        };
        let samples = [sample("a", Prompt::Text("2+2=".into())), sample("b", Prompt::question("2+2?")), other];
        for path in [&path, &dir.path().join("prompts.parquet")] {
            write(path, &samples).unwrap();
            assert_eq!(read(path).unwrap(), samples);
        }
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}{}", text.lines().next().unwrap())).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("`a` occurs twice"));
        std::fs::write(&path, format!("{text}{{\"id\": 1}}\n")).unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("line 4"));
    }

    #[test]
    fn plain_rows_need_a_prompt_alone_and_lose_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plain.jsonl");
        let put = |rows: &[Value]| {
            std::fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
        };
        put(&[
            json!({ "id": "a", "prompt": "2+2=", "reference": "4", "level": 3, "meta": { "n": 1 }, "none": null }),
            json!({ "id": 7, "messages": [{ "role": "user", "content": "2+2?" }] }),
        ]);
        let found = read(&path).unwrap();
        assert_eq!((found[0].source.as_str(), found[1].id.as_str()), ("jsonl", "7"));
        assert_eq!((&found[0].meta, &found[1].meta), (&Some(json!({ "level": 3, "n": 1 })), &None));
        put(&[json!({ "prompt": "a" }), json!({ "id": "own", "prompt": "b" }), json!({ "prompt": "c" })]);
        let message = read(&path).unwrap_err().to_string();
        assert!(message.contains("line 1") && message.contains("`cllm-data prepare jsonl`"), "{message}");
        let ids: Vec<_> = read_with_generated_ids(&path).unwrap().into_iter().map(|sample| sample.id).collect();
        assert_eq!(ids, ["jsonl-1", "own", "jsonl-3"]);
        put(&[json!({ "id": "a", "prompt": "a", "messages": [] })]);
        assert!(read(&path).unwrap_err().to_string().contains("both there"));
        put(&[json!({ "prompt": "a" }), json!({ "answer": "b" })]);
        let message = read_with_generated_ids(&path).unwrap_err().to_string();
        assert!(message.contains("row 2") && message.contains("`prompt` or `messages`"), "{message}");
    }

    #[test]
    fn flipped_bits_in_parquet_are_an_error_or_other_text() {
        let dir = tempfile::tempdir().unwrap();
        let (good, bad) = (dir.path().join("good.parquet"), dir.path().join("bad.parquet"));
        let sample = |index: usize| Sample {
            id: format!("s{index}"),
            source: "jsonl/test".into(),
            prompt: Prompt::question(format!("{index}+1?")),
            reference: Some("4".into()),
            meta: None,
        };
        write(&good, &(0..40).map(sample).collect::<Vec<_>>()).unwrap();
        let bytes = std::fs::read(&good).unwrap();
        let mut refused = 0;
        for place in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[place] ^= 0x55;
            std::fs::write(&bad, &bytes).unwrap();
            refused += usize::from(read(&bad).is_err_and(|error| error.exit_code() == 2));
        }
        assert!(refused > 100, "{refused}");
    }

    #[test]
    fn parquet_of_other_tools_is_read_and_what_does_not_fit_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prompts.parquet");
        let text = |value: &str| -> ArrayRef { Arc::new(StringArray::from(vec![value])) };
        let put = |columns: Vec<(&str, ArrayRef)>| {
            let batch = RecordBatch::try_from_iter(columns).unwrap();
            let file = std::fs::File::create(&path).unwrap();
            let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
            writer.write(&batch).unwrap();
            writer.close().unwrap();
        };
        let plain = || vec![("id", text("a")), ("source", text("jsonl/x")), ("prompt", text("2+2="))];
        let name = Arc::new(Field::new("db_id", DataType::Utf8, true));
        let meta: ArrayRef = Arc::new(StructArray::from(vec![(name, text("zoo"))]));
        put([plain(), vec![("meta", meta), ("level", text("hard"))]].concat());
        assert_eq!(read(&path).unwrap()[0].meta, Some(json!({ "level": "hard", "db_id": "zoo" })));
        put([plain(), vec![("meta", text("{zoo"))]].concat());
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("prompts.parquet: row 1: meta") && error.contains("not JSON"), "{error}");
        put(plain().into_iter().take(2).collect());
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("row 1") && error.contains("prompt"), "{error}");
        std::fs::write(&path, "PAR1 half").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("whole Parquet"));
    }
}
