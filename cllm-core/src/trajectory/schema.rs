//! Converts rows to Arrow columns and back. The columns are described in `docs/data-format.md`.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BooleanBuilder, Int32Array, Int32Builder, ListArray, ListBuilder, RecordBatch,
    StringArray, StructArray, new_null_array,
};
use arrow::buffer::OffsetBuffer;
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, Fields, Int32Type, Schema, SchemaRef};
use arrow::error::ArrowError;

use super::row::{Block, FinishReason, Trajectory};

/// Version of the schema. A reader refuses any other.
pub const SCHEMA_VERSION: u32 = 1;
/// Key of the schema version in a shard's metadata.
pub(super) const VERSION_KEY: &str = "cllm.schema_version";
/// Key of the provenance (JSON) in a shard's metadata.
pub(super) const PROVENANCE_KEY: &str = "cllm.provenance";

/// What a shard that this toolkit wrote says about its writer; the version follows.
pub(super) const CREATED_BY: &str = "cllm ";

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

/// Whether a column of one type can be read as one of another: other programs write text, lists
/// and numbers in types of their own, and name the items of lists in their own way.
pub(super) fn holds_same_values(actual: &DataType, expected: &DataType) -> bool {
    use DataType::{
        Boolean, Dictionary, FixedSizeList, Int32, LargeList, LargeListView, LargeUtf8, List, ListView, Null, Struct,
        Utf8, Utf8View,
    };
    match (actual, expected) {
        (Dictionary(_, values), _) => holds_same_values(values, expected),
        // A column, or a list, without any value has no type.
        (Null, _) => true,
        (Utf8 | LargeUtf8 | Utf8View, Utf8) | (Boolean, Boolean) => true,
        (actual, Int32) => actual.is_integer(),
        (
            List(item) | LargeList(item) | ListView(item) | LargeListView(item) | FixedSizeList(item, _),
            List(expected_item),
        ) => holds_same_values(item.data_type(), expected_item.data_type()),
        (Struct(fields), Struct(expected_fields)) => {
            let holds = |expected: &Arc<Field>| {
                let field = fields.iter().find(|field| field.name() == expected.name());
                field.is_some_and(|field| holds_same_values(field.data_type(), expected.data_type()))
            };
            fields.len() == expected_fields.len() && expected_fields.iter().all(holds)
        }
        _ => false,
    }
}

/// The columns of a batch in our own types.
fn to_own_types(batch: &RecordBatch) -> Result<RecordBatch, String> {
    let column = |field: &Arc<Field>| {
        let (name, options) = (field.name(), CastOptions { safe: false, ..CastOptions::default() });
        let column = match batch.column_by_name(name) {
            Some(column) => column,
            // Earlier versions did not write it.
            None if name == REFERENCE_IDS => return Ok(new_null_array(field.data_type(), batch.num_rows())),
            None => return Err(format!("column `{name}` is missing")),
        };
        let own = cast_with_options(column, field.data_type(), &options);
        let own = own.map_err(|error| format!("column `{name}`: {error}"))?;
        if has_nulls_inside(&own) { Err(format!("column `{name}` has a null inside a list")) } else { Ok(own) }
    };
    let columns = schema().fields().iter().map(column).collect::<Result<Vec<_>, String>>()?;
    RecordBatch::try_new(schema(), columns).map_err(|error| error.to_string())
}

/// Whether an item of a list, at any depth, is null.
fn has_nulls_inside(array: &ArrayRef) -> bool {
    let is_broken = |item: &ArrayRef| item.null_count() > 0 || has_nulls_inside(item);
    match array.data_type() {
        DataType::List(_) => is_broken(array.as_list::<i32>().values()),
        DataType::Struct(_) => array.as_struct().columns().iter().any(is_broken),
        _ => false,
    }
}

/// Converts a record batch whose schema has been checked.
pub(super) fn batch_to_rows(batch: &RecordBatch) -> Result<Vec<Trajectory>, String> {
    let batch = &to_own_types(batch)?;
    let column = |name: &str| batch.column_by_name(name).ok_or_else(|| format!("column `{name}` is missing"));
    let text = |name: &str| Ok::<_, String>(column(name)?.as_string::<i32>());
    let list = |name: &str| Ok::<_, String>(column(name)?.as_list::<i32>());
    let (sample_id, source, prompt) = (text("sample_id")?, text("source")?, text("prompt")?);
    let (prompt_ids, response_ids) = (list("prompt_ids")?, list("response_ids")?);
    let (reference, meta, finish_reason) = (text("reference")?, text("meta")?, text("finish_reason")?);
    let (blocks, augmented) = (list("blocks")?, list("augmented")?);
    let reference_ids = list(REFERENCE_IDS)?;
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
            reference_ids: reference_ids.is_valid(row).then(|| ids_in(reference_ids, row)),
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

#[cfg(test)]
mod tests {
    use arrow::array::{Int64Builder, LargeListBuilder};

    use super::*;

    fn batch_with_prompt_ids(ids: [Option<i64>; 2]) -> RecordBatch {
        let row = Trajectory {
            sample_id: "a".into(),
            source: "jsonl/train".into(),
            prompt: "p".into(),
            prompt_ids: vec![1, 2],
            response_ids: vec![3],
            reference: None,
            reference_ids: None,
            blocks: vec![Block { start: 0, states: vec![vec![3]] }],
            augmented: None,
            finish_reason: FinishReason::Length,
            meta: None,
        };
        let own = rows_to_batch(&[row]).unwrap();
        let mut builder = LargeListBuilder::new(Int64Builder::new());
        builder.append_value(ids);
        let fields = own.schema().fields().iter().map(Arc::clone).collect::<Vec<_>>();
        let (mut fields, mut columns) = (fields, own.columns().to_vec());
        columns[3] = Arc::new(builder.finish());
        fields[3] = Arc::new(Field::new("prompt_ids", columns[3].data_type().clone(), true));
        RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).unwrap()
    }

    #[test]
    fn ids_of_64_bits_are_read_and_none_is_lost() {
        assert_eq!(batch_to_rows(&batch_with_prompt_ids([Some(7), Some(8)])).unwrap()[0].prompt_ids, [7, 8]);
        let error = batch_to_rows(&batch_with_prompt_ids([Some(7), Some(1 << 40)])).unwrap_err();
        assert!(error.contains("prompt_ids") && error.contains("1099511627776"), "{error}");
        let error = batch_to_rows(&batch_with_prompt_ids([Some(7), None])).unwrap_err();
        assert!(error.contains("prompt_ids") && error.contains("null"), "{error}");
    }
}
