//! Parquet files that are not trajectory shards.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Schema};
use parquet::arrow::ArrowWriter;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;

/// Writes a file with one text column. With a `schema_version`, its metadata claims that it is a
/// trajectory shard.
pub fn write(path: &Path, column: &str, schema_version: Option<&str>) {
    let schema = Arc::new(Schema::new(vec![Field::new(column, DataType::Utf8, false)]));
    let rows = RecordBatch::try_new(schema.clone(), vec![Arc::new(StringArray::from(vec!["a", "b"]))]).unwrap();
    let metadata =
        schema_version.map(|version| vec![KeyValue::new("cllm.schema_version".to_owned(), version.to_owned())]);
    let properties = WriterProperties::builder().set_key_value_metadata(metadata).build();
    let mut writer = ArrowWriter::try_new(std::fs::File::create(path).unwrap(), schema, Some(properties)).unwrap();
    writer.write(&rows).unwrap();
    writer.close().unwrap();
}
