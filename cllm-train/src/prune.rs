//! `prune`: removes the training state of finished runs.

use std::path::PathBuf;

use cllm_core::program::print;
use cllm_core::progress::count;
use cllm_core::{Error, Result, output_folder};

use crate::byte_size::format_bytes;
use crate::run_folder::{checkpoints, checkpoints_folder, remove_state_of_run, state_files};
use crate::summary::SUMMARY_FILE;

/// Removes the training state of finished runs, and says how much that frees. `force` includes runs
/// that are not finished; `dry_run` removes nothing.
///
/// # Errors
/// [`Error::File`] for a folder that is not a run, or a run that is not finished.
pub fn prune(runs: &[PathBuf], force: bool, dry_run: bool) -> Result<()> {
    for run in runs {
        if !checkpoints_folder(run).is_dir() && !run.join(SUMMARY_FILE).exists() {
            let message = format!("is not the folder of a run: it holds neither `checkpoints` nor {SUMMARY_FILE}");
            return Err(Error::file(run, message));
        }
        if !force && !run.join(SUMMARY_FILE).exists() {
            let message = "is not finished, and would no longer be resumable: finish it first, or use --force to prune it \
                           all the same";
            return Err(Error::file(run, message));
        }
    }
    for run in runs {
        let (mut num_checkpoints, mut num_bytes) = (0, 0);
        for (_, checkpoint) in checkpoints(run)? {
            let files = state_files(&checkpoint)?;
            num_checkpoints += usize::from(!files.is_empty());
            num_bytes += files.iter().map(|(_, bytes)| bytes).sum::<u64>();
        }
        if !dry_run {
            let _lock = output_folder::lock(run)?;
            remove_state_of_run(run)?;
        }
        if num_checkpoints == 0 {
            print(&format!("{}: holds no training state", run.display()))?;
            continue;
        }
        let (verb, checkpoints) = (if dry_run { "would free" } else { "freed" }, count(num_checkpoints, "checkpoint"));
        let size = format_bytes(num_bytes);
        print(&format!("{}: {verb} {size}, the training state of {checkpoints}", run.display()))?;
    }
    Ok(())
}
