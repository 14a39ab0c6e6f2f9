//! Reads a data set, changes its rows on all cores, and writes another: what `augment` and `clean` share.

use std::path::Path;

use cllm_core::progress::Progress;
use cllm_core::trajectory::{Manifest, Reader, Trajectory, Writer};
use cllm_core::{Result, atomic_file, interrupt};
use rayon::prelude::*;

/// Rows in memory at once.
const CHUNK_ROWS: usize = 1024;

/// Copies `input` to `output` through `change`, which keeps a row (changed or not) or drops it; `step` says what was done and
/// is recorded. `sort_out` sees the chunk after `change`, in order, for what must not run in parallel.
pub(crate) fn copy(
    input: &Path,
    output: &Path,
    step: String,
    change: impl Fn(Trajectory) -> Result<Option<Trajectory>> + Sync,
    mut sort_out: impl FnMut(Vec<Trajectory>) -> Vec<Trajectory>,
) -> Result<Manifest> {
    let reader = Reader::open(input)?;
    let mut provenance = reader.provenance().clone();
    provenance.steps.push(step);
    let mut writer = Writer::create(output, provenance)?;
    let mut bar = Progress::new("rows", 0, reader.len() as u64);
    let mut rows = reader.rows();
    loop {
        interrupt::check()?;
        let chunk = rows.by_ref().take(CHUNK_ROWS).collect::<Result<Vec<_>>>()?;
        if chunk.is_empty() {
            break;
        }
        bar.advance(chunk.len() as u64);
        let changed = chunk.into_par_iter().filter_map(|row| change(row).transpose()).collect::<Result<Vec<_>>>()?;
        let kept = sort_out(changed);
        if !kept.is_empty() {
            writer.write_shard(&kept)?;
        }
    }
    let manifest = writer.finish()?;
    atomic_file::write(&output.join("README.md"), card(&manifest).as_bytes())?;
    Ok(manifest)
}

/// The data set card (README.md with the Hugging Face front matter).
pub(crate) fn card(manifest: &Manifest) -> String {
    let rows: usize = manifest.shards.iter().map(|(_, rows)| rows).sum();
    let provenance = &manifest.provenance;
    let size = match rows {
        0..1_000 => "n<1K",
        1_000..10_000 => "1K<n<10K",
        10_000..100_000 => "10K<n<100K",
        _ => "100K<n<1M",
    };
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
