//! A run that a report shows.

use std::path::{Path, PathBuf};

use cllm_core::Result;

use crate::records::{Records, SAMPLES};
use crate::results::{RESULTS, Results};

pub(super) struct Run {
    /// Benchmark and split, or the file of the user, and the folder too if several runs of one report share these.
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
            if titles.iter().filter(|title| **title == run.title).count() > 1 {
                let name = if file.ends_with(RESULTS) { file.parent() } else { file.file_stem().map(Path::new) };
                run.title += &format!(" / {}", name.unwrap_or(file).display());
            }
        }
        Ok(runs)
    }

    fn read(path: &Path) -> Result<Self> {
        let results = Results::read(path)?;
        let samples = path.with_file_name(SAMPLES);
        let records = if samples.exists() { Some(Records::read(&samples)?) } else { None };
        let title = results.settings.title(results.benchmark, &results.split);
        Ok(Run { title, results, records })
    }
}
