//! Reads a data set in constant memory: row by row, or in pieces on all cores.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};

use arrow::datatypes::Schema;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::file::metadata::{ColumnChunkMetaData, RowGroupMetaData};
use serde_json::json;

use super::schema::{PROVENANCE_KEY, VERSION_KEY, from_batch, schema};
use super::writer::{Manifest, difference, read_manifest};
use super::{Provenance, SCHEMA_VERSION, Trajectory};
use crate::{Error, Result, fingerprint, interrupt, parquet_file};

/// Rows that are decoded at once.
const BATCH_ROWS: usize = 64;
/// Most rows of a piece, and most values (tokens, nearly all), unless a single row group has more.
const PIECE_ROWS: usize = 1024;
const PIECE_VALUES: usize = 8 << 20;

/// What is said of a data set whose manifest is not complete.
pub const INCOMPLETE_DATA_SET: &str = "is not complete: the run that writes it was stopped, or still goes on; run the same command \
                                   (collect, augment, clean or import) again to finish it";

/// A data set opened for reading.
pub struct Reader {
    path: PathBuf,
    shards: Vec<Shard>,
    rows: usize,
    provenance: Provenance,
    complete: bool,
}

struct Shard {
    path: PathBuf,
    /// Rows and values of each row group.
    groups: Vec<(usize, usize)>,
}

/// Consecutive rows of a data set, few enough to be held in memory.
pub struct RowChunk {
    rows: usize,
    /// Shards and row groups in them.
    places: Vec<(PathBuf, Vec<usize>)>,
}

impl RowChunk {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Whether there are no rows.
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }
}

impl Reader {
    /// Opens a whole data set: its folder, or one shard.
    ///
    /// # Errors
    /// [`Error::File`] for a folder without a manifest, a data set that is not complete, a shard that is missing or cut off,
    /// of another schema or version.
    pub fn open(path: &Path) -> Result<Self> {
        // Before its shards, of which there may be none yet.
        if path.is_dir() && !expect_manifest(path)?.complete {
            return Err(Error::file(path, INCOMPLETE_DATA_SET));
        }
        Reader::open_incomplete(path)
    }

    /// Opens what there is of a data set, whether the run that writes it has ended or not.
    ///
    /// # Errors
    /// As [`Reader::open`], but for a data set that is not complete.
    pub fn open_incomplete(path: &Path) -> Result<Self> {
        let (shards, complete): (Vec<(PathBuf, Option<usize>)>, bool) = if path.is_dir() {
            let manifest = expect_manifest(path)?;
            let shards = manifest.shards.into_iter().map(|(name, rows)| (path.join(name), Some(rows)));
            (shards.collect(), manifest.complete)
        } else {
            (vec![(path.to_owned(), None)], true)
        };
        let mut rows = 0;
        let mut provenance = None;
        let mut opened = Vec::with_capacity(shards.len());
        for (shard, promised) in &shards {
            // Not before the first: what a stopped run kept, a single file, is read even while the next one is stopped.
            if !opened.is_empty() {
                interrupt::check()?;
            }
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
            let values =
                |group: &RowGroupMetaData| group.columns().iter().map(ColumnChunkMetaData::num_values).sum::<i64>();
            let groups = builder.metadata().row_groups().iter();
            let groups = groups.map(|group| (group.num_rows() as usize, values(group) as usize)).collect();
            opened.push(Shard { path: shard.clone(), groups });
        }
        let provenance = provenance.ok_or_else(|| Error::file(path, "holds no rows yet"))?;
        Ok(Reader { path: path.to_owned(), shards: opened, rows, provenance, complete })
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

    /// Whether the run that writes it has ended.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Refuses a tokenizer that is not the one of the data set, by its fingerprint.
    ///
    /// # Errors
    /// [`Error::File`] with both fingerprints.
    pub fn check_tokenizer(&self, fingerprint: &str) -> Result<()> {
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
        let all = |shard: &Shard| (shard.path.clone(), (0..shard.groups.len()).collect());
        Rows::of(self.shards.iter().map(all).collect())
    }

    /// All rows in pieces, in order. They depend on the files alone, not on the machine.
    pub fn row_chunks(&self) -> Vec<RowChunk> {
        let mut pieces: Vec<RowChunk> = Vec::new();
        let mut values = 0;
        for shard in &self.shards {
            for (index, &(rows, more)) in shard.groups.iter().enumerate() {
                let fits = |piece: &&mut RowChunk| piece.rows + rows <= PIECE_ROWS && values + more <= PIECE_VALUES;
                match pieces.last_mut().filter(fits) {
                    Some(piece) => {
                        piece.rows += rows;
                        values += more;
                        match piece.places.last_mut().filter(|(path, _)| *path == shard.path) {
                            Some((_, groups)) => groups.push(index),
                            None => piece.places.push((shard.path.clone(), vec![index])),
                        }
                    }
                    None => {
                        pieces.push(RowChunk { rows, places: vec![(shard.path.clone(), vec![index])] });
                        values = more;
                    }
                }
            }
        }
        pieces
    }

    /// The rows of a piece, as [`Reader::rows`] gives them.
    pub fn chunk_rows(&self, piece: &RowChunk) -> Rows {
        Rows { promised: Some(self.provenance.clone()), ..Rows::of(piece.places.clone()) }
    }
}

/// Iterator over the rows of a data set.
pub struct Rows {
    /// Shards and row groups to come, the next one last.
    waiting: Vec<(PathBuf, Vec<usize>)>,
    shard: Option<(PathBuf, ParquetRecordBatchReader)>,
    ready: std::vec::IntoIter<Trajectory>,
    /// What each row is checked against.
    promised: Option<Provenance>,
}

impl Rows {
    fn of(mut places: Vec<(PathBuf, Vec<usize>)>) -> Self {
        places.reverse();
        Rows { waiting: places, shard: None, ready: Vec::new().into_iter(), promised: None }
    }

    /// Decodes the next batch; false at the end.
    fn fill(&mut self) -> Result<bool> {
        loop {
            if let Some((path, batches)) = &mut self.shard {
                let decoded = parquet_file::catch_panic(path, || {
                    let Some(batch) = batches.next() else { return Ok(None) };
                    let batch = batch.map_err(|error| damaged(path, error))?;
                    from_batch(&batch).map(Some).map_err(|message| Error::file(&*path, message))
                })?;
                if let Some(rows) = decoded {
                    for row in &rows {
                        let checked = self.promised.as_ref().map_or(Ok(()), |provenance| row.check(provenance));
                        checked.map_err(|message| Error::file(&*path, format!("`{}`: {message}", row.sample_id)))?;
                    }
                    self.ready = rows.into_iter();
                    return Ok(true);
                }
                self.shard = None;
            }
            let Some((path, groups)) = self.waiting.pop() else { return Ok(false) };
            let (builder, _) = open_shard(&path)?;
            let builder = builder.with_row_groups(groups).with_batch_size(BATCH_ROWS);
            let batches = parquet_file::catch_panic(&path, || builder.build().map_err(|error| damaged(&path, error)))?;
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

/// Fingerprint of a data set without a look at its rows: its provenance, and name, rows and bytes of each shard. Of a single
/// shard, that of its content.
///
/// # Errors
/// A folder without a manifest, a shard that is missing.
pub fn fingerprint(path: &Path) -> Result<String> {
    if !path.is_dir() {
        return fingerprint::hash_files(&[path]);
    }
    let manifest = expect_manifest(path)?;
    let bytes = |(name, _): &(String, usize)| {
        let shard = path.join(name);
        Ok(std::fs::metadata(&shard).map_err(Error::io(&shard))?.len())
    };
    let bytes = manifest.shards.iter().map(bytes).collect::<Result<Vec<u64>>>()?;
    Ok(fingerprint::hash_bytes(json!([manifest.provenance, manifest.shards, bytes]).to_string().as_bytes()))
}

fn expect_manifest(folder: &Path) -> Result<Manifest> {
    let found = match read_manifest(folder)? {
        Some(manifest) => Some(manifest),
        None => joined_manifest(folder)?,
    };
    found.ok_or_else(|| Error::file(folder, "holds no manifest.json: it is no trajectory data set"))
}

/// The name of the share that process `rank` of `world` collects, a folder of the data set's.
pub fn rank_folder(rank: usize, world: usize) -> String {
    format!("rank-{rank}-of-{world}")
}

/// The manifest of a data set in shares, which several processes collected; `None` where there are none.
fn joined_manifest(folder: &Path) -> Result<Option<Manifest>> {
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let worlds: BTreeSet<usize> =
        names.filter_map(|name| name.strip_prefix("rank-")?.split_once("-of-")?.1.parse().ok()).collect();
    let Some(&world) = worlds.first() else { return Ok(None) };
    if worlds.len() > 1 {
        let message = format!("holds shares of runs of {worlds:?} processes: keep those of one");
        return Err(Error::file(folder, message));
    }
    let mut joined: Option<Manifest> = None;
    for name in (0..world).map(|rank| rank_folder(rank, world)) {
        let part = folder.join(&name);
        let Some(mut manifest) = (if part.is_dir() { read_manifest(&part)? } else { None }) else {
            let message = format!("is missing: the process that collects it was stopped early; {INCOMPLETE_DATA_SET}");
            return Err(Error::file(part, message));
        };
        manifest.shards.iter_mut().for_each(|(shard, _)| *shard = format!("{name}/{shard}"));
        match &mut joined {
            None => joined = Some(manifest),
            Some(joined) => {
                joined.shards.extend(manifest.shards);
                joined.complete &= manifest.complete;
            }
        }
    }
    Ok(joined)
}

fn damaged(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::file(path, format!("is damaged ({error}); copy it again, or delete the data set's folder and collect again"))
}

pub(super) fn open_shard(path: &Path) -> Result<(ParquetRecordBatchReaderBuilder<File>, Provenance)> {
    parquet_file::catch_panic(path, || open_whole_shard(path))
}

fn open_whole_shard(path: &Path) -> Result<(ParquetRecordBatchReaderBuilder<File>, Provenance)> {
    let file = File::open(path).map_err(Error::io(path))?;
    if path.extension().is_some_and(|ending| ending == "jsonl") {
        let message =
            "is no trajectory data set, perhaps a prompt set: expected the folder that `cllm-data collect` made";
        return Err(Error::file(path, message));
    }
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
