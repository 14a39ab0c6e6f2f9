//! Prompt sets: prompts, with the data that a task needs to score their answers.
//!
//! People have prompts as JSONL, as JSON lists, and as Parquet from other tools, with and without
//! ids or a source. Reading turns all of these into [`Sample`]s; only JSONL and Parquet are
//! written.

mod columns;
pub(crate) mod dataset_file;
mod sample;

use std::collections::HashSet;
use std::io::Write;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::{Error, Result, atomic_file, interrupt};
use sample::Row;

pub use sample::{DEFAULT_SOURCE, Prompt, Sample};

/// Reads a prompt set: Parquet if the name ends in `.parquet`, a JSON list if it ends in `.json`,
/// otherwise JSONL.
///
/// # Errors
/// Names the file and the line of a bad row, or an id that occurs twice.
pub fn read(path: &Path) -> Result<Vec<Sample>> {
    check_unique_ids(path, read_rows(path)?)
}

/// Reads a prompt set whose rows may lack an id; such a row gets one made of its number.
///
/// # Errors
/// As [`read`].
pub fn read_with_generated_ids(path: &Path) -> Result<Vec<Sample>> {
    let sample = |(index, mut row): (usize, Row)| {
        row.ensure_id(index + 1);
        Sample::try_from(row).map_err(|message| Error::file(path, format!("row {}: {message}", index + 1)))
    };
    let samples = read_rows(path)?.into_iter().enumerate().map(sample).collect::<Result<_>>()?;
    check_unique_ids(path, samples)
}

fn read_rows<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    if path.is_dir() {
        let message = "is a folder: expected a prompt set, the JSONL or Parquet file that `cllm-data prepare` wrote";
        return Err(Error::file(path, message));
    }
    if dataset_file::is_parquet(path) { columns::read(path) } else { dataset_file::read_file(path) }
}

fn check_unique_ids(path: &Path, samples: Vec<Sample>) -> Result<Vec<Sample>> {
    let mut ids = HashSet::new();
    for (row, sample) in samples.iter().enumerate() {
        if !ids.insert(sample.id.as_str()) {
            return Err(Error::file(path, format!("row {}: id `{}` occurs twice", row + 1, sample.id)));
        }
    }
    Ok(samples)
}

/// Writes a prompt set: Parquet if the name ends in `.parquet`, otherwise JSONL.
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
            let line = serde_json::to_string(sample).map_err(Error::serialization)?;
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
    use serde_json::{Value, json};

    use super::*;
    use crate::chat_template::Conversation;

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
            ..sample("c", Prompt::Conversation(Conversation::default()))
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
    fn plain_rows_need_only_a_prompt_and_keep_unknown_fields() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plain.jsonl");
        let put = |rows: &[Value]| {
            std::fs::write(&path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
        };
        put(&[
            json!({ "id": "a", "prompt": "2+2=", "reference": "4", "level": 3, "meta": { "n": 1 }, "none": null }),
            json!({ "id": 7, "messages": [{ "role": "user", "content": "2+2?" }] }),
        ]);
        let samples = read(&path).unwrap();
        assert_eq!((samples[0].source.as_str(), samples[1].id.as_str()), ("jsonl", "7"));
        assert_eq!((&samples[0].meta, &samples[1].meta), (&Some(json!({ "level": 3, "n": 1 })), &None));
        put(&[json!({ "prompt": "a" }), json!({ "id": "own", "prompt": "b" }), json!({ "prompt": "c" })]);
        let message = read(&path).unwrap_err().to_string();
        assert!(message.contains("line 1") && message.contains("`cllm-data prepare jsonl`"), "{message}");
        let ids: Vec<_> = read_with_generated_ids(&path).unwrap().into_iter().map(|sample| sample.id).collect();
        assert_eq!(ids, ["jsonl-1", "own", "jsonl-3"]);
        put(&[json!({ "id": "a", "prompt": "a", "messages": [] })]);
        assert!(read(&path).unwrap_err().to_string().contains("both `prompt` and `messages`"));
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
        for position in 0..bytes.len() {
            let mut bytes = bytes.clone();
            bytes[position] ^= 0x55;
            std::fs::write(&bad, &bytes).unwrap();
            refused += usize::from(read(&bad).is_err_and(|error| error.exit_code() == 2));
        }
        assert!(refused > 100, "{refused}");
    }

    #[test]
    fn parquet_of_other_tools_is_read_and_a_bad_row_is_named() {
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
        assert!(read(&path).unwrap_err().to_string().contains("complete Parquet"));
    }
}
