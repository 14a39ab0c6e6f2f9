//! Writes shards that appear whole or not at all, and updates the manifest after each.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;
use rayon::prelude::*;

use super::manifest::{MANIFEST, Manifest, Provenance, SHARD_FOLDER, ShardEntry, expect_own_folder};
use super::reader::{Reader, open_shard};
use super::row::Trajectory;
use super::schema::{CREATED_BY, PROVENANCE_KEY, SCHEMA_VERSION, VERSION_KEY, rows_to_batch, schema};
use crate::checksum::Checksum;
use crate::{Error, Result, atomic_file, disk, parquet_file};

/// Limits of a row group: rows, and tokens in their states. They bound the memory of a reader.
const MAX_GROUP_ROWS: usize = 256;
const MAX_GROUP_TOKENS: usize = 4 << 20;

const SHARD_PREFIX: &str = "part-";
/// Holds the rows of a shard that a stopped run had not finished. It is not called `*.parquet`, so
/// that globs over the data set leave it out.
const PARTIAL_SHARD: &str = "stopped.partial";

/// What to do about a folder that holds a data set made otherwise.
const OTHER_FOLDER: &str = "choose another output folder, or delete this one";

/// Writes a data set shard by shard.
pub struct Writer {
    folder: PathBuf,
    manifest: Manifest,
}

impl Writer {
    /// Opens `folder` for writing and resumes after the shards that an earlier run with the same
    /// provenance wrote. A complete data set whose shards are all there stays complete, and nothing is
    /// written until another shard is.
    ///
    /// # Errors
    /// [`Error::File`] naming the field that differs if the folder holds a data set with another
    /// provenance; if it holds other files.
    pub fn open(folder: &Path, provenance: Provenance) -> Result<Self> {
        expect_own_folder(folder)?;
        atomic_file::recover(folder)?;
        atomic_file::recover(&folder.join(SHARD_FOLDER))?;
        // A run that failed before its first row leaves a manifest that says how nothing was made. A
        // process may also have no rows to make, and then its data set is complete without any.
        let is_empty = |existing: &Manifest| {
            !existing.complete && existing.shards.is_empty() && !folder.join(PARTIAL_SHARD).exists()
        };
        let manifest = match Manifest::read(folder)?.filter(|existing| !is_empty(existing)) {
            None => Manifest {
                schema_version: SCHEMA_VERSION,
                provenance,
                shards: Vec::new(),
                partial_rows: None,
                complete: false,
            },
            Some(mut existing) => {
                if let Some(difference) = existing.provenance.difference(&provenance) {
                    return Err(Error::file(folder, format!("{difference}; {OTHER_FOLDER}")));
                }
                let num_intact = existing.shards.iter().take_while(|shard| is_intact(folder, shard)).count();
                // A stop damages the last shard at most. Others are not decoded again unasked.
                if let Some(damaged) = existing.shards.get(num_intact)
                    && existing.shards[num_intact + 1..].iter().any(|shard| is_intact(folder, shard))
                {
                    let advice = "is damaged, but shards after it are not: put a copy of it back, or delete it and \
                                  all after it to have their rows decoded again";
                    return Err(Error::file(folder.join(&damaged.name), advice));
                }
                existing.complete &= num_intact == existing.shards.len();
                existing.shards.truncate(num_intact);
                existing
            }
        };
        let writer = Writer { folder: folder.to_owned(), manifest };
        // Written now, so that a read-only folder is noticed before there are rows to lose.
        if !writer.manifest.complete {
            writer.write_manifest()?;
        }
        Ok(writer)
    }

    /// Whether `folder` holds a complete data set with this provenance. Its shards are not looked at.
    ///
    /// # Errors
    /// [`Error::File`] naming the field that differs if it holds one with another provenance.
    pub fn is_complete(folder: &Path, provenance: &Provenance) -> Result<bool> {
        let Some(existing) = Manifest::read(folder)?.filter(|existing| existing.complete) else { return Ok(false) };
        match existing.provenance.difference(provenance) {
            Some(difference) => Err(Error::file(folder, format!("{difference}; {OTHER_FOLDER}"))),
            None => Ok(true),
        }
    }

    /// Opens `folder` for a data set that is written in one run. The shards of a stopped run with
    /// the same provenance are removed.
    ///
    /// # Errors
    /// As [`Writer::open`], and if the folder holds a complete data set.
    pub fn create(folder: &Path, provenance: Provenance) -> Result<Self> {
        if Manifest::read(folder)?.is_some_and(|existing| existing.complete) {
            return Err(Error::file(folder, "holds a data set already; choose another output folder, or delete it"));
        }
        let was_stopped = Manifest::exists(folder);
        let mut writer = Writer::open(folder, provenance)?;
        writer.manifest.shards.clear();
        writer.write_manifest()?;
        if was_stopped {
            // Earlier versions wrote shards beside the manifest.
            remove_shards(folder, &[])?;
            remove_shards(&folder.join(SHARD_FOLDER), &[])?;
        }
        Ok(writer)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The manifest as it is on disk now.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Number of shards written so far, including those of earlier runs.
    pub fn num_shards(&self) -> usize {
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
        let first = self.num_shards();
        let name = |index: usize| format!("{SHARD_FOLDER}/{SHARD_PREFIX}{index:05}.parquet");
        let names: Vec<String> = (first..first + shards.len()).map(name).collect();
        let folder = self.folder.join(SHARD_FOLDER);
        disk::create_folder(&folder).map_err(Error::write(&folder))?;
        let entry = |(name, rows): (String, &&[Trajectory])| {
            let checksum = self.write_rows(&name, rows)?;
            Ok(ShardEntry { name, num_rows: rows.len(), checksum: Some(checksum) })
        };
        let entries = names.into_par_iter().zip(shards).map(entry).collect::<Result<Vec<_>>>()?;
        self.manifest.shards.extend(entries);
        self.manifest.complete = false;
        self.write_manifest()
    }

    /// Saves the rows of unfinished shards when a run is stopped. They are not part of the data set
    /// yet.
    ///
    /// # Errors
    /// File-system errors.
    pub fn save_partial_rows(&mut self, rows: &[Trajectory]) -> Result<()> {
        self.manifest.partial_rows = Some(self.write_rows(PARTIAL_SHARD, rows)?);
        self.write_manifest()
    }

    /// The rows that a stopped run saved, some of which may be in shards by now. They stay on disk
    /// until [`Writer::remove_partial_rows`]. A file that cannot be read or is not as it was written
    /// counts as empty: its rows are decoded again.
    pub fn partial_rows(&self) -> Vec<Trajectory> {
        let path = self.folder.join(PARTIAL_SHARD);
        let rows = || {
            if let Some(checksum) = self.manifest.partial_rows {
                checksum.check(&path, MANIFEST, "").ok()?;
            }
            Reader::open(&path).ok()?.rows().collect::<Result<Vec<_>>>().ok()
        };
        rows().unwrap_or_default()
    }

    /// Removes the rows that a stopped run saved.
    ///
    /// # Errors
    /// File-system errors.
    pub fn remove_partial_rows(&mut self) -> Result<()> {
        self.manifest.partial_rows = None;
        let path = self.folder.join(PARTIAL_SHARD);
        match disk::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::write(path)(error)),
            _ => Ok(()),
        }
    }

    /// Marks the data set as complete.
    ///
    /// # Errors
    /// File-system errors.
    pub fn finish(mut self) -> Result<Manifest> {
        // A data set without rows still gets a shard, so that its columns and provenance can be
        // read.
        if self.manifest.shards.is_empty() {
            self.write_shard(&[])?;
        }
        // Those of an earlier run that wrote more, or larger, shards.
        remove_shards(&self.folder.join(SHARD_FOLDER), &self.manifest.shards)?;
        self.manifest.complete = true;
        self.write_manifest()?;
        Ok(self.manifest)
    }

    fn write_rows(&self, name: &str, rows: &[Trajectory]) -> Result<Checksum> {
        let path = self.folder.join(name);
        let failed = |error: ParquetError| parquet_file::write_error(&path, error);
        let properties = self.shard_properties(&path)?;
        atomic_file::write_with(&path, |file| {
            let mut writer = ArrowWriter::try_new(file, schema(), Some(properties)).map_err(failed)?;
            for group in row_groups(rows) {
                let batch = rows_to_batch(group).map_err(|error| Error::file(&path, error.to_string()))?;
                writer.write(&batch).and_then(|()| writer.flush()).map_err(failed)?;
            }
            writer.close().map_err(failed)?;
            Ok(())
        })
    }

    fn shard_properties(&self, path: &Path) -> Result<WriterProperties> {
        let provenance = self.manifest.provenance.of_rows();
        let provenance = serde_json::to_string(&provenance).map_err(|error| Error::file(path, error.to_string()))?;
        let metadata = vec![
            KeyValue::new(VERSION_KEY.to_owned(), SCHEMA_VERSION.to_string()),
            KeyValue::new(PROVENANCE_KEY.to_owned(), provenance),
        ];
        Ok(WriterProperties::builder()
            .set_compression(Compression::ZSTD(Default::default()))
            .set_created_by(format!("{CREATED_BY}{}", crate::VERSION))
            .set_key_value_metadata(Some(metadata))
            .build())
    }

    fn write_manifest(&self) -> Result<()> {
        self.manifest.write(&self.folder)
    }
}

/// Splits rows into row groups within the limits; a row that exceeds them gets a group of its own.
fn row_groups(rows: &[Trajectory]) -> impl Iterator<Item = &[Trajectory]> {
    let num_tokens = |row: &Trajectory| row.blocks.iter().flat_map(|block| &block.states).map(Vec::len).sum::<usize>();
    let mut remaining = rows;
    std::iter::from_fn(move || {
        let mut sum = 0;
        let fits = |row: &&Trajectory| {
            sum += num_tokens(row);
            sum <= MAX_GROUP_TOKENS
        };
        let count = remaining.iter().take(MAX_GROUP_ROWS).take_while(fits).count().max(1);
        let (group, rest) = remaining.split_at_checked(count)?;
        remaining = rest;
        Some(group)
    })
}

/// Removes the shards that a killed run left, but for those to keep.
fn remove_shards(folder: &Path, kept: &[ShardEntry]) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_kept = kept.iter().any(|shard| Path::new(&shard.name).file_name() == Some(OsStr::new(&name)));
        if name.starts_with(SHARD_PREFIX) && name.ends_with(".parquet") && !is_kept {
            let path = entry.path();
            disk::remove_file(&path).map_err(Error::write(&path))?;
        }
    }
    Ok(())
}

/// Whether a shard is as it was written: its checksum, if it has one, and the number of rows in its
/// footer.
fn is_intact(folder: &Path, shard: &ShardEntry) -> bool {
    let path = folder.join(&shard.name);
    let has_rows = |rows: i64| rows == shard.num_rows as i64;
    open_shard(&path, None).is_ok_and(|(builder, _)| has_rows(builder.metadata().file_metadata().num_rows()))
        && shard.checksum.is_none_or(|checksum| checksum.check(&path, MANIFEST, "").is_ok())
}
