//! Reads rows from text: a JSON list, JSON Lines, or a single object, gzipped or not. The contents
//! tell which, because file names often do not.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use serde_json::Value;

use super::row::{FileRow, Location, RowError};
use super::surrogates;
use crate::progress::{self, count};
use crate::{Error, Result, interrupt, text_file};

const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();
const UTF16_MARKS: [&[u8]; 2] = [&[0xff, 0xfe], &[0xfe, 0xff]];

/// Reads all rows of a file. Empty lines are skipped.
///
/// # Errors
/// When the file cannot be read, or is a list that is not valid JSON; a bad line is only a bad row.
pub(super) fn read(path: &Path) -> Result<Vec<FileRow>> {
    let mut bytes = read_bytes(path)?;
    if UTF16_MARKS.iter().any(|mark| bytes.starts_with(mark)) {
        return Err(Error::file(path, "is UTF-16 text: save it as UTF-8"));
    }
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    tell_repaired(path, &surrogates::replace_lone(&mut bytes));
    if bytes.trim_ascii_start().starts_with(b"[") {
        return read_list(path, bytes);
    }
    match serde_json::from_slice(&bytes) {
        Ok(Value::Object(object)) => Ok(vec![FileRow { location: Location::Line(1), object: Ok(object) }]),
        _ => read_lines(&bytes),
    }
}

fn tell_repaired(path: &Path, lines: &[usize]) {
    if let Some(first) = lines.first() {
        let lines = count(lines.len(), "line");
        progress::log(format!(
            "{}: half of a character (a lone `\\ud…` escape) became U+FFFD in {lines}, first in line {first}",
            path.display()
        ));
    }
}

fn read_bytes(path: &Path) -> Result<Vec<u8>> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let mut bytes = Vec::new();
    if path.extension().is_some_and(|extension| extension == "gz") {
        let incomplete = |error| Error::file(path, format!("is not a complete gzip file ({error}): download it again"));
        MultiGzDecoder::new(file).read_to_end(&mut bytes).map_err(incomplete)?;
    } else {
        file.read_to_end(&mut bytes).map_err(Error::io(path))?;
    }
    Ok(bytes)
}

fn read_list(path: &Path, bytes: Vec<u8>) -> Result<Vec<FileRow>> {
    let text = text_file::decode(path, 1, bytes)?;
    let values: Vec<Value> =
        serde_json::from_str(&text).map_err(|error| Error::file(path, format!("expected a list of rows: {error}")))?;
    let row = |(index, value)| FileRow { location: Location::Row(index + 1), object: to_object(value) };
    Ok(values.into_iter().enumerate().map(row).collect())
}

fn read_lines(bytes: &[u8]) -> Result<Vec<FileRow>> {
    let mut rows = Vec::new();
    for (index, line) in bytes.split(|&byte| byte == b'\n').enumerate() {
        interrupt::check()?;
        let line = line.strip_prefix(BYTE_ORDER_MARK).unwrap_or(line).trim_ascii();
        if !line.is_empty() {
            rows.push(FileRow { location: Location::Line(index + 1), object: parse_line(line) });
        }
    }
    Ok(rows)
}

fn parse_line(line: &[u8]) -> std::result::Result<serde_json::Map<String, Value>, RowError> {
    let line = std::str::from_utf8(line)
        .map_err(|_| RowError::new("is not UTF-8", "save the file as UTF-8 text, or name another"))?;
    // The line that serde_json counts is always the first.
    let not_json = |error: serde_json::Error| {
        RowError::new("is not JSON", error.to_string().replace(" at line 1 column ", " at column "))
    };
    to_object(serde_json::from_str(line).map_err(not_json)?)
}

fn to_object(value: Value) -> std::result::Result<serde_json::Map<String, Value>, RowError> {
    match value {
        Value::Object(object) => Ok(object),
        other => Err(RowError::new("is not an object", format!("expected {{…}}, found {}", type_name(&other)))),
    }
}

/// The value that JSON text stands for, since columns often hold lists and objects as text. A
/// value that is no text is returned as it is.
pub(crate) fn parse_json_text(value: Value, field: &str) -> std::result::Result<Value, RowError> {
    match value {
        Value::String(text) if text.trim().is_empty() => Ok(Value::Null),
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| RowError::new("has text where JSON is needed", format!("{field}: not JSON: {error}"))),
        other => Ok(other),
    }
}

/// What a JSON value is, in words for messages.
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
