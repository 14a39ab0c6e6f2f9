//! Rows of a benchmark's files as they are published: JSONL, a JSON list, or the Parquet of its Hugging Face export.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::prompt_set::read_rows;
use crate::{Error, Result};

/// The rows of the first of `stems` (paths in `data` without their ending) that is there; `data` may be the file itself.
pub(super) fn read<T: DeserializeOwned>(data: &Path, stems: &[&str]) -> Result<Vec<T>> {
    if data.is_file() {
        return read_file(data);
    }
    for stem in stems {
        for ending in ["jsonl", "json", "parquet"] {
            let path = data.join(format!("{stem}.{ending}"));
            if path.is_file() {
                return read_file(&path);
            }
        }
        let shards = shards(&data.join(stem));
        if !shards.is_empty() {
            let parts: Result<Vec<Vec<T>>> = shards.iter().map(|path| read_file(path)).collect();
            return Ok(parts?.into_iter().flatten().collect());
        }
    }
    let names: Vec<String> = stems.iter().map(|stem| format!("{stem}.jsonl")).collect();
    let wanted = names.join(" or ");
    Err(Error::file(data, format!("expected {wanted} here (or .json, .parquet, -00000-of-00001.parquet); found none")))
}

/// The files `STEM-00000-of-00002.parquet` and so on, in order.
fn shards(stem: &Path) -> Vec<PathBuf> {
    let (Some(folder), Some(name)) = (stem.parent(), stem.file_name()) else { return Vec::new() };
    let start = format!("{}-", name.to_string_lossy());
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.strip_prefix(&start).is_some_and(|rest| {
                rest.ends_with(".parquet") && rest.contains("-of-") && rest.starts_with(|c: char| c.is_ascii_digit())
            })
        })
        .collect();
    found.sort();
    found
}

fn read_file<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let rows = match path.extension().and_then(|ending| ending.to_str()) {
        Some("json") => {
            let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
            serde_json::from_str(&text)
                .map_err(|error| Error::file(path, format!("expected a list of rows: {error}")))?
        }
        Some("parquet") => parquet_rows(path)?,
        _ => return read_rows(path),
    };
    let fit = |(number, row)| {
        serde_json::from_value(row).map_err(|error| Error::file(path, format!("row {}: {error}", number + 1)))
    };
    Vec::into_iter(rows).enumerate().map(fit).collect()
}

fn parquet_rows(path: &Path) -> Result<Vec<Value>> {
    let bad = |error: parquet::errors::ParquetError| Error::file(path, format!("is not a whole Parquet file: {error}"));
    let reader = SerializedFileReader::new(File::open(path).map_err(Error::io(path))?).map_err(bad)?;
    let rows = reader.get_row_iter(None).map_err(bad)?;
    rows.map(|row| row.map(|row| object(&row)).map_err(bad)).collect()
}

fn object(row: &parquet::record::Row) -> Value {
    Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect::<Map<_, _>>())
}

/// The kinds of values that the benchmarks use; any other becomes null and is refused by the row's type.
fn value(field: &Field) -> Value {
    match field {
        Field::Bool(v) => Value::from(*v),
        Field::Byte(v) => Value::from(*v),
        Field::Short(v) => Value::from(*v),
        Field::Int(v) => Value::from(*v),
        Field::Long(v) => Value::from(*v),
        Field::Double(v) => Value::from(*v),
        Field::Str(v) => Value::from(v.as_str()),
        Field::Group(row) => object(row),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(value).collect()),
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int64Array, ListArray, RecordBatch, StringArray};
    use arrow::datatypes::Int32Type;
    use serde::Deserialize;

    use super::*;

    #[derive(Deserialize, Debug, PartialEq)]
    struct Row {
        text: String,
        number: i64,
        list: Vec<i32>,
    }

    #[test]
    fn the_three_forms_give_the_same_rows() {
        let dir = tempfile::tempdir().unwrap();
        let row = |text: &str| Row { text: text.into(), number: 7, list: vec![1, 2] };
        let line = |text: &str| format!("{{\"text\": \"{text}\", \"number\": 7, \"list\": [1, 2]}}");
        std::fs::write(dir.path().join("a.jsonl"), line("x")).unwrap();
        std::fs::write(dir.path().join("b.json"), format!("[{},{}]", line("x"), line("y"))).unwrap();
        for (shard, text) in ["x", "y"].into_iter().enumerate() {
            let columns: [(&str, ArrayRef); 3] = [
                ("text", Arc::new(StringArray::from(vec![text]))),
                ("number", Arc::new(Int64Array::from(vec![7]))),
                ("list", Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>([Some(vec![Some(1), Some(2)])]))),
            ];
            let batch = RecordBatch::try_from_iter(columns).unwrap();
            let file = File::create(dir.path().join(format!("c-0000{shard}-of-00002.parquet"))).unwrap();
            let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
            writer.write(&batch).unwrap();
            writer.close().unwrap();
        }
        assert_eq!(read::<Row>(dir.path(), &["none", "a"]).unwrap(), [row("x")]);
        assert_eq!(read::<Row>(dir.path(), &["b"]).unwrap(), [row("x"), row("y")]);
        assert_eq!(read::<Row>(dir.path(), &["c"]).unwrap(), [row("x"), row("y")]);

        #[derive(Deserialize, Debug)]
        struct Other {
            #[allow(dead_code)]
            question: String,
        }
        let wrong = read::<Other>(dir.path(), &["c"]).unwrap_err().to_string();
        assert!(wrong.contains("row 1") && wrong.contains("question"), "{wrong}");
        assert!(read::<Row>(dir.path(), &["d"]).unwrap_err().to_string().contains("d.jsonl"));
        let cut = dir.path().join("cut.parquet");
        std::fs::write(&cut, b"PAR1 half").unwrap();
        assert!(read::<Row>(&cut, &[]).unwrap_err().to_string().contains("Parquet"));
    }
}
