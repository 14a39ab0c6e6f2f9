//! Shards that appear whole or not at all, and the manifest over them.

use std::path::{Path, PathBuf};

use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::reader::{Reader, open_shard};
use super::schema::{PROVENANCE_KEY, VERSION_KEY, schema, to_batch};
use super::{Provenance, SCHEMA_VERSION, Trajectory};
use crate::{Error, Result, atomic_file, parquet_file, text_file};

/// Rows of a row group, and tokens of their states: bounds what a reader holds in memory.
const ROW_GROUP_ROWS: usize = 256;
const ROW_GROUP_TOKENS: usize = 4 << 20;

const MANIFEST: &str = "manifest.json";
/// How the names of shards begin.
const PART: &str = "part-";
/// File of the rows that a stopped run kept of a shard; not `*.parquet`, which readers of the data set ask for.
const STOPPED: &str = "stopped.partial";

/// The shards of a data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the schema.
    pub schema_version: u32,
    /// How the data set came to be.
    pub provenance: Provenance,
    /// Name and rows of each shard, in order.
    pub shards: Vec<(String, usize)>,
    /// Whether the run that writes it has ended.
    pub complete: bool,
}

impl Manifest {
    /// Rows of all shards.
    pub fn rows(&self) -> usize {
        self.shards.iter().map(|(_, rows)| rows).sum()
    }
}

/// Writes a data set shard by shard; after each, the manifest names it.
pub struct Writer {
    folder: PathBuf,
    manifest: Manifest,
}

impl Writer {
    /// Opens `folder` for writing, going on after the shards that an earlier run of the same provenance left there.
    ///
    /// # Errors
    /// [`Error::File`] when the folder holds a data set of another provenance, naming the field that differs.
    pub fn open(folder: &Path, provenance: Provenance) -> Result<Self> {
        // Nothing of ours is in a folder without a manifest.
        if folder.join(MANIFEST).exists() {
            atomic_file::recover(folder)?;
        }
        let manifest = match read_manifest(folder)? {
            None => Manifest { schema_version: SCHEMA_VERSION, provenance, shards: Vec::new(), complete: false },
            Some(mut found) => {
                if let Some(difference) = difference(&found.provenance, &provenance) {
                    return Err(Error::file(
                        folder,
                        format!(
                            "holds a data set made otherwise ({difference}); choose another output folder, or delete it"
                        ),
                    ));
                }
                let whole = found.shards.iter().take_while(|(name, rows)| holds(&folder.join(name), *rows)).count();
                found.shards.truncate(whole);
                found.complete = false;
                found
            }
        };
        let writer = Writer { folder: folder.to_owned(), manifest };
        // At once, so that a folder that cannot be written is found before there are rows to lose.
        writer.write_manifest()?;
        Ok(writer)
    }

    /// Opens `folder` for a data set that is made in one go: what a stopped run of the same provenance left is made again.
    ///
    /// # Errors
    /// As [`Writer::open`], and when the folder holds a whole data set.
    pub fn create(folder: &Path, provenance: Provenance) -> Result<Self> {
        if read_manifest(folder)?.is_some_and(|found| found.complete) {
            return Err(Error::file(folder, "holds a data set already; choose another output folder, or delete it"));
        }
        let stopped_before = folder.join(MANIFEST).exists();
        let mut writer = Writer::open(folder, provenance)?;
        writer.manifest.shards.clear();
        writer.write_manifest()?;
        if stopped_before {
            remove_shards(folder)?;
        }
        Ok(writer)
    }

    /// What is there so far.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Number of shards that are there.
    pub fn shards(&self) -> usize {
        self.manifest.shards.len()
    }

    /// Writes the next shard.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write_shard(&mut self, rows: &[Trajectory]) -> Result<()> {
        self.write_shards(&[rows])
    }

    /// Writes the next shards, on all cores.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write_shards(&mut self, shards: &[&[Trajectory]]) -> Result<()> {
        let first = self.manifest.shards.len();
        let names: Vec<String> =
            (first..first + shards.len()).map(|index| format!("{PART}{index:05}.parquet")).collect();
        names.par_iter().zip(shards).try_for_each(|(name, rows)| self.write_rows(name, rows))?;
        self.manifest.shards.extend(names.into_iter().zip(shards.iter().map(|rows| rows.len())));
        self.write_manifest()
    }

    /// The folder of the data set.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Keeps the rows of the shards that a stopped run had begun. They are no part of the data set yet.
    ///
    /// # Errors
    /// File-system errors.
    pub fn save_partial_rows(&self, rows: &[Trajectory]) -> Result<()> {
        self.write_rows(STOPPED, rows)
    }

    /// The rows that a stopped run kept, some of which may be in shards by now; they stay there until the data set is whole.
    pub fn partial_rows(&self) -> Vec<Trajectory> {
        // What cannot be read is made again.
        let rows = || Reader::open(&self.folder.join(STOPPED)).ok()?.rows().collect::<Result<Vec<_>>>().ok();
        rows().unwrap_or_default()
    }

    /// Forgets the rows that a stopped run kept.
    ///
    /// # Errors
    /// File-system errors.
    pub fn remove_partial_rows(&self) -> Result<()> {
        let path = self.folder.join(STOPPED);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::write(path)(error)),
            _ => Ok(()),
        }
    }

    fn write_rows(&self, name: &str, rows: &[Trajectory]) -> Result<()> {
        let path = self.folder.join(name);
        let failed = |error: ParquetError| parquet_file::write_error(&path, error);
        let provenance =
            serde_json::to_string(&self.manifest.provenance).map_err(|error| Error::file(&path, error.to_string()))?;
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(Default::default()))
            .set_created_by(format!("cllm {}", crate::VERSION))
            .set_key_value_metadata(Some(vec![
                KeyValue::new(VERSION_KEY.to_owned(), SCHEMA_VERSION.to_string()),
                KeyValue::new(PROVENANCE_KEY.to_owned(), provenance),
            ]))
            .build();
        atomic_file::write_with(&path, |file| {
            let mut writer = ArrowWriter::try_new(file, schema(), Some(properties)).map_err(failed)?;
            for group in row_groups(rows) {
                let batch = to_batch(group).map_err(|error| Error::file(&path, error.to_string()))?;
                writer.write(&batch).and_then(|()| writer.flush()).map_err(failed)?;
            }
            writer.close().map_err(failed)?;
            Ok(())
        })
    }

    /// Marks the data set as complete.
    ///
    /// # Errors
    /// File-system errors.
    pub fn finish(mut self) -> Result<Manifest> {
        // Without rows there still is a shard, so that columns and provenance can be read.
        if self.manifest.shards.is_empty() {
            self.write_shard(&[])?;
        }
        self.manifest.complete = true;
        self.write_manifest()?;
        Ok(self.manifest)
    }

    fn write_manifest(&self) -> Result<()> {
        atomic_file::write_json(&self.folder.join(MANIFEST), &self.manifest)
    }
}

/// The rows in stretches of a row group each.
fn row_groups(rows: &[Trajectory]) -> impl Iterator<Item = &[Trajectory]> {
    let tokens = |row: &Trajectory| row.blocks.iter().flat_map(|block| &block.states).map(Vec::len).sum::<usize>();
    let mut rest = rows;
    std::iter::from_fn(move || {
        let mut sum = 0;
        let fits = |row: &&Trajectory| {
            sum += tokens(row);
            sum <= ROW_GROUP_TOKENS
        };
        let count = rest.iter().take(ROW_GROUP_ROWS).take_while(fits).count().max(1);
        let (group, after) = rest.split_at_checked(count)?;
        rest = after;
        Some(group)
    })
}

/// Removes the shards that a run left which was killed, named in the manifest or not.
fn remove_shards(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(PART) && name.ends_with(".parquet") {
            let path = entry.path();
            std::fs::remove_file(&path).map_err(Error::write(&path))?;
        }
    }
    Ok(())
}

/// Whether a shard is there, whole as far as its footer tells, with so many rows.
fn holds(path: &Path, rows: usize) -> bool {
    open_shard(path).is_ok_and(|(builder, _)| builder.metadata().file_metadata().num_rows() == rows as i64)
}

/// The manifest of a data set, if the folder holds one.
pub(super) fn read_manifest(folder: &Path) -> Result<Option<Manifest>> {
    let path = folder.join(MANIFEST);
    if !path.exists() {
        return Ok(None);
    }
    let text = text_file::read(&path)?;
    serde_json::from_str(&text).map(Some).map_err(|error| Error::file(&path, format!("is no manifest: {error}")))
}

pub(super) fn difference(found: &Provenance, wanted: &Provenance) -> Option<String> {
    let (found, wanted) = (serde_json::to_value(found).ok()?, serde_json::to_value(wanted).ok()?);
    let wanted = wanted.as_object()?;
    let (key, value) = wanted.iter().find(|(key, value)| found[key.as_str()] != **value)?;
    Some(format!("{key} is {} there and {value} here", found[key.as_str()]))
}
