//! What is where in the folder of a run, which checkpoints are kept, and how many bytes all of it
//! has.
//!
//! Beside its model, a checkpoint has training state: what a run resumes from. It is several times as
//! large as the model, and of no use once the run is finished.

use std::path::{Path, PathBuf};

use cllm_core::{Error, Result, atomic_file, checksum, disk};

use crate::byte_size::folder_bytes;
use crate::optimizer_files::is_optimizer_file;
use crate::summary::SUMMARY_FILE;
use crate::train_state::TrainState;

/// The file with the train state: of a checkpoint, and in the folder of a finished run.
pub const STATE_FILE: &str = "state.json";

/// The folder of the final model in that of a run.
pub const FINAL: &str = "final";

/// The link to the newest checkpoint to resume from.
pub const LATEST: &str = "latest";

/// The link to the best checkpoint.
pub const BEST: &str = "best";

/// The folder of a run's checkpoints.
pub fn checkpoints_folder(run: &Path) -> PathBuf {
    run.join("checkpoints")
}

/// The folders of all checkpoints with their steps, oldest first.
///
/// # Errors
/// File-system errors, here and below.
pub fn checkpoints(run: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let folder = checkpoints_folder(run);
    let mut steps = Vec::new();
    if !folder.exists() {
        return Ok(steps);
    }
    for entry in std::fs::read_dir(&folder).map_err(Error::io(&folder))? {
        let path = entry.map_err(Error::io(&folder))?.path();
        if path.is_dir() {
            steps.extend(step_of(&path).map(|step| (step, path)));
        }
    }
    steps.sort();
    Ok(steps)
}

/// The step of a checkpoint's folder; `None` for any other.
fn step_of(path: &Path) -> Option<usize> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

/// What is left of a checkpoint when a newer one is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    Whole,
    ModelOnly,
    Nothing,
}

/// What is left of some checkpoints, given by their steps, oldest first, and whether each has
/// training state: the best one, and the newest of the others to resume from. Where there is a newer
/// one to resume from, the best keeps its model only.
pub fn kept_checkpoints(checkpoints: &[(usize, bool)], best_step: Option<usize>, max_checkpoints: usize) -> Vec<Kept> {
    let mut num_kept = 0;
    let keep = |(step, has_state): &(usize, bool)| match (Some(*step) == best_step, *has_state) {
        (true, true) if num_kept == 0 => Kept::Whole,
        (true, _) => Kept::ModelOnly,
        (false, true) if num_kept < max_checkpoints => {
            num_kept += 1;
            Kept::Whole
        }
        (false, _) => Kept::Nothing,
    };
    let mut kept: Vec<_> = checkpoints.iter().rev().map(keep).collect();
    kept.reverse();
    kept
}

/// Whether a folder has a train state; a checkpoint that does can be resumed from.
pub fn has_state(folder: &Path) -> bool {
    folder.join(STATE_FILE).exists()
}

/// The train state in a folder; `None` if there is none.
///
/// # Errors
/// [`Error::File`] for a file that is no train state; `advice` says what to do about it.
pub fn read_state(folder: &Path, advice: &str) -> Result<Option<TrainState>> {
    let path = folder.join(STATE_FILE);
    if !path.exists() {
        return Ok(None);
    }
    let bytes = std::fs::read(&path).map_err(Error::io(&path))?;
    let state = checksum::whole_json(&bytes).and_then(|text| serde_json::from_str(text).ok());
    state.map(Some).ok_or_else(|| Error::file(&path, format!("is damaged: {advice}")))
}

/// Writes the train state into a folder.
///
/// # Errors
/// File-system errors with the path.
pub fn write_state(folder: &Path, state: &TrainState) -> Result<()> {
    checksum::write_json(&folder.join(STATE_FILE), state)
}

/// The files of a checkpoint's training state, and their bytes. `state.json` is the first: without
/// it, nobody resumes from the others.
///
/// # Errors
/// File-system errors, here and below.
pub fn state_files(checkpoint: &Path) -> Result<Vec<(PathBuf, u64)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(checkpoint).map_err(Error::io(checkpoint))? {
        let entry = entry.map_err(Error::io(checkpoint))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == STATE_FILE || is_optimizer_file(&name) {
            files.push((entry.path(), entry.metadata().map_err(Error::io(entry.path()))?.len()));
        }
    }
    files.sort_by_key(|(path, _)| !path.ends_with(STATE_FILE));
    Ok(files)
}

/// Removes the training state of a checkpoint. Its model stays.
pub fn remove_state(checkpoint: &Path) -> Result<()> {
    let files: Vec<PathBuf> = state_files(checkpoint)?.into_iter().map(|(path, _)| path).collect();
    if files.is_empty() {
        return Ok(());
    }
    checksum::forget(checkpoint, &files)?;
    files.iter().try_for_each(|path| disk::remove_file(path).map_err(Error::write(path)))
}

/// Removes the training state of all checkpoints of a run. A finished run keeps its train state, in
/// its own folder: with that, the same command finds that there is nothing left to do.
pub fn remove_state_of_run(run: &Path) -> Result<()> {
    let latest = checkpoints_folder(run).join(LATEST);
    if run.join(SUMMARY_FILE).exists()
        && !has_state(run)
        && let Some(state) = read_state(&latest, "remove the file")?
    {
        write_state(run, &state)?;
    }
    if latest.is_symlink() {
        disk::remove_file(&latest).map_err(Error::write(&latest))?;
    }
    checkpoints(run)?.iter().try_for_each(|(_, checkpoint)| remove_state(checkpoint))
}

/// Bytes of what a run has saved so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoredBytes {
    /// Oldest first.
    pub checkpoints: Vec<StoredCheckpoint>,
    /// Step of the best checkpoint.
    pub best_step: Option<usize>,
    pub final_model: u64,
    /// What a killed process left, which the next one removes.
    pub unfinished: u64,
    /// Whether the run is finished, and so writes nothing more.
    pub is_finished: bool,
}

/// Bytes of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredCheckpoint {
    pub step: usize,
    /// The model with its tokenizer.
    pub model: u64,
    /// The training state; 0 without any.
    pub state: u64,
}

impl StoredBytes {
    /// # Errors
    /// Folders that cannot be read.
    pub fn of_run(run: &Path) -> Result<Self> {
        let stored = |(step, path): (usize, PathBuf)| {
            let state = state_files(&path)?.iter().map(|(_, bytes)| bytes).sum();
            Ok(StoredCheckpoint { step, model: folder_bytes(&path)? - state, state })
        };
        let mut unfinished = atomic_file::unfinished(run)?;
        unfinished.extend(atomic_file::unfinished(&checkpoints_folder(run))?);
        Ok(StoredBytes {
            checkpoints: checkpoints(run)?.into_iter().map(stored).collect::<Result<_>>()?,
            best_step: std::fs::read_link(checkpoints_folder(run).join(BEST)).ok().and_then(|best| step_of(&best)),
            final_model: folder_bytes(&run.join(FINAL))?,
            unfinished: unfinished.iter().map(|path| folder_bytes(path)).sum::<Result<_>>()?,
            is_finished: run.join(SUMMARY_FILE).exists(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_checkpoints_are_kept_and_the_model_of_the_best() {
        use Kept::{ModelOnly, Nothing, Whole};
        for (with_state, models, best, expected) in [
            (vec![2, 4, 6], vec![], None, vec![Nothing, Whole, Whole]),
            (vec![2, 4, 6], vec![], Some(2), vec![ModelOnly, Whole, Whole]),
            (vec![2, 4, 6], vec![], Some(6), vec![Whole, Whole, Whole]),
            (vec![2, 4, 6], vec![3, 5], Some(5), vec![Nothing, Nothing, Whole, ModelOnly, Whole]),
            (vec![2, 4], vec![7], Some(7), vec![Whole, Whole, ModelOnly]),
        ] {
            let mut checkpoints: Vec<_> = with_state.into_iter().map(|step| (step, true)).collect();
            checkpoints.extend(models.into_iter().map(|step| (step, false)));
            checkpoints.sort();
            assert_eq!(kept_checkpoints(&checkpoints, best, 2), expected, "{checkpoints:?} {best:?}");
        }
    }
}
