//! A run that a report shows.

use std::path::{Path, PathBuf};

use cllm_core::Result;

use crate::records::{Records, SAMPLES};
use crate::results::{RESULTS, Results};

pub(super) struct Run {
    /// Benchmark and split, or the file of the user, and what tells the folder from the others if several
    /// runs of one report share these.
    pub(super) title: String,
    pub(super) results: Results,
    /// `None` if the results have no samples.jsonl beside them.
    pub(super) records: Option<Records>,
}

impl Run {
    /// Reads several runs, and adds their folder or file to titles that would otherwise be equal.
    pub(super) fn read_all(files: &[PathBuf]) -> Result<Vec<Self>> {
        let mut runs: Vec<Self> = files.iter().map(|path| Self::read(path)).collect::<Result<_>>()?;
        let titles: Vec<String> = runs.iter().map(|run| run.title.clone()).collect();
        for (run, file) in runs.iter_mut().zip(files) {
            let namesakes = files.iter().zip(&titles).filter(|(_, title)| **title == run.title);
            let names: Vec<PathBuf> = namesakes.map(|(file, _)| name_of(file)).collect();
            if names.len() > 1 {
                run.title += &format!(" / {}", distinctive(&name_of(file), &names).display());
            }
        }
        Ok(runs)
    }

    fn read(path: &Path) -> Result<Self> {
        let results = Results::read(path)?;
        let samples = path.with_file_name(SAMPLES);
        let records = if samples.exists() { Some(Records::read(&samples)?) } else { None };
        records.iter().for_each(|records| records.log_missing_answers(&samples));
        let title = results.settings.title(results.benchmark, &results.split);
        Ok(Run { title, results, records })
    }
}

/// What a run is called by its file: its folder, or the path without its extension where the file has
/// another name, or its folder none.
fn name_of(file: &Path) -> PathBuf {
    let folder = file.parent().filter(|folder| file.ends_with(RESULTS) && folder.file_name().is_some());
    folder.map_or_else(|| file.with_extension(""), Path::to_owned)
}

/// The end of a path, without the folders that all `paths` begin with.
fn distinctive<'p>(path: &'p Path, paths: &[PathBuf]) -> &'p Path {
    let is_below = |path: &Path, folder: &Path| path.starts_with(folder) && path != folder;
    let is_shared = |folder: &&Path| !folder.as_os_str().is_empty() && paths.iter().all(|path| is_below(path, folder));
    // The last part stays, also where all paths are equal.
    let shared = path.ancestors().skip(1).find(is_shared);
    shared.and_then(|folder| path.strip_prefix(folder).ok()).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_told_apart_without_the_folders_that_they_share() {
        let expect = |files: &[&str], expected: &[&str]| {
            let paths: Vec<PathBuf> = files.iter().map(|file| name_of(Path::new(file))).collect();
            let names: Vec<&Path> = paths.iter().map(|path| distinctive(path, &paths)).collect();
            assert_eq!(names, expected.iter().map(Path::new).collect::<Vec<_>>());
        };
        expect(&["/runs/a/dev/results.json", "/runs/b/dev/results.json"], &["a/dev", "b/dev"]);
        expect(&["runs/dev/results.json", "runs/dev/again/results.json"], &["dev", "dev/again"]);
        expect(&["a/dev/results.json", "a/dev/results.json"], &["dev", "dev"]);
        expect(&["one/results.json", "two/results.json"], &["one", "two"]);
        // Files with names of their own, and one in a folder without a name.
        expect(&["a/dev.json", "b/dev.json"], &["a/dev", "b/dev"]);
        expect(&["a/dev.json", "a/test.json"], &["dev", "test"]);
        expect(&["./results.json", "a/results.json"], &["./results", "a"]);
        expect(&["results.json", "old.json"], &["results", "old"]);
    }
}
