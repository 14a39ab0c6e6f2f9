//! Converts rows to Arrow columns and back. The columns are described in `docs/data-format.md`.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanBuilder, Int32Array, Int32Builder, ListArray, ListBuilder, RecordBatch,
    StringArray, StructArray,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Int32Type, Schema, SchemaRef};
use arrow::error::ArrowError;

use super::row::{Block, FinishReason, Trajectory};

/// Version of the schema. A reader refuses any other.
pub const SCHEMA_VERSION: u32 = 1;
/// Key of the schema version in a shard's metadata.
pub(super) const VERSION_KEY: &str = "cllm.schema_version";
/// Key of the provenance (JSON) in a shard's metadata.
pub(super) const PROVENANCE_KEY: &str = "cllm.provenance";

/// The column that data sets of older versions lack.
pub(super) const REFERENCE_IDS: &str = "reference_ids";

fn list(item: DataType) -> DataType {
    DataType::List(Arc::new(Field::new("item", item, true)))
}

fn block_fields() -> Fields {
    let states = list(list(DataType::Int32));
    vec![Field::new("start", DataType::Int32, false), Field::new("states", states, false)].into()
}

/// The columns of a shard, without metadata.
pub(super) fn schema() -> SchemaRef {
    let ids = || list(DataType::Int32);
    Arc::new(Schema::new(vec![
        Field::new("sample_id", DataType::Utf8, false),
        Field::new("source", DataType::Utf8, false),
        Field::new("prompt", DataType::Utf8, false),
        Field::new("prompt_ids", ids(), false),
        Field::new("response_ids", ids(), false),
        Field::new("reference", DataType::Utf8, true),
        Field::new(REFERENCE_IDS, ids(), true),
        Field::new("blocks", list(DataType::Struct(block_fields())), false),
        Field::new("augmented", list(list(DataType::Boolean)), true),
        Field::new("finish_reason", DataType::Utf8, false),
        Field::new("meta", DataType::Utf8, true),
    ]))
}

pub(super) fn rows_to_batch(rows: &[Trajectory]) -> Result<RecordBatch, ArrowError> {
    let text =
        |get: fn(&Trajectory) -> &str| -> ArrayRef { Arc::new(StringArray::from_iter_values(rows.iter().map(get))) };
    let optional =
        |get: fn(&Trajectory) -> Option<&str>| -> ArrayRef { Arc::new(StringArray::from_iter(rows.iter().map(get))) };
    let ids = |get: fn(&Trajectory) -> &[i32]| -> ArrayRef {
        let mut builder = ListBuilder::new(Int32Builder::new());
        for row in rows {
            builder.values().append_slice(get(row));
            builder.append(true);
        }
        Arc::new(builder.finish())
    };
    RecordBatch::try_new(
        schema(),
        vec![
            text(|row| &row.sample_id),
            text(|row| &row.source),
            text(|row| &row.prompt),
            ids(|row| &row.prompt_ids),
            ids(|row| &row.response_ids),
            optional(|row| row.reference.as_deref()),
            Arc::new(reference_ids_to_array(rows)),
            Arc::new(blocks_to_array(rows)?),
            Arc::new(flags_to_array(rows)),
            text(|row| match row.finish_reason {
                FinishReason::Eos => "eos",
                FinishReason::Length => "length",
            }),
            optional(|row| row.meta.as_deref()),
        ],
    )
}

fn reference_ids_to_array(rows: &[Trajectory]) -> ListArray {
    let mut builder = ListBuilder::new(Int32Builder::new());
    for row in rows {
        builder.values().append_slice(row.reference_ids.as_deref().unwrap_or_default());
        builder.append(row.reference_ids.is_some());
    }
    builder.finish()
}

fn blocks_to_array(rows: &[Trajectory]) -> Result<ListArray, ArrowError> {
    let blocks = || rows.iter().flat_map(|row| &row.blocks);
    let starts = Int32Array::from_iter_values(blocks().map(|block| block.start as i32));
    let mut states = ListBuilder::new(ListBuilder::new(Int32Builder::new()));
    for block in blocks() {
        for state in &block.states {
            states.values().values().append_slice(state);
            states.values().append(true);
        }
        states.append(true);
    }
    let structs = StructArray::try_new(block_fields(), vec![Arc::new(starts), Arc::new(states.finish())], None)?;
    let offsets = OffsetBuffer::from_lengths(rows.iter().map(|row| row.blocks.len()));
    let item = Arc::new(Field::new("item", DataType::Struct(block_fields()), true));
    ListArray::try_new(item, offsets, Arc::new(structs), None)
}

fn flags_to_array(rows: &[Trajectory]) -> ListArray {
    let mut builder = ListBuilder::new(ListBuilder::new(BooleanBuilder::new()));
    for row in rows {
        for flags in row.augmented.iter().flatten() {
            builder.values().values().append_slice(flags);
            builder.values().append(true);
        }
        builder.append(row.augmented.is_some());
    }
    builder.finish()
}

/// Converts a record batch whose schema has been checked.
pub(super) fn batch_to_rows(batch: &RecordBatch) -> Result<Vec<Trajectory>, String> {
    let column = |name: &str| batch.column_by_name(name).ok_or_else(|| format!("column `{name}` is missing"));
    let text = |name: &str| Ok::<_, String>(column(name)?.as_string::<i32>());
    let list = |name: &str| Ok::<_, String>(column(name)?.as_list::<i32>());
    let (sample_id, source, prompt) = (text("sample_id")?, text("source")?, text("prompt")?);
    let (prompt_ids, response_ids) = (list("prompt_ids")?, list("response_ids")?);
    let (reference, meta, finish_reason) = (text("reference")?, text("meta")?, text("finish_reason")?);
    let (blocks, augmented) = (list("blocks")?, list("augmented")?);
    let reference_ids = list(REFERENCE_IDS).ok();
    let row = |row: usize| {
        let optional = |values: &StringArray| values.is_valid(row).then(|| values.value(row).to_owned());
        let required = |name: &str, values| optional(values).ok_or_else(|| format!("row {row}: `{name}` is null"));
        Ok(Trajectory {
            sample_id: required("sample_id", sample_id)?,
            source: required("source", source)?,
            prompt: required("prompt", prompt)?,
            prompt_ids: ids_in(prompt_ids, row),
            response_ids: ids_in(response_ids, row),
            reference: optional(reference),
            reference_ids: reference_ids.filter(|ids| ids.is_valid(row)).map(|ids| ids_in(ids, row)),
            blocks: blocks_in(blocks, row),
            augmented: augmented.is_valid(row).then(|| flags_in(augmented, row)),
            finish_reason: match required("finish_reason", finish_reason)?.as_str() {
                "eos" => FinishReason::Eos,
                "length" => FinishReason::Length,
                other => return Err(format!("row {row}: finish_reason is `{other}`, expected eos or length")),
            },
            meta: optional(meta),
        })
    };
    (0..batch.num_rows()).map(row).collect()
}

/// Indices of one list's items among the values of all lists.
fn item_range(lists: &ListArray, index: usize) -> Range<usize> {
    let offsets = lists.value_offsets();
    offsets[index] as usize..offsets[index + 1] as usize
}

fn ids_in(lists: &ListArray, index: usize) -> Vec<i32> {
    lists.values().as_primitive::<Int32Type>().values()[item_range(lists, index)].to_vec()
}

fn blocks_in(lists: &ListArray, index: usize) -> Vec<Block> {
    let structs = lists.values().as_struct();
    let (starts, state_lists) = (structs.column(0).as_primitive::<Int32Type>(), structs.column(1).as_list::<i32>());
    let states = state_lists.values().as_list::<i32>();
    let block = |index: usize| Block {
        start: starts.value(index) as u32,
        states: item_range(state_lists, index).map(|state| ids_in(states, state)).collect(),
    };
    item_range(lists, index).map(block).collect()
}

fn flags_in(lists: &ListArray, index: usize) -> Vec<Vec<bool>> {
    let of_blocks = lists.values().as_list::<i32>();
    let flags = of_blocks.values().as_boolean();
    let of_block =
        |index: usize| item_range(of_blocks, index).map(|flag| flags.is_valid(flag) && flags.value(flag)).collect();
    item_range(lists, index).map(of_block).collect()
}
