//! Reads a data set, changes its rows on all cores, and writes another: what `augment` and `clean` share. Completes
//! data sets, for `collect` and `import` too.

use std::path::Path;

use cllm_core::progress::Progress;
use cllm_core::trajectory::{Manifest, Reader, RowChunk, Trajectory, Writer};
use cllm_core::{Result, atomic_file, interrupt};
use rayon::prelude::*;
use serde::Serialize;

/// A copy in the making; it is not complete until [`finish`] has been called on its writer.
pub(crate) struct Copying {
    reader: Reader,
    pub(crate) writer: Writer,
}

impl Copying {
    /// Opens both folders; `step` says what will be done and is recorded.
    pub(crate) fn open(input: &Path, output: &Path, step: String) -> Result<Self> {
        let reader = Reader::open(input)?;
        let mut provenance = reader.provenance().clone();
        provenance.steps.push(step);
        Ok(Copying { reader, writer: Writer::create(output, provenance)? })
    }

    /// `judge` sees each row, on all cores, and `sort_out` what it made of the rows of a piece, in order, and gives the rows
    /// to write. As many pieces as there are cores are in memory at once, whatever the size of the data set.
    pub(crate) fn run<T: Send>(
        &mut self,
        judge: impl Fn(Trajectory) -> Result<T> + Sync,
        mut sort_out: impl FnMut(Vec<T>) -> Result<Vec<Trajectory>>,
    ) -> Result<()> {
        let reader = &self.reader;
        let mut bar = Progress::new("rows", 0, reader.len() as u64);
        let judged = |piece: &RowChunk| reader.chunk_rows(piece).map(|row| judge(row?)).collect::<Result<Vec<T>>>();
        for pieces in reader.row_chunks().chunks(rayon::current_num_threads()) {
            interrupt::check()?;
            let judged = pieces.par_iter().map(judged).collect::<Result<Vec<_>>>()?;
            let kept = judged.into_iter().map(&mut sort_out).collect::<Result<Vec<_>>>()?;
            let shards: Vec<&[Trajectory]> = kept.iter().map(Vec::as_slice).filter(|rows| !rows.is_empty()).collect();
            self.writer.write_shards(&shards)?;
            bar.advance(pieces.iter().map(|piece| piece.len() as u64).sum());
        }
        bar.finish();
        Ok(())
    }
}

/// Saves the settings of a copy beside its manifest, as every run does.
pub(crate) fn save_settings(output: &Path, settings: &impl Serialize) -> Result<()> {
    atomic_file::write(&output.join("settings.yaml"), cllm_core::settings::to_yaml(settings)?.as_bytes())
}

/// Completes a data set, with its card; the number of its rows.
pub(crate) fn finish(writer: Writer, output: &Path) -> Result<usize> {
    // Once the data set is complete nobody comes back to write what is missing.
    atomic_file::write(&output.join("README.md"), card(writer.manifest()).as_bytes())?;
    Ok(writer.finish()?.rows())
}

/// The hub's name for so many rows.
fn size_category(rows: usize) -> &'static str {
    match rows {
        0..1_000 => "n<1K",
        1_000..10_000 => "1K<n<10K",
        10_000..100_000 => "10K<n<100K",
        100_000..1_000_000 => "100K<n<1M",
        1_000_000..10_000_000 => "1M<n<10M",
        10_000_000..100_000_000 => "10M<n<100M",
        100_000_000..1_000_000_000 => "100M<n<1B",
        _ => "n>1B",
    }
}

/// The data set card (README.md with the Hugging Face front matter).
fn card(manifest: &Manifest) -> String {
    let rows = manifest.rows();
    let provenance = &manifest.provenance;
    let size = size_category(rows);
    let steps: Vec<_> = provenance.steps.iter().map(|step| format!("- {step}")).collect();
    format!(
        "---\npretty_name: Jacobi trajectories\ntask_categories:\n- text-generation\ntags:\n- cllm\n- jacobi-decoding\n\
         size_categories:\n- {size}\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: part-*.parquet\n---\n\
         # Jacobi trajectories\n\n{rows} responses of one teacher with every state of their Jacobi decoding, blocks of {} tokens, at most {} \
         tokens a response, greedy.\n\n- teacher: `{}`\n- tokenizer: `{}`\n- seed: {}\n- toolkit: cllm {}\n\nWhat was done:\n\n{}\n",
        provenance.n,
        provenance.max_new_tokens,
        provenance.teacher,
        provenance.tokenizer,
        provenance.seed,
        provenance.toolkit,
        steps.join("\n")
    )
}

#[cfg(test)]
mod tests {
    use super::size_category;

    #[test]
    fn every_size_has_the_name_that_the_hub_gives_it() {
        for (rows, name) in [
            (999, "n<1K"),
            (1_000, "1K<n<10K"),
            (999_999, "100K<n<1M"),
            (1_000_000, "1M<n<10M"),
            (99_999_999, "10M<n<100M"),
            (2_000_000_000, "n>1B"),
        ] {
            assert_eq!(size_category(rows), name, "{rows}");
        }
    }
}
