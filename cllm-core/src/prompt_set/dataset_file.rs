//! Rows of files as they are published: JSONL (packed with gzip too), a JSON list, or Parquet, such as that of a Hugging
//! Face export.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::{Error, Result, interrupt, parquet_file, text_file};

/// The rows of the first of `stems` (paths in `data` without their ending) that is there; `data` may be the file itself.
pub(crate) fn read<T: DeserializeOwned>(data: &Path, stems: &[&str]) -> Result<Vec<T>> {
    if data.is_file() {
        return read_file(data);
    }
    for stem in stems {
        for ending in ["jsonl", "jsonl.gz", "json", "parquet"] {
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
    Err(Error::file(
        data,
        format!("expected {wanted} here (or .jsonl.gz, .json, .parquet, -00000-of-00001.parquet); found none"),
    ))
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

/// The rows of one file; its ending says of which kind it is.
pub(crate) fn read_file<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let rows = if is_parquet(path) {
        read_parquet(path)?
    } else if path.extension().is_some_and(|ending| ending == "json") {
        let text = text_file::read(path)?;
        serde_json::from_str(&text).map_err(|error| Error::file(path, format!("expected a list of rows: {error}")))?
    } else {
        return read_lines(path);
    };
    let fitted = |(index, row)| interrupt::check().and_then(|()| fit(path, index, row));
    rows.into_iter().enumerate().map(fitted).collect()
}

/// Whether the name says so.
pub(crate) fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|ending| ending == "parquet")
}

/// A row as what it should be.
///
/// # Errors
/// Names file and row.
pub(crate) fn fit<T: DeserializeOwned>(path: &Path, index: usize, row: Value) -> Result<T> {
    serde_json::from_value(row).map_err(|error| Error::file(path, format!("row {}: {error}", index + 1)))
}

/// The rows of a JSONL file; empty lines are skipped.
fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let packed = path.extension().is_some_and(|ending| ending == "gz");
    let plain: Box<dyn Read> = if packed { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
    let mut rows = Vec::new();
    for (number, line) in BufReader::new(plain).split(b'\n').enumerate() {
        interrupt::check()?;
        let line = line.map_err(|error| match packed {
            true => Error::file(path, format!("is no whole gzip file ({error}): download it again")),
            false => Error::io(path)(error),
        })?;
        let line = text_file::decode(path, number + 1, line)?;
        if !line.trim().is_empty() {
            let row = serde_json::from_str(&line)
                .map_err(|error| Error::file(path, format!("line {}: {error}", number + 1)))?;
            rows.push(row);
        }
    }
    Ok(rows)
}

/// The rows of a Parquet file, each an object of its columns.
pub(crate) fn read_parquet(path: &Path) -> Result<Vec<Value>> {
    parquet_file::catch_panic(path, || read_whole_parquet(path))
}

fn read_whole_parquet(path: &Path) -> Result<Vec<Value>> {
    let bad = |error: ParquetError| Error::file(path, format!("is not a whole Parquet file: {error}"));
    let reader = SerializedFileReader::new(File::open(path).map_err(Error::io(path))?).map_err(bad)?;
    let rows = reader.get_row_iter(None).map_err(bad)?;
    let read = |row: std::result::Result<Row, ParquetError>| {
        interrupt::check()?;
        row.map(|row| object(&row)).map_err(bad)
    };
    rows.map(read).collect()
}

/// A column that is null is as one that is not there.
fn object(row: &Row) -> Value {
    let columns = row.get_column_iter().map(|(name, field)| (name.clone(), value(field)));
    Value::Object(columns.filter(|(_, value)| !value.is_null()).collect::<Map<_, _>>())
}

/// The kinds of values that JSON has too; any other becomes null, and the row's type refuses it.
fn value(field: &Field) -> Value {
    match field {
        Field::Bool(v) => Value::from(*v),
        Field::Byte(v) => Value::from(*v),
        Field::Short(v) => Value::from(*v),
        Field::Int(v) => Value::from(*v),
        Field::Long(v) => Value::from(*v),
        Field::UByte(v) => Value::from(*v),
        Field::UShort(v) => Value::from(*v),
        Field::UInt(v) => Value::from(*v),
        Field::ULong(v) => Value::from(*v),
        Field::Float(v) => Value::from(*v),
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
