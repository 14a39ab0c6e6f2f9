//! Rewrites a data set: reads one, maps its rows on all cores, and writes another in the same
//! order. `augment` and `clean` are such maps.

use std::path::{Path, PathBuf};

use cllm_core::output_folder::FolderLock;
use cllm_core::progress::Progress;
use cllm_core::trajectory::{self, Reader, RowChunk, Trajectory, Writer};
use cllm_core::{Error, Result, atomic_file, interrupt, output_folder, text_file};
use rayon::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::dataset_card::finish_with_card;

/// A data set that is being rewritten. It is complete only after [`Rewrite::finish`].
pub(crate) struct Rewrite {
    reader: Reader,
    writer: Writer,
    /// File for the counts of the rewrite.
    report_file: PathBuf,
    _lock: FolderLock,
}

/// Settings that say where something is. The provenance says whether it is the same.
const PATHS: [&str; 5] = ["input", "output", "model", "data", "evaluation_prompts"];

/// A command that rewrites a data set.
pub(crate) struct Command<'s, S> {
    /// `augment` or `clean`.
    pub(crate) verb: &'static str,
    pub(crate) settings: &'s S,
    pub(crate) input: &'s Path,
    pub(crate) output: &'s Path,
    /// What is added to the provenance of the output.
    pub(crate) step: String,
}

impl<S: Serialize> Command<'_, S> {
    /// Opens the input and the output folder, and saves the settings there. `None` if the output is
    /// complete already, made with the same settings from the same input.
    ///
    /// # Errors
    /// When the input is not a complete data set, or the output folder holds something else: the
    /// message says which setting differs.
    pub(crate) fn open(&self) -> Result<Option<Rewrite>> {
        let reader = Reader::open(self.input)?;
        let lock = output_folder::lock(self.output)?;
        let mut provenance = reader.provenance().clone();
        provenance.steps.push(self.step.clone());
        if trajectory::holds_rows(self.output)?
            && let Some(difference) = output_folder::changed_setting(self.output, self.settings, &PATHS)?
        {
            let advice = "choose another output folder, or delete this one";
            return Err(Error::file(self.output, format!("{difference}; {advice}")));
        }
        if Writer::is_complete(self.output, &provenance)? {
            return Ok(None);
        }
        let writer = Writer::create(self.output, provenance)?;
        output_folder::save_settings(self.output, &format!("cllm-data {}", self.verb), self.settings)?;
        Ok(Some(Rewrite { reader, writer, report_file: self.report_file(), _lock: lock }))
    }

    fn report_file(&self) -> PathBuf {
        self.output.join(format!("{}-report.json", self.verb))
    }

    /// Reads the report of a complete output.
    ///
    /// # Errors
    /// A report that is missing or damaged.
    pub(crate) fn read_report<R: DeserializeOwned>(&self) -> Result<R> {
        let path = self.report_file();
        let text = text_file::read(&path)?;
        serde_json::from_str(&text)
            .map_err(|error| Error::file(&path, format!("is not a report of {}: {error}", self.verb)))
    }
}

impl Rewrite {
    /// Maps all rows. `map` runs on each row, on all cores. `select` gets its results chunk by
    /// chunk, in order, and returns the rows to write. Only one chunk per core is in memory,
    /// whatever the size of the data set.
    pub(crate) fn run<T: Send>(
        &mut self,
        map: impl Fn(Trajectory) -> Result<T> + Sync,
        mut select: impl FnMut(Vec<T>) -> Result<Vec<Trajectory>>,
    ) -> Result<()> {
        let reader = &self.reader;
        let mut bar = Progress::new("rows", 0, reader.num_rows() as u64);
        let map_chunk = |chunk: &RowChunk| reader.chunk_rows(chunk).map(|row| map(row?)).collect::<Result<Vec<T>>>();
        for chunks in reader.row_chunks().chunks(rayon::current_num_threads()) {
            interrupt::check()?;
            let mapped = chunks.par_iter().map(map_chunk).collect::<Result<Vec<_>>>()?;
            let selected = mapped.into_iter().map(&mut select).collect::<Result<Vec<_>>>()?;
            let shards: Vec<&[Trajectory]> =
                selected.iter().map(Vec::as_slice).filter(|rows| !rows.is_empty()).collect();
            self.writer.write_shards(&shards)?;
            bar.advance(chunks.iter().map(|chunk| chunk.num_rows() as u64).sum());
        }
        bar.finish();
        Ok(())
    }

    /// Saves the report and completes the output.
    pub(crate) fn finish(self, report: &impl Serialize) -> Result<()> {
        atomic_file::write_json(&self.report_file, report)?;
        finish_with_card(self.writer).map(drop)
    }
}
