//! Reads rows from Parquet, whatever program and codec wrote it: each row becomes a JSON object
//! with one key per column. A null becomes a missing key.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, StringArray};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, FieldRef, Float64Type};
use arrow::error::ArrowError;
use arrow::json::writer::{Encoder, EncoderFactory, EncoderOptions, JsonArray, NullableEncoder, WriterBuilder};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Map, Value};

use super::row::{FileRow, Location};
use crate::{Error, Result, interrupt, parquet_file};

const UUID_BYTES: i32 = 16;

/// Reads all rows of a file.
///
/// # Errors
/// When the file is not Parquet, is damaged, or has a column that JSON cannot hold.
pub(super) fn read(path: &Path) -> Result<Vec<FileRow>> {
    let objects = parquet_file::catch_panic(path, || read_objects(path))?;
    let row = |(index, object)| FileRow { location: Location::Row(index + 1), object: Ok(object) };
    Ok(objects.into_iter().enumerate().map(row).collect())
}

fn read_objects(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let damaged = |error: &dyn std::fmt::Display| {
        Error::file(path, format!("is not a complete Parquet file, or has a type that is unknown here: {error}"))
    };
    let file = File::open(path).map_err(Error::io(path))?;
    let reader = ParquetRecordBatchReaderBuilder::try_new(file)
        .and_then(|builder| builder.build())
        .map_err(|error| damaged(&error))?;
    let mut objects = Vec::new();
    for batch in reader {
        interrupt::check()?;
        let json =
            to_json(&batch.map_err(|error| damaged(&error))?).map_err(|error| Error::file(path, error.to_string()))?;
        let rows: Vec<Map<String, Value>> = serde_json::from_slice(&json).map_err(Error::serialization)?;
        objects.extend(rows);
    }
    Ok(objects)
}

/// The rows of a batch as a JSON list of objects.
fn to_json(batch: &RecordBatch) -> std::result::Result<Vec<u8>, ArrowError> {
    let mut writer =
        WriterBuilder::new().with_encoder_factory(Arc::new(TextEncoders)).build::<_, JsonArray>(Vec::new());
    writer.write(batch)?;
    writer.finish()?;
    Ok(writer.into_inner())
}

/// Writes as text what the `arrow` crate writes otherwise or not at all.
#[derive(Debug)]
struct TextEncoders;

impl EncoderFactory for TextEncoders {
    fn make_default_encoder<'a>(
        &self,
        _: &'a FieldRef,
        array: &'a dyn Array,
        _: &'a EncoderOptions,
    ) -> std::result::Result<Option<NullableEncoder<'a>>, ArrowError> {
        if let Some(numbers) = infinite_numbers(array)? {
            let nulls = numbers.0.nulls().cloned();
            return Ok(Some(NullableEncoder::new(Box::new(numbers), nulls)));
        }
        let Some(text) = to_text(array)? else { return Ok(None) };
        let nulls = text.nulls().cloned();
        Ok(Some(NullableEncoder::new(Box::new(TextEncoder(text)), nulls)))
    }
}

/// The values as text, if they have a type that JSON has no counterpart of: decimals, which lose
/// digits as JSON numbers; bytes, which some writers have for text (null if they are none); UUIDs;
/// times in a named zone; maps whose keys are not text.
fn to_text(array: &dyn Array) -> std::result::Result<Option<StringArray>, ArrowError> {
    let has_other_keys =
        |entries: &Field| !matches!(entries.data_type(), DataType::Struct(pair) if pair[0].data_type().is_string());
    let text = match array.data_type() {
        DataType::FixedSizeBinary(UUID_BYTES) => return Ok(Some(uuids(array))),
        DataType::FixedSizeBinary(_) => cast(&cast(array, &DataType::Binary)?, &DataType::Utf8)?,
        from if from.is_decimal() || from.is_binary() => cast(array, &DataType::Utf8)?,
        DataType::Timestamp(unit, Some(_)) => {
            let in_utc = cast(array, &DataType::Timestamp(*unit, Some("+00:00".into())))?;
            cast(&in_utc, &DataType::Utf8)?
        }
        DataType::Map(entries, _) if has_other_keys(entries) => {
            let formatter = ArrayFormatter::try_new(array, &FormatOptions::new())?;
            let text = |index| array.is_valid(index).then(|| formatter.value(index).to_string());
            return Ok(Some((0..array.len()).map(text).collect()));
        }
        _ => return Ok(None),
    };
    Ok(Some(text.as_string().clone()))
}

/// The 16 bytes of each UUID as text.
fn uuids(array: &dyn Array) -> StringArray {
    let text = |bytes: &[u8]| {
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-")
    };
    array.as_fixed_size_binary().iter().map(|bytes| bytes.map(text)).collect()
}

struct TextEncoder(StringArray);

impl Encoder for TextEncoder {
    fn encode(&mut self, index: usize, out: &mut Vec<u8>) {
        out.extend(Value::from(self.0.value(index)).to_string().into_bytes());
    }
}

/// Numbers as text, some of which are infinite.
struct NumberEncoder(StringArray);

/// The numbers of a column that holds infinite ones, which would become nulls.
fn infinite_numbers(array: &dyn Array) -> std::result::Result<Option<NumberEncoder>, ArrowError> {
    if !array.data_type().is_floating() {
        return Ok(None);
    }
    let wide = cast(array, &DataType::Float64)?;
    let is_infinite = wide.as_primitive::<Float64Type>().iter().flatten().any(f64::is_infinite);
    Ok(if is_infinite { Some(NumberEncoder(cast(array, &DataType::Utf8)?.as_string().clone())) } else { None })
}

impl Encoder for NumberEncoder {
    fn encode(&mut self, index: usize, out: &mut Vec<u8>) {
        let text = match self.0.value(index) {
            infinite @ ("inf" | "-inf") => format!("\"{infinite}\""),
            "NaN" => "null".to_owned(),
            number => number.to_owned(),
        };
        out.extend(text.into_bytes());
    }
}
