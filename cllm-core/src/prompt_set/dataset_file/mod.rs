//! Reads data set files as they are published and as people have them: JSON Lines, a JSON list
//! (both also gzipped), or Parquet of any writer. The benchmarks and prompt sets read here.

mod columns;
mod integers;
mod row;
mod surrogates;
mod text;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::{Error, Result, interrupt};

pub(crate) use row::{FileRow, Location, RowError};
pub(crate) use text::{NOT_JSON, parse_json_text, type_name};

/// The bytes with which every Parquet file begins.
const PARQUET_MAGIC: &[u8] = b"PAR1";

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
    let found = match &row_files(data)[..] {
        [] => "none".to_owned(),
        names => names.join(", "),
    };
    let message = format!(
        "expected {expected} here, or the same with .jsonl.gz, .json, .parquet or -00000-of-00001.parquet; found {found}"
    );
    Err(Error::file(data, message))
}

/// The names of the files of rows in a folder, in order.
fn row_files(folder: &Path) -> Vec<String> {
    let has_rows =
        |name: &String| [".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz"].iter().any(|end| name.ends_with(end));
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().filter(|entry| entry.path().is_file());
    let mut names: Vec<String> =
        entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(has_rows).collect();
    names.sort();
    names
}

/// The file of rows in a folder, if there is exactly one.
pub(crate) fn only_file(folder: &Path) -> Option<PathBuf> {
    match &row_files(folder)[..] {
        [name] => Some(folder.join(name)),
        _ => None,
    }
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

/// Reads one file whose rows all have the same fields.
///
/// # Errors
/// Names the first row that cannot be read.
pub(crate) fn read_file<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let parse = |FileRow { location, object }: FileRow| {
        interrupt::check()?;
        let object = object.map_err(|error| Error::file(path, format!("{location} {error}")))?;
        serde_json::from_value(Value::Object(object)).map_err(|error| Error::file(path, format!("{location}: {error}")))
    };
    read_rows(path)?.into_iter().map(parse).collect()
}

/// Reads the rows of one file as JSON objects: Parquet if it [is that](is_parquet), otherwise text.
///
/// # Errors
/// When the file as a whole cannot be read. A row that cannot be read is marked as such.
pub(crate) fn read_rows(path: &Path) -> Result<Vec<FileRow>> {
    if is_parquet(path)? { columns::read(path) } else { text::read(path) }
}

/// Whether a file is Parquet by its name, or by its contents under any other name.
pub(crate) fn is_parquet(path: &Path) -> Result<bool> {
    if is_named_parquet(path) {
        return Ok(true);
    }
    let mut start = Vec::new();
    let file = File::open(path).map_err(Error::io(path))?;
    file.take(PARQUET_MAGIC.len() as u64).read_to_end(&mut start).map_err(Error::io(path))?;
    Ok(start == PARQUET_MAGIC)
}

/// Whether the file name has Parquet's extension.
pub(crate) fn is_named_parquet(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet"))
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
