//! Prompt sets in Parquet: one column per field, `messages` as a list of structs, `meta` as JSON
//! text.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, ListArray, RecordBatch, StringArray, StructArray};
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef};
use arrow::error::ArrowError;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::dataset_file;
use super::sample::{Prompt, Sample};
use crate::chat_template::Message;
use crate::{Error, Result, atomic_file, interrupt, parquet_file};

const ROWS_PER_GROUP: usize = 4096;

pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<Vec<T>> {
    let row = |(index, mut row): (usize, Value)| {
        // Other tools may write `meta` as a struct, which is a JSON object already.
        if let Some(meta) = row.get_mut("meta")
            && let Some(text) = meta.as_str()
        {
            let not_json = |error| Error::file(path, format!("row {}: meta is text, but not JSON: {error}", index + 1));
            *meta = serde_json::from_str(text).map_err(not_json)?;
        }
        dataset_file::parse_row(path, index, row)
    };
    dataset_file::read_parquet(path)?.into_iter().enumerate().map(row).collect()
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
}

fn message_fields() -> Fields {
    vec![Field::new("role", DataType::Utf8, false), Field::new("content", DataType::Utf8, false)].into()
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
        Field::new("reference", DataType::Utf8, true),
        Field::new("meta", DataType::Utf8, true),
    ]))
}

fn to_batch(samples: &[Sample]) -> std::result::Result<RecordBatch, ArrowError> {
    let text =
        |get: fn(&Sample) -> Option<&str>| -> ArrayRef { Arc::new(StringArray::from_iter(samples.iter().map(get))) };
    let messages = || samples.iter().filter_map(messages_of).flatten();
    let message_text =
        |get: fn(&Message) -> &str| -> ArrayRef { Arc::new(StringArray::from_iter_values(messages().map(get))) };
    let structs = StructArray::try_new(
        message_fields(),
        vec![message_text(|message| &message.role), message_text(|message| &message.content)],
        None,
    )?;
    let lengths = samples.iter().map(|sample| messages_of(sample).map_or(0, <[_]>::len));
    let present: NullBuffer = samples.iter().map(|sample| messages_of(sample).is_some()).collect();
    let meta = samples.iter().map(|sample| sample.meta.as_ref().map(ToString::to_string));
    RecordBatch::try_new(
        schema(),
        vec![
            text(|sample| Some(&sample.id)),
            text(|sample| Some(&sample.source)),
            text(|sample| match &sample.prompt {
                Prompt::Text(text) => Some(text),
                Prompt::Conversation(_) => None,
            }),
            Arc::new(ListArray::try_new(
                message_item(),
                OffsetBuffer::from_lengths(lengths),
                Arc::new(structs),
                Some(present),
            )?),
            text(|sample| sample.reference.as_deref()),
            Arc::new(StringArray::from_iter(meta)),
        ],
    )
}

fn messages_of(sample: &Sample) -> Option<&[Message]> {
    match &sample.prompt {
        Prompt::Text(_) => None,
        Prompt::Conversation(conversation) => Some(&conversation.messages),
    }
}
