//! The JSON trajectory files of the CLLM reference implementation
//! (github.com/hao-ai-lab/Consistency_LLM): one array with one record per block.

use std::fmt;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use cllm_core::trajectory::Provenance;
use cllm_core::{Error, Result};
use serde::de::{DeserializeSeed, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// Token ids, nested in as many lists as the tensor that they come from had dimensions.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Ids {
    One(i32),
    Many(Vec<Ids>),
}

/// One block of one response. The fields from `source` on are extensions that other readers ignore.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Id of the response, the same for all of its blocks.
    pub data_id: String,
    /// `itr_0` for the first block, and so on.
    pub jacobian_itr_id: String,
    /// Length of the prompt, inside a list. It is written but never read.
    #[serde(default)]
    pub prompt_ids_len: serde_json::Value,
    /// The prompt and the response before this block.
    pub prompt_ids: Ids,
    /// Every state of the block, the fixed point last.
    pub answer_trajectory_ids: Vec<Vec<i32>>,
    /// `prompt_ids` and the fixed point.
    pub teacher_output_ids: Ids,
    /// The prompt and the whole response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub complete_teacher_output_ids: Option<Ids>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference_ids: Option<Vec<i32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<String>,
    /// For each state, whether `augment` changed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub augmented: Option<Vec<bool>>,
    /// Position of the response in the data set that was exported, from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub row: Option<u32>,
    /// The data set that was exported. Only the first record of the file has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_set: Option<ExportedDataSet>,
}

/// What a data set has besides its rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ExportedDataSet {
    pub provenance: Provenance,
    /// Number of rows in each shard.
    pub shards: Vec<usize>,
}

impl Ids {
    /// A list of ids.
    pub(crate) fn from_list(ids: &[i32]) -> Self {
        Ids::Many(ids.iter().copied().map(Ids::One).collect())
    }

    /// A list with one list of ids, as the reference implementation writes tensors of batch size 1.
    pub(crate) fn from_batch_of_one(ids: &[i32]) -> Self {
        Ids::Many(vec![Ids::from_list(ids)])
    }

    pub(crate) fn flatten(&self) -> Vec<i32> {
        let mut flat = Vec::new();
        self.append_to(&mut flat);
        flat
    }

    fn append_to(&self, flat: &mut Vec<i32>) {
        match self {
            Ids::One(id) => flat.push(*id),
            Ids::Many(inner) => inner.iter().for_each(|ids| ids.append_to(flat)),
        }
    }
}

impl Record {
    /// Index of the block in its response; `None` if the id is malformed.
    pub(crate) fn block_index(&self) -> Option<usize> {
        self.jacobian_itr_id.strip_prefix("itr_")?.parse().ok()
    }

    pub(crate) fn is_of_same_response(&self, other: &Record) -> bool {
        (self.row, &self.data_id) == (other.row, &other.data_id)
    }
}

/// Calls `on_record` with every record of a file. Memory use does not grow with the file.
pub(crate) fn read(path: &Path, mut on_record: impl FnMut(Record) -> Result<()>) -> Result<()> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut failure = None;
    let mut json = serde_json::Deserializer::from_reader(BufReader::new(file));
    let records = RecordVisitor { on_record: &mut on_record, failure: &mut failure };
    let parsed = records.deserialize(&mut json).and_then(|()| json.end());
    match (failure, parsed) {
        (Some(failure), _) => Err(failure),
        (None, Ok(())) => Ok(()),
        (None, Err(error)) => {
            Err(Error::file(path, format!("is not a trajectory file of the reference implementation: {error}")))
        }
    }
}

/// Visits the records as they are parsed, instead of collecting them first.
struct RecordVisitor<'r, F> {
    on_record: &'r mut F,
    /// The error of `on_record`. The records that follow it are parsed but not visited.
    failure: &'r mut Option<Error>,
}

impl<'de, F: FnMut(Record) -> Result<()>> DeserializeSeed<'de> for RecordVisitor<'_, F> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, F: FnMut(Record) -> Result<()>> Visitor<'de> for RecordVisitor<'_, F> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of records with data_id, jacobian_itr_id, prompt_ids, answer_trajectory_ids")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut records: A) -> std::result::Result<(), A::Error> {
        while let Some(record) = records.next_element()? {
            if let Err(error) = (self.on_record)(record) {
                *self.failure = Some(error);
                while records.next_element::<IgnoredAny>()?.is_some() {}
                break;
            }
        }
        Ok(())
    }
}
