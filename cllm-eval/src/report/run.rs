//! A run that a report shows.

use std::path::{Path, PathBuf};

use cllm_core::Result;

use crate::records::{Records, SAMPLES};
use crate::results::Results;

pub(super) struct Run {
    /// Benchmark and split, and the folder too if several runs of one report share these.
    pub(super) title: String,
    pub(super) results: Results,
    /// `None` if the results have no samples.jsonl beside them.
    pub(super) records: Option<Records>,
}

impl Run {
    /// Reads several runs, and adds the folder to titles that would otherwise be equal.
    pub(super) fn read_all(files: &[PathBuf]) -> Result<Vec<Self>> {
        let mut runs: Vec<Self> = files.iter().map(|path| Self::read(path)).collect::<Result<_>>()?;
        let titles: Vec<String> = runs.iter().map(|run| run.title.clone()).collect();
        for (run, file) in runs.iter_mut().zip(files) {
            if titles.iter().filter(|title| **title == run.title).count() > 1 {
                run.title += &format!(" / {}", file.parent().unwrap_or(Path::new("")).display());
            }
        }
        Ok(runs)
    }

    fn read(path: &Path) -> Result<Self> {
        let results = Results::read(path)?;
        let samples = path.with_file_name(SAMPLES);
        let records = if samples.exists() { Some(Records::read(&samples)?) } else { None };
        let title = format!("{} / {}", results.benchmark.name(), results.split);
        Ok(Run { title, results, records })
    }
}
