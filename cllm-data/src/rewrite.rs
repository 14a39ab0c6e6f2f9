//! Rewrites a data set: reads one, maps its rows on all cores, and writes another in the same
//! order. `augment` and `clean` are such maps.

use std::path::Path;

use cllm_core::progress::Progress;
use cllm_core::trajectory::{Reader, RowChunk, Trajectory, Writer};
use cllm_core::{Result, atomic_file, interrupt, settings};
use rayon::prelude::*;
use serde::Serialize;

use crate::dataset_card::finish_with_card;

/// A data set that is being rewritten. It is complete only after [`Rewrite::finish`].
pub(crate) struct Rewrite {
    reader: Reader,
    writer: Writer,
}

impl Rewrite {
    /// Opens the input and the output folder. `step` is added to the provenance of the output.
    pub(crate) fn open(input: &Path, output: &Path, step: String) -> Result<Self> {
        let reader = Reader::open(input)?;
        let mut provenance = reader.provenance().clone();
        provenance.steps.push(step);
        Ok(Rewrite { reader, writer: Writer::create(output, provenance)? })
    }

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

    /// Saves the settings as `config.yaml`, completes the output, and returns its number of rows.
    pub(crate) fn finish(self, settings: &impl Serialize) -> Result<usize> {
        let path = self.writer.folder().join("config.yaml");
        atomic_file::write(&path, settings::to_yaml(settings)?.as_bytes())?;
        finish_with_card(self.writer)
    }
}
