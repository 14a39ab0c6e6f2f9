//! Reads data set files as they are published: JSONL (also gzipped), a JSON list, or Parquet such
//! as a Hugging Face export.

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

/// Reads the first of `stems` (paths in `data` without an extension) that exists. `data` may also
/// be the file itself.
pub(crate) fn read<T: DeserializeOwned>(data: &Path, stems: &[&str]) -> Result<Vec<T>> {
    if data.is_file() {
        return read_file(data);
    }
    for stem in stems {
        for extension in ["jsonl", "jsonl.gz", "json", "parquet"] {
            let path = data.join(format!("{stem}.{extension}"));
            if path.is_file() {
                return read_file(&path);
            }
        }
        let shards = find_shards(&data.join(stem));
        if !shards.is_empty() {
            let rows: Result<Vec<Vec<T>>> = shards.iter().map(|path| read_file(path)).collect();
            return Ok(rows?.into_iter().flatten().collect());
        }
    }
    let names: Vec<String> = stems.iter().map(|stem| format!("{stem}.jsonl")).collect();
    let expected = names.join(" or ");
    let message = format!(
        "expected {expected} here, or the same with .jsonl.gz, .json, .parquet or -00000-of-00001.parquet; found none"
    );
    Err(Error::file(data, message))
}

/// Finds the files `STEM-00000-of-00002.parquet` and so on, in order.
fn find_shards(stem: &Path) -> Vec<PathBuf> {
    let (Some(folder), Some(name)) = (stem.parent(), stem.file_name()) else { return Vec::new() };
    let prefix = format!("{}-", name.to_string_lossy());
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut shards: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.strip_prefix(&prefix).is_some_and(|rest| {
                rest.ends_with(".parquet") && rest.contains("-of-") && rest.starts_with(|c: char| c.is_ascii_digit())
            })
        })
        .collect();
    shards.sort();
    shards
}

/// Reads one file. Its extension tells the format.
pub(crate) fn read_file<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let rows = if is_parquet(path) {
        read_parquet(path)?
    } else if path.extension().is_some_and(|extension| extension == "json") {
        let text = text_file::read(path)?;
        serde_json::from_str(&text).map_err(|error| Error::file(path, format!("expected a list of rows: {error}")))?
    } else {
        return read_lines(path);
    };
    let parse = |(index, row)| interrupt::check().and_then(|()| parse_row(path, index, row));
    rows.into_iter().enumerate().map(parse).collect()
}

/// Whether the file name has Parquet's extension.
pub(crate) fn is_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "parquet")
}

/// Converts the row at `index` to its type; an error names the file and the row, counted from 1.
pub(super) fn parse_row<T: DeserializeOwned>(path: &Path, index: usize, row: Value) -> Result<T> {
    serde_json::from_value(row).map_err(|error| Error::file(path, format!("row {}: {error}", index + 1)))
}

/// Reads a JSONL file, gzipped or not. Empty lines are skipped.
fn read_lines<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let file = File::open(path).map_err(Error::io(path))?;
    let is_gzip = path.extension().is_some_and(|extension| extension == "gz");
    let contents: Box<dyn Read> = if is_gzip { Box::new(MultiGzDecoder::new(file)) } else { Box::new(file) };
    let mut rows = Vec::new();
    for (number, line) in BufReader::new(contents).split(b'\n').enumerate() {
        interrupt::check()?;
        let line = line.map_err(|error| {
            if is_gzip {
                Error::file(path, format!("is not a complete gzip file ({error}): download it again"))
            } else {
                Error::io(path)(error)
            }
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

/// Reads the rows of a Parquet file as JSON objects, one key per column. A null becomes a missing
/// key.
pub(super) fn read_parquet(path: &Path) -> Result<Vec<Value>> {
    parquet_file::catch_panic(path, || read_parquet_rows(path))
}

fn read_parquet_rows(path: &Path) -> Result<Vec<Value>> {
    let damaged = |error: ParquetError| Error::file(path, format!("is not a complete Parquet file: {error}"));
    let reader = SerializedFileReader::new(File::open(path).map_err(Error::io(path))?).map_err(damaged)?;
    let rows = reader.get_row_iter(None).map_err(damaged)?;
    let read = |row: std::result::Result<Row, ParquetError>| {
        interrupt::check()?;
        row.map(|row| to_object(&row)).map_err(damaged)
    };
    rows.map(read).collect()
}

fn to_object(row: &Row) -> Value {
    let columns = row.get_column_iter().map(|(name, field)| (name.clone(), to_value(field)));
    Value::Object(columns.filter(|(_, value)| !value.is_null()).collect::<Map<_, _>>())
}

/// Converts the types that JSON has too. Any other becomes null, which the row's own type refuses
/// if it needs the field.
fn to_value(field: &Field) -> Value {
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
        Field::Group(row) => to_object(row),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(to_value).collect()),
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
    fn all_file_formats_give_the_same_rows() {
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
        let error = read::<Other>(dir.path(), &["c"]).unwrap_err().to_string();
        assert!(error.contains("row 1") && error.contains("question"), "{error}");
        assert!(read::<Row>(dir.path(), &["d"]).unwrap_err().to_string().contains("d.jsonl"));
        let cut = dir.path().join("cut.parquet");
        std::fs::write(&cut, b"PAR1 half").unwrap();
        assert!(read::<Row>(&cut, &[]).unwrap_err().to_string().contains("Parquet"));
    }
}
