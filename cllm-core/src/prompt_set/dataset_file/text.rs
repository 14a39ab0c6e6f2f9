//! Reads rows from text: a JSON list, JSON Lines, or a single object, gzipped or not. The contents
//! tell which, because file names often do not.

use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value};

use super::row::{FileRow, Location, RowError};
use super::{integers, surrogates};
use crate::progress::{self, count};
use crate::{Error, Result, interrupt, text_file};

const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();
const UTF16_MARKS: [&[u8]; 2] = [&[0xff, 0xfe], &[0xfe, 0xff]];

/// The reason of a row that is no JSON.
pub(crate) const NOT_JSON: &str = "is not JSON";

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
    let bytes = integers::quote_wide(bytes);
    if bytes.trim_ascii_start().starts_with(b"[") && !has_lists_by_line(&bytes) {
        return read_list(path, bytes);
    }
    let rows = read_lines(&bytes)?;
    match &rows[..] {
        [FileRow { object: Ok(object), .. }] if is_columns(object) => {
            let message = "holds columns, not rows: with pandas, write it by `to_json(FILE, orient=\"records\")`";
            Err(Error::file(path, message))
        }
        _ => Ok(rows),
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
    let bytes = std::fs::read(path).map_err(Error::io(path))?;
    if !bytes.starts_with(GZIP_MAGIC) {
        return Ok(bytes);
    }
    let mut text = Vec::new();
    let incomplete = |error| Error::file(path, format!("is not a complete gzip file ({error}): download it again"));
    MultiGzDecoder::new(&bytes[..]).read_to_end(&mut text).map_err(incomplete)?;
    Ok(text)
}

fn read_list(path: &Path, bytes: Vec<u8>) -> Result<Vec<FileRow>> {
    let text = text_file::decode(path, 1, bytes)?;
    let values: Vec<Value> =
        serde_json::from_str(&text).map_err(|error| Error::file(path, format!("expected a list of rows: {error}")))?;
    let row = |(index, value)| FileRow { location: Location::Row(index + 1), object: to_object(value) };
    Ok(values.into_iter().enumerate().map(row).collect())
}

fn read_lines(bytes: &[u8]) -> Result<Vec<FileRow>> {
    let (mut rows, mut number, mut rest) = (Vec::new(), 1, bytes);
    while !rest.is_empty() {
        interrupt::check()?;
        let mut end = rest.iter().position(|&byte| byte == b'\n').map_or(rest.len(), |position| position + 1);
        let line = rest[..end].strip_prefix(BYTE_ORDER_MARK).unwrap_or(&rest[..end]).trim_ascii();
        if !line.is_empty() {
            let mut object = parse_line(line);
            if object.is_err()
                && let Some((whole, length)) = parse_several_lines(rest)
            {
                (object, end) = (Ok(whole), length);
            }
            rows.push(FileRow { location: Location::Line(number), object });
        }
        number += rest[..end].iter().filter(|&&byte| byte == b'\n').count();
        rest = &rest[end..];
    }
    Ok(rows)
}

/// The object with which the text begins, if it has lines of its own, as `jq` writes them; and the
/// length of these lines.
fn parse_several_lines(text: &[u8]) -> Option<(Map<String, Value>, usize)> {
    let mut objects = serde_json::Deserializer::from_slice(text).into_iter::<Map<String, Value>>();
    let object = objects.next()?.ok()?;
    let after = &text[objects.byte_offset()..];
    let line = after.split(|&byte| byte == b'\n').next().unwrap_or_default();
    let end = (text.len() - after.len() + line.len() + 1).min(text.len());
    line.trim_ascii().is_empty().then_some((object, end))
}

/// Whether each line is a list, so that the text as a whole is none.
fn has_lists_by_line(bytes: &[u8]) -> bool {
    let mut lines = bytes.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let is_list = |line: &[u8]| serde_json::from_slice::<Vec<Value>>(line).is_ok();
    lines.next().is_some_and(is_list) && lines.next().is_some_and(|line| line.starts_with(b"["))
}

/// Whether an object holds columns of numbered values, which pandas' `to_json` writes by default.
fn is_columns(object: &Map<String, Value>) -> bool {
    let is_number = |key: &String| key.parse::<usize>().is_ok();
    let is_column =
        |value: &Value| value.as_object().is_some_and(|cells| !cells.is_empty() && cells.keys().all(is_number));
    !object.is_empty() && object.values().all(is_column)
}

fn parse_line(line: &[u8]) -> std::result::Result<Map<String, Value>, RowError> {
    let line = std::str::from_utf8(line)
        .map_err(|_| RowError::new("is not UTF-8", "save the file as UTF-8 text, or name another"))?;
    // The line that serde_json counts is always the first.
    let not_json = |error: serde_json::Error| {
        RowError::new(NOT_JSON, error.to_string().replace(" at line 1 column ", " at column "))
    };
    to_object(serde_json::from_str(line).map_err(not_json)?)
}

fn to_object(value: Value) -> std::result::Result<Map<String, Value>, RowError> {
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
