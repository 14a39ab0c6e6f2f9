//! The JSON trajectory files of the CLLM reference implementation (github.com/hao-ai-lab/Consistency_LLM): one array with a
//! record a block.

use std::fmt;
use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use cllm_core::{Error, Result};
use serde::de::{DeserializeSeed, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

/// Token ids, wrapped in as many lists as the tensor had dimensions.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Ids {
    One(i32),
    Many(Vec<Ids>),
}

/// One block of one response. The last four are ours: other readers pass over them.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    /// Same for all blocks of a response.
    pub data_id: String,
    /// `itr_0` and so on.
    pub jacobian_itr_id: String,
    /// Length of the prompt, in a list; written, never used.
    #[serde(default)]
    pub prompt_ids_len: serde_json::Value,
    /// Prompt and the fixed points of the blocks before.
    pub prompt_ids: Ids,
    /// Every state of the block.
    pub answer_trajectory_ids: Vec<Vec<i32>>,
    /// `prompt_ids` and the fixed point.
    pub teacher_output_ids: Ids,
    /// Prompt and the whole response.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub complete_teacher_output_ids: Option<Ids>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<String>,
}

impl Ids {
    pub(crate) fn nested(ids: Vec<i32>) -> Self {
        Ids::Many(vec![Ids::Many(ids.into_iter().map(Ids::One).collect())])
    }

    pub(crate) fn flat(self) -> Vec<i32> {
        let mut flat = Vec::new();
        self.append_to(&mut flat);
        flat
    }

    fn append_to(self, flat: &mut Vec<i32>) {
        match self {
            Ids::One(id) => flat.push(id),
            Ids::Many(inner) => inner.into_iter().for_each(|ids| ids.append_to(flat)),
        }
    }
}

impl Record {
    /// Number of the block in its response.
    pub(crate) fn block(&self) -> Option<usize> {
        self.jacobian_itr_id.strip_prefix("itr_")?.parse().ok()
    }
}

/// Hands every record of the file to `each`, in constant memory.
pub(crate) fn read(path: &Path, mut each: impl FnMut(Record) -> Result<()>) -> Result<()> {
    let file = File::open(path).map_err(Error::io(path))?;
    let mut failure = None;
    let mut json = serde_json::Deserializer::from_reader(BufReader::new(file));
    let records = Records { each: &mut each, failure: &mut failure };
    let parsed = records.deserialize(&mut json).and_then(|()| json.end());
    match (failure, parsed) {
        (Some(failure), _) => Err(failure),
        (None, Ok(())) => Ok(()),
        (None, Err(error)) => {
            Err(Error::file(path, format!("is no trajectory file of the reference implementation: {error}")))
        }
    }
}

struct Records<'r, F> {
    each: &'r mut F,
    failure: &'r mut Option<Error>,
}

impl<'de, F: FnMut(Record) -> Result<()>> DeserializeSeed<'de> for Records<'_, F> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, deserializer: D) -> std::result::Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, F: FnMut(Record) -> Result<()>> Visitor<'de> for Records<'_, F> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of records with data_id, jacobian_itr_id, prompt_ids, answer_trajectory_ids")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut records: A) -> std::result::Result<(), A::Error> {
        while let Some(record) = records.next_element()? {
            if let Err(error) = (self.each)(record) {
                *self.failure = Some(error);
                while records.next_element::<IgnoredAny>()?.is_some() {}
                break;
            }
        }
        Ok(())
    }
}
