//! Reads a data set in constant memory: row by row, or in chunks of rows that several threads can
//! read at once.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::datatypes::Schema;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::metadata::RowGroupMetaData;

use super::manifest::{INCOMPLETE_DATA_SET, MANIFEST, MAX_NUMBER, Manifest, Provenance, ShardEntry};
use super::row::Trajectory;
use super::schema::{
    CREATED_BY, PROVENANCE_KEY, REFERENCE_IDS, SCHEMA_VERSION, VERSION_KEY, batch_to_rows, holds_same_values, schema,
};
use crate::checksum::Checksum;
use crate::progress::count;
use crate::{Error, Result, interrupt, parquet_file};

/// Rows that are decoded at once.
const BATCH_ROWS: usize = 64;
/// Limits of a [`RowChunk`]: rows, and values (nearly all of them tokens). A single row group may
/// exceed them.
const MAX_CHUNK_ROWS: usize = 1024;
const MAX_CHUNK_VALUES: usize = 8 << 20;

const DAMAGED_ADVICE: &str = "copy it again, or delete the data set's folder and collect again";

/// A data set opened for reading.
pub struct Reader {
    path: PathBuf,
    shards: Vec<Shard>,
    provenance: Provenance,
    complete: bool,
}

/// An open shard: its footer has been read, its rows have not.
struct Shard {
    file: Arc<ShardFile>,
    row_groups: Vec<RowGroup>,
    provenance: Provenance,
    /// Whether another program wrote the rows again and lost the metadata.
    is_rewritten: bool,
}

struct RowGroup {
    num_rows: usize,
    num_values: usize,
}

/// The file of a shard, which is compared with its checksum before the first of its rows is read.
struct ShardFile {
    path: PathBuf,
    checksum: Option<Checksum>,
    is_checked: Mutex<bool>,
}

impl ShardFile {
    fn check(&self) -> Result<()> {
        // Threads that read other rows of the shard wait, so that it is hashed once.
        let mut is_checked = self.is_checked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(checksum) = self.checksum.filter(|_| !*is_checked) {
            checksum.check_on_one_thread(&self.path, MANIFEST, DAMAGED_ADVICE)?;
            *is_checked = true;
        }
        Ok(())
    }
}

/// Some row groups of one shard.
#[derive(Clone)]
struct ShardSlice {
    file: Arc<ShardFile>,
    row_groups: Vec<usize>,
}

/// Consecutive rows of a data set, few enough to be held in memory.
pub struct RowChunk {
    num_rows: usize,
    slices: Vec<ShardSlice>,
}

impl RowChunk {
    pub fn num_rows(&self) -> usize {
        self.num_rows
    }

    fn push(&mut self, file: &Arc<ShardFile>, row_group: usize) {
        match self.slices.last_mut() {
            Some(slice) if Arc::ptr_eq(&slice.file, file) => slice.row_groups.push(row_group),
            _ => self.slices.push(ShardSlice { file: Arc::clone(file), row_groups: vec![row_group] }),
        }
    }
}

impl Shard {
    /// Opens a shard, with its entry in the manifest if it has one.
    fn open(path: &Path, manifest: Option<&Manifest>, entry: Option<&ShardEntry>) -> Result<Self> {
        let (builder, provenance) = open_shard(path, manifest)?;
        // A damaged footer may have any number.
        let number = |number: i64| {
            let is_possible = (0..MAX_NUMBER as i64).contains(&number);
            is_possible.then_some(number as usize).ok_or_else(|| damaged(path, "a number in its footer"))
        };
        let row_group = |group: &RowGroupMetaData| {
            let values = group.columns().iter().map(|column| number(column.num_values()));
            Ok(RowGroup { num_rows: number(group.num_rows())?, num_values: values.sum::<Result<usize>>()? })
        };
        let row_groups = builder.metadata().row_groups().iter().map(row_group).collect::<Result<_>>()?;
        let created_by = builder.metadata().file_metadata().created_by().unwrap_or_default();
        let is_rewritten = metadata_value(&builder, VERSION_KEY).is_none() && !created_by.starts_with(CREATED_BY);
        let checksum = entry.and_then(|entry| entry.checksum).filter(|_| !is_rewritten);
        let file = Arc::new(ShardFile { path: path.to_owned(), checksum, is_checked: Mutex::new(false) });
        Ok(Shard { file, row_groups, provenance, is_rewritten })
    }

    fn num_rows(&self) -> usize {
        self.row_groups.iter().map(|group| group.num_rows).sum()
    }
}

impl Reader {
    /// Opens a complete data set: its folder, or one of its shards.
    ///
    /// # Errors
    /// [`Error::File`] for a folder without a manifest, a data set that is not complete, and a
    /// shard that is missing, damaged or of another schema version.
    pub fn open(path: &Path) -> Result<Self> {
        // Checked before the shards are opened: an incomplete data set may not have any yet.
        if path.is_dir() && !Manifest::load(path)?.complete {
            return Err(Error::file(path, INCOMPLETE_DATA_SET));
        }
        Reader::open_incomplete(path)
    }

    /// Opens a data set, whether the run that writes it has ended or not.
    ///
    /// # Errors
    /// As [`Reader::open`], except for a data set that is not complete.
    pub fn open_incomplete(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            let beside = Manifest::beside(path)?;
            let entry = beside.as_ref().and_then(|manifest| manifest.entry_of(path));
            let shard = Shard::open(path, beside.as_ref(), entry)?;
            let provenance = shard.provenance.clone();
            return Ok(Reader { path: path.to_owned(), shards: vec![shard], provenance, complete: true });
        }
        let manifest = Manifest::load(path)?;
        let mut shards: Vec<Shard> = Vec::with_capacity(manifest.shards.len());
        for entry in &manifest.shards {
            // A data set of one shard opens at once: a run that is being stopped can still check
            // it.
            if !shards.is_empty() {
                interrupt::check()?;
            }
            let shard = Shard::open(&path.join(&entry.name), Some(&manifest), Some(entry))?;
            check_shard(&shard, entry.num_rows, &manifest.provenance)?;
            shards.push(shard);
        }
        if shards.is_empty() {
            return Err(Error::file(path, "has no rows yet"));
        }
        let Manifest { provenance, complete, .. } = manifest;
        Ok(Reader { path: path.to_owned(), shards, provenance, complete })
    }

    pub fn num_rows(&self) -> usize {
        self.shards.iter().map(Shard::num_rows).sum()
    }

    /// The errors of the shards that are not as they were written.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn damage(&self) -> Result<Vec<Error>> {
        let mut damage = Vec::new();
        for shard in &self.shards {
            interrupt::check()?;
            damage.extend(shard.file.check().err());
        }
        Ok(damage)
    }

    /// Number of rows in each shard, in order.
    pub fn shard_rows(&self) -> Vec<usize> {
        self.shards.iter().map(Shard::num_rows).collect()
    }

    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// Whether the run that writes the data set has ended.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Refuses a model whose tokenizer, given by its fingerprint, is not the data set's.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn check_tokenizer(&self, fingerprint: &str) -> Result<()> {
        if self.provenance.tokenizer == fingerprint {
            return Ok(());
        }
        let message = "the data set's tokenizer is not that of the model: name the model that collected it, or one with \
                       the same tokenizer";
        Err(Error::file(&self.path, message))
    }

    /// The rows in order. The first row that breaks a guarantee of [`Trajectory::check`] ends them
    /// with an error.
    pub fn rows(&self) -> Rows {
        Rows { check_against: Some(self.provenance.clone()), ..self.unchecked_rows() }
    }

    /// The rows in order without checks, for code that reports what is wrong with them.
    pub fn unchecked_rows(&self) -> Rows {
        let whole = |shard: &Shard| ShardSlice {
            file: Arc::clone(&shard.file),
            row_groups: (0..shard.row_groups.len()).collect(),
        };
        Rows::new(self.shards.iter().map(whole).collect())
    }

    /// All rows in chunks, in order. The chunks depend only on the files, not on the machine.
    pub fn row_chunks(&self) -> Vec<RowChunk> {
        let mut chunks: Vec<RowChunk> = Vec::new();
        let mut num_values = 0;
        for shard in &self.shards {
            for (index, group) in shard.row_groups.iter().enumerate() {
                let fits = |chunk: &&mut RowChunk| {
                    chunk.num_rows + group.num_rows <= MAX_CHUNK_ROWS
                        && num_values + group.num_values <= MAX_CHUNK_VALUES
                };
                match chunks.last_mut().filter(fits) {
                    Some(chunk) => {
                        chunk.num_rows += group.num_rows;
                        num_values += group.num_values;
                        chunk.push(&shard.file, index);
                    }
                    None => {
                        let slice = ShardSlice { file: Arc::clone(&shard.file), row_groups: vec![index] };
                        chunks.push(RowChunk { num_rows: group.num_rows, slices: vec![slice] });
                        num_values = group.num_values;
                    }
                }
            }
        }
        chunks
    }

    /// The rows of one chunk, checked as those of [`Reader::rows`] are.
    pub fn chunk_rows(&self, chunk: &RowChunk) -> Rows {
        Rows { check_against: Some(self.provenance.clone()), ..Rows::new(chunk.slices.clone()) }
    }
}

/// Refuses a shard that does not have the manifest's number of rows, or its provenance.
fn check_shard(shard: &Shard, expected_rows: usize, expected: &Provenance) -> Result<()> {
    let num_rows = shard.num_rows();
    if num_rows != expected_rows && !shard.is_rewritten {
        let message = format!(
            "has {}, but manifest.json says {expected_rows}: copy the whole folder again",
            count(num_rows, "row")
        );
        return Err(Error::file(&shard.file.path, message));
    }
    match expected.difference(&shard.provenance) {
        Some(difference) => {
            let (field, theirs, its) = (difference.field, difference.existing, difference.expected);
            // Two teachers may have the same name.
            let how = match its == theirs {
                true => format!("its {field} is another one"),
                false => format!("its {field} is {its}, that of the manifest {theirs}"),
            };
            let message = format!("belongs to another data set than its manifest.json: {how}");
            Err(Error::file(&shard.file.path, message))
        }
        None => Ok(()),
    }
}

/// Iterator over the rows of a data set.
pub struct Rows {
    /// Slices that have not been opened yet, the next one last.
    remaining: Vec<ShardSlice>,
    open: Option<(PathBuf, ParquetRecordBatchReader)>,
    /// Decoded rows that have not been returned yet.
    decoded: std::vec::IntoIter<Trajectory>,
    check_against: Option<Provenance>,
}

impl Rows {
    fn new(mut slices: Vec<ShardSlice>) -> Self {
        slices.reverse();
        Rows { remaining: slices, open: None, decoded: Vec::new().into_iter(), check_against: None }
    }

    /// Decodes and checks the next batch; false at the end of the data set.
    fn decode_batch(&mut self) -> Result<bool> {
        loop {
            if let Some((path, batches)) = &mut self.open {
                if let Some(rows) = next_batch(path, batches)? {
                    check_rows(path, &rows, self.check_against.as_ref())?;
                    self.decoded = rows.into_iter();
                    return Ok(true);
                }
                self.open = None;
            }
            let Some(ShardSlice { file, row_groups }) = self.remaining.pop() else { return Ok(false) };
            file.check()?;
            let path = file.path.clone();
            let builder = open_parquet(&path)?;
            let builder = builder.with_row_groups(row_groups).with_batch_size(BATCH_ROWS);
            let batches = parquet_file::catch_panic(&path, || builder.build().map_err(|error| damaged(&path, error)))?;
            self.open = Some((path, batches));
        }
    }
}

impl Iterator for Rows {
    type Item = Result<Trajectory>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(row) = self.decoded.next() {
                return Some(Ok(row));
            }
            match self.decode_batch() {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    self.remaining.clear();
                    self.open = None;
                    return Some(Err(error));
                }
            }
        }
    }
}

fn next_batch(path: &Path, batches: &mut ParquetRecordBatchReader) -> Result<Option<Vec<Trajectory>>> {
    parquet_file::catch_panic(path, || {
        let Some(batch) = batches.next() else { return Ok(None) };
        let batch = batch.map_err(|error| damaged(path, error))?;
        batch_to_rows(&batch).map(Some).map_err(|message| Error::file(path, message))
    })
}

fn check_rows(path: &Path, rows: &[Trajectory], provenance: Option<&Provenance>) -> Result<()> {
    let Some(provenance) = provenance else { return Ok(()) };
    rows.iter().try_for_each(|row| {
        row.check(provenance).map_err(|message| Error::file(path, format!("row `{}`: {message}", row.sample_id)))
    })
}

fn damaged(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::file(path, format!("is damaged ({error}); {DAMAGED_ADVICE}"))
}

/// Opens a shard and checks that its footer is that of a trajectory shard which this version can
/// read. Other programs lose the metadata when they write rows again; the manifest then says how
/// the rows were made.
pub(super) fn open_shard(
    path: &Path,
    manifest: Option<&Manifest>,
) -> Result<(ParquetRecordBatchReaderBuilder<File>, Provenance)> {
    parquet_file::catch_panic(path, || {
        let builder = open_parquet(path)?;
        let provenance = read_metadata(path, &builder, manifest)?;
        Ok((builder, provenance))
    })
}

fn open_parquet(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>> {
    let file = File::open(path).map_err(Error::io(path))?;
    if path.extension().is_some_and(|extension| extension == "jsonl") {
        let message = "is JSONL, perhaps a prompt set: expected a trajectory data set, the folder that `cllm-data \
                       collect` wrote";
        return Err(Error::file(path, message));
    }
    ParquetRecordBatchReaderBuilder::try_new(file)
        .map_err(|error| Error::file(path, format!("is not a complete Parquet file ({error}); {DAMAGED_ADVICE}")))
}

fn metadata_value(builder: &ParquetRecordBatchReaderBuilder<File>, key: &str) -> Option<String> {
    let metadata = builder.metadata().file_metadata().key_value_metadata()?;
    metadata.iter().find(|entry| entry.key == key).and_then(|entry| entry.value.clone())
}

fn read_metadata(
    path: &Path,
    builder: &ParquetRecordBatchReaderBuilder<File>,
    manifest: Option<&Manifest>,
) -> Result<Provenance> {
    let value = |key: &str| metadata_value(builder, key);
    let (version, provenance) = match (value(VERSION_KEY), manifest) {
        (Some(version), _) => {
            let provenance = serde_json::from_str(&value(PROVENANCE_KEY).unwrap_or_default());
            let unreadable = |error| Error::file(path, format!("has no readable provenance: {error}"));
            (version, provenance.map_err(unreadable))
        }
        (None, Some(manifest)) => (manifest.schema_version.to_string(), Ok(manifest.provenance.clone())),
        (None, None) => {
            let message = "is not a trajectory shard: it has no schema version in its metadata; if another program wrote \
                           its rows again, copy the manifest.json of the data set that they come from beside it";
            return Err(Error::file(path, message));
        }
    };
    if version != SCHEMA_VERSION.to_string() {
        let message = format!("has schema version {version}; this version ({}) reads {SCHEMA_VERSION}", crate::VERSION);
        return Err(Error::file(path, message));
    }
    if let Some(problem) = column_problem(builder.schema()) {
        return Err(Error::file(path, format!("is not a trajectory shard: {problem} (see docs/data-format.md)")));
    }
    provenance
}

/// The first column that is missing, superfluous or of a type that holds other values.
fn column_problem(actual: &Schema) -> Option<String> {
    let expected = schema();
    for field in expected.fields() {
        match actual.field_with_name(field.name()) {
            Err(_) if field.name() == REFERENCE_IDS => {}
            Err(_) => return Some(format!("it has no column `{}`", field.name())),
            Ok(column) if !holds_same_values(column.data_type(), field.data_type()) => {
                let (name, actual, expected) = (field.name(), column.data_type(), field.data_type());
                return Some(format!("its column `{name}` is {actual}, expected {expected}"));
            }
            Ok(_) => {}
        }
    }
    let is_extra = |name: &str| expected.field_with_name(name).is_err() && !is_pandas_index(name);
    let extra = actual.fields().iter().find(|field| is_extra(field.name()))?;
    Some(format!("it has an unknown column `{}`: leave it out", extra.name()))
}

/// The column in which pandas keeps the numbers of rows that were left when it filtered them.
fn is_pandas_index(name: &str) -> bool {
    name.starts_with("__index_level_")
}
