//! Prompt sets in Parquet: one column per field, `messages` as a list of structs. What may have any
//! shape is JSON text: `tools`, `chat_template_kwargs`, `meta` and the other keys of messages.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, ListArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use arrow::error::ArrowError;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::dataset_file::RowError;
use super::sample::{Prompt, Sample};
use crate::chat_template::Conversation;
use crate::{Error, Result, atomic_file, interrupt, parquet_file};

const ROWS_PER_GROUP: usize = 4096;
/// Field of a message's struct with the keys besides role and content.
const OTHER_KEYS: &str = "other";

/// Undoes what a file's columns cannot hold as JSON does: parses `meta` and the other keys of
/// messages, which are JSON text. Other tools may write `meta` as a struct, which is an object
/// already, or as text of another kind, which stays as it is.
pub(super) fn restore(row: &mut Map<String, Value>) -> std::result::Result<(), RowError> {
    if let Some(meta) = row.get_mut("meta")
        && let Some(value) = meta.as_str().and_then(|text| serde_json::from_str(text).ok())
    {
        *meta = value;
    }
    let messages = row.get_mut("messages").and_then(Value::as_array_mut).into_iter().flatten();
    for message in messages.filter_map(Value::as_object_mut) {
        if let Some(Value::String(other)) = message.get(OTHER_KEYS) {
            let other: Map<String, Value> = serde_json::from_str(other)
                .map_err(|error| RowError::new("has text where JSON is needed", format!("{OTHER_KEYS}: {error}")))?;
            message.shift_remove(OTHER_KEYS);
            message.extend(other);
        }
    }
    Ok(())
}

pub(super) fn write(path: &Path, samples: &[Sample]) -> Result<()> {
    let failed = |error: parquet::errors::ParquetError| parquet_file::write_error(path, error);
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(Default::default()))
        .set_created_by(format!("cllm {}", crate::VERSION))
        .build();
    atomic_file::write_with(path, |file| {
        let mut writer = ArrowWriter::try_new(file, schema(), Some(properties)).map_err(failed)?;
        for group in samples.chunks(ROWS_PER_GROUP) {
            interrupt::check()?;
            let batch = to_batch(group).map_err(|error| Error::file(path, error.to_string()))?;
            writer.write(&batch).and_then(|()| writer.flush()).map_err(failed)?;
        }
        writer.close().map_err(failed)?;
        Ok(())
    })
    .map(drop)
}

fn message_fields() -> Fields {
    vec![
        Field::new("role", DataType::Utf8, false),
        Field::new("content", DataType::Utf8, false),
        Field::new(OTHER_KEYS, DataType::Utf8, true),
    ]
    .into()
}

fn message_item() -> Arc<Field> {
    Arc::new(Field::new("item", DataType::Struct(message_fields()), true))
}

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("id", DataType::Utf8, false),
        Field::new("source", DataType::Utf8, false),
        Field::new("prompt", DataType::Utf8, true),
        Field::new("messages", DataType::List(message_item()), true),
        Field::new("tools", DataType::Utf8, true),
        Field::new("chat_template_kwargs", DataType::Utf8, true),
        Field::new("reference", DataType::Utf8, true),
        Field::new("meta", DataType::Utf8, true),
    ]))
}

fn to_batch(samples: &[Sample]) -> std::result::Result<RecordBatch, ArrowError> {
    let text =
        |get: fn(&Sample) -> Option<&str>| -> ArrayRef { Arc::new(StringArray::from_iter(samples.iter().map(get))) };
    let json =
        |get: fn(&Sample) -> Option<String>| -> ArrayRef { Arc::new(StringArray::from_iter(samples.iter().map(get))) };
    let columns = vec![
        text(|sample| Some(&sample.id)),
        text(|sample| Some(&sample.source)),
        text(|sample| match &sample.prompt {
            Prompt::Text(text) => Some(text),
            Prompt::Conversation(_) => None,
        }),
        Arc::new(messages_column(samples)?),
        json(|sample| {
            let tools = &conversation_of(sample)?.tools;
            json_unless(tools.is_empty(), tools)
        }),
        json(|sample| {
            let kwargs = &conversation_of(sample)?.chat_template_kwargs;
            json_unless(kwargs.is_empty(), kwargs)
        }),
        text(|sample| sample.reference.as_deref()),
        json(|sample| sample.meta.as_ref().map(ToString::to_string)),
    ];
    RecordBatch::try_new(schema(), columns)
}

fn messages_column(samples: &[Sample]) -> std::result::Result<ListArray, ArrowError> {
    let all = || samples.iter().filter_map(conversation_of).flat_map(|conversation| &conversation.messages);
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(all().map(|message| &message.role))),
        Arc::new(StringArray::from_iter_values(all().map(|message| &message.content))),
        Arc::new(StringArray::from_iter(all().map(|message| json_unless(message.other.is_empty(), &message.other)))),
    ];
    let structs = StructArray::try_new(message_fields(), columns, None)?;
    let lengths =
        samples.iter().map(|sample| conversation_of(sample).map_or(0, |conversation| conversation.messages.len()));
    let present: NullBuffer = samples.iter().map(|sample| conversation_of(sample).is_some()).collect();
    ListArray::try_new(message_item(), OffsetBuffer::from_lengths(lengths), Arc::new(structs), Some(present))
}

fn conversation_of(sample: &Sample) -> Option<&Conversation> {
    match &sample.prompt {
        Prompt::Text(_) => None,
        Prompt::Conversation(conversation) => Some(conversation),
    }
}

/// A value as JSON text, or null if it is empty.
fn json_unless(is_empty: bool, value: &impl Serialize) -> Option<String> {
    if is_empty { None } else { Some(json!(value).to_string()) }
}
