//! Reads a data set row by row in constant memory.

use std::fs::File;
use std::path::{Path, PathBuf};

use arrow::datatypes::Schema;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};

use super::schema::{PROVENANCE_KEY, VERSION_KEY, from_batch, schema};
use super::writer::{difference, read_manifest};
use super::{Provenance, SCHEMA_VERSION, Trajectory};
use crate::{Error, Result};

/// Rows that are decoded at once.
const BATCH_ROWS: usize = 64;

/// A data set opened for reading.
pub struct Reader {
    path: PathBuf,
    shards: Vec<PathBuf>,
    rows: usize,
    provenance: Provenance,
}

impl Reader {
    /// Opens a data set's folder, or one shard.
    ///
    /// # Errors
    /// [`Error::File`] for a folder without a manifest, a shard that is missing or cut off, of another schema or version.
    pub fn open(path: &Path) -> Result<Self> {
        let shards: Vec<(PathBuf, Option<usize>)> = if path.is_dir() {
            let manifest = read_manifest(path)?
                .ok_or_else(|| Error::file(path, "holds no manifest.json: it is no trajectory data set"))?;
            manifest.shards.into_iter().map(|(name, rows)| (path.join(name), Some(rows))).collect()
        } else {
            vec![(path.to_owned(), None)]
        };
        let mut rows = 0;
        let mut provenance = None;
        for (shard, promised) in &shards {
            let (builder, found) = open_shard(shard)?;
            let count = builder.metadata().file_metadata().num_rows() as usize;
            if let Some(promised) = promised.filter(|&promised| promised != count) {
                let message = format!("has {count} rows, manifest.json says {promised}: copy the whole folder again");
                return Err(Error::file(shard, message));
            }
            rows += count;
            if let Some(difference) = provenance.as_ref().and_then(|first| difference(first, &found)) {
                let message = format!("is of another data set than the shards before it ({difference})");
                return Err(Error::file(shard, message));
            }
            provenance.get_or_insert(found);
        }
        let provenance = provenance.ok_or_else(|| Error::file(path, "holds no rows yet"))?;
        Ok(Reader {
            path: path.to_owned(),
            shards: shards.into_iter().map(|(shard, _)| shard).collect(),
            rows,
            provenance,
        })
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// How the data set came to be.
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Refuses a tokenizer that is not the one of the data set, by its fingerprint.
    ///
    /// # Errors
    /// [`Error::File`] with both fingerprints.
    pub fn expect_tokenizer(&self, fingerprint: &str) -> Result<()> {
        let collected_with = &self.provenance.tokenizer;
        if collected_with == fingerprint {
            return Ok(());
        }
        let message = format!(
            "was collected with tokenizer {collected_with}, the model given has {fingerprint}: give the model that it was \
             collected with, or one of the same tokenizer"
        );
        Err(Error::file(&self.path, message))
    }

    /// The rows in order; one that breaks its promises ends them with an error.
    pub fn rows(&self) -> Rows {
        Rows { promised: Some(self.provenance.clone()), ..self.unchecked_rows() }
    }

    /// The rows in order, as they are; for those who count what is wrong with them.
    pub fn unchecked_rows(&self) -> Rows {
        let mut waiting = self.shards.clone();
        waiting.reverse();
        Rows { waiting, shard: None, ready: Vec::new().into_iter(), promised: None }
    }
}

/// Iterator over the rows of a data set.
pub struct Rows {
    waiting: Vec<PathBuf>,
    shard: Option<(PathBuf, ParquetRecordBatchReader)>,
    ready: std::vec::IntoIter<Trajectory>,
    /// What each row is checked against.
    promised: Option<Provenance>,
}

impl Rows {
    /// Decodes the next batch; false at the end.
    fn fill(&mut self) -> Result<bool> {
        loop {
            if let Some((path, batches)) = &mut self.shard {
                if let Some(batch) = batches.next() {
                    let batch = batch.map_err(|error| damaged(path, error))?;
                    let rows = from_batch(&batch).map_err(|message| Error::file(&*path, message))?;
                    for row in &rows {
                        let checked = self.promised.as_ref().map_or(Ok(()), |provenance| row.check(provenance));
                        checked.map_err(|message| Error::file(&*path, format!("`{}`: {message}", row.sample_id)))?;
                    }
                    self.ready = rows.into_iter();
                    return Ok(true);
                }
                self.shard = None;
            }
            let Some(path) = self.waiting.pop() else { return Ok(false) };
            let (builder, _) = open_shard(&path)?;
            let batches = builder.with_batch_size(BATCH_ROWS).build().map_err(|error| damaged(&path, error))?;
            self.shard = Some((path, batches));
        }
    }
}

impl Iterator for Rows {
    type Item = Result<Trajectory>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.ready.next() {
                return Some(Ok(row));
            }
            match self.fill() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.waiting.clear();
                    self.shard = None;
                    return Some(Err(error));
                }
            }
        }
    }
}

fn damaged(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::file(path, format!("is damaged ({error}); copy it again, or delete the data set's folder and collect again"))
}

pub(super) fn open_shard(path: &Path) -> Result<(ParquetRecordBatchReaderBuilder<File>, Provenance)> {
    let file = File::open(path).map_err(Error::io(path))?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|error| {
        let advice = "copy it again, or delete the data set's folder and collect again";
        Error::file(path, format!("is no whole Parquet file ({error}); {advice}"))
    })?;
    let metadata = builder.metadata().file_metadata().key_value_metadata().cloned().unwrap_or_default();
    let value = |key: &str| metadata.iter().find(|entry| entry.key == key).and_then(|entry| entry.value.clone());
    let version =
        value(VERSION_KEY).ok_or_else(|| Error::file(path, "is no trajectory shard: it has no schema version"))?;
    if version != SCHEMA_VERSION.to_string() {
        return Err(Error::file(
            path,
            format!("has schema version {version}, this toolkit ({}) reads {SCHEMA_VERSION}", crate::VERSION),
        ));
    }
    if let Some(message) = other_columns(builder.schema()) {
        return Err(Error::file(path, format!("is no trajectory shard: {message} (see docs/data-format.md)")));
    }
    let provenance = serde_json::from_str(&value(PROVENANCE_KEY).unwrap_or_default())
        .map_err(|error| Error::file(path, format!("has no readable provenance: {error}")))?;
    Ok((builder, provenance))
}

/// The first column that is not as it should be.
fn other_columns(found: &Schema) -> Option<String> {
    let wanted = schema();
    for field in wanted.fields() {
        match found.field_with_name(field.name()) {
            Err(_) => return Some(format!("it has no column `{}`", field.name())),
            Ok(other) if other.data_type() != field.data_type() => {
                let (name, found, wanted) = (field.name(), other.data_type(), field.data_type());
                return Some(format!("its column `{name}` is {found}, expected {wanted}"));
            }
            Ok(_) => {}
        }
    }
    let extra = found.fields().iter().find(|field| wanted.field_with_name(field.name()).is_err())?;
    Some(format!("it has a column `{}`, which none should", extra.name()))
}
