//! `rounds.json`: which stages of which rounds are finished, what each was made from, and its
//! summary.

use std::path::{Path, PathBuf};

use cllm_core::chat_template::Date;
use cllm_core::{Error, Result, atomic_file, text_file};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::run_fingerprint::RunFingerprint;

/// Name of the file in the folder of the rounds.
pub const REPORT_FILE: &str = "rounds.json";

const SCHEMA_VERSION: u32 = 2;

/// All rounds so far; docs/data-format.md describes the fields.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct RoundsReport {
    schema_version: u32,
    /// Whether every round is finished.
    pub complete: bool,
    /// The date on which the rounds were started.
    #[serde(default)]
    pub date: Option<Date>,
    /// The student of the last finished round.
    pub model: Option<PathBuf>,
    rounds: Vec<RoundReport>,
}

#[derive(Debug, Serialize, Deserialize)]
struct RoundReport {
    /// Number of the round, from 1.
    round: usize,
    /// Block size, in tokens.
    n: usize,
    stages: Vec<StageReport>,
}

/// A stage that has begun.
#[derive(Debug, Serialize, Deserialize)]
struct StageReport {
    name: String,
    inputs: RunFingerprint,
    /// Fingerprint of the stage's output; `None` while it is not finished.
    output: Option<String>,
    /// Null while the stage is not finished.
    summary: Value,
}

impl RoundsReport {
    /// Reads the report in an output folder; empty if there is none.
    ///
    /// # Errors
    /// A file that is not a report, or one of another version.
    pub fn read(output: &Path) -> Result<Self> {
        let path = output.join(REPORT_FILE);
        if !path.exists() {
            return Ok(RoundsReport { schema_version: SCHEMA_VERSION, ..RoundsReport::default() });
        }
        let bad = |problem: String| {
            Error::file(&path, format!("is not a report of rounds ({problem}): choose another output folder"))
        };
        let value: Value = serde_json::from_str(&text_file::read(&path)?).map_err(|error| bad(error.to_string()))?;
        if value["schema_version"] != SCHEMA_VERSION {
            let version = &value["schema_version"];
            return Err(bad(format!("its schema_version is {version}, this program reads {SCHEMA_VERSION}")));
        }
        serde_json::from_value(value).map_err(|error| bad(error.to_string()))
    }

    /// Writes the report into an output folder.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write(&self, output: &Path) -> Result<()> {
        atomic_file::write_json(&output.join(REPORT_FILE), self)
    }

    /// Whether the stage `name` of round `index` (from 0) is finished, if it is to run on `inputs`.
    /// `output` is the fingerprint of what its `folder` contains now, if that is complete.
    ///
    /// # Errors
    /// If the stage was made from other inputs, or its output has changed since.
    pub fn is_finished(
        &self,
        index: usize,
        name: &str,
        inputs: &RunFingerprint,
        folder: &Path,
        output: Option<&str>,
    ) -> Result<bool> {
        let stages = self.rounds.get(index).map_or(&[][..], |round| round.stages.as_slice());
        let Some(stage) = stages.iter().find(|stage| stage.name == name).filter(|_| folder.exists()) else {
            return Ok(false);
        };
        let advice = "choose another output folder, or delete this one to make it again";
        if let Some(difference) = stage.inputs.difference("was made", inputs) {
            return Err(Error::file(folder, format!("{difference}; {advice}")));
        }
        match (&stage.output, output) {
            (None, _) => Ok(false),
            (Some(then), Some(now)) if then == now => Ok(true),
            (Some(_), _) => Err(Error::file(folder, format!("has changed since its stage finished; {advice}"))),
        }
    }

    /// Records that a stage begins, in a round with blocks of `n` tokens.
    pub fn begin(&mut self, index: usize, n: usize, name: &str, inputs: RunFingerprint) {
        self.complete = false;
        if self.rounds.len() == index {
            self.rounds.push(RoundReport { round: index + 1, n, stages: Vec::new() });
        }
        let round = &mut self.rounds[index];
        round.n = n;
        let stage = StageReport { name: name.to_owned(), inputs, output: None, summary: Value::Null };
        // The records of later stages stay: their own inputs tell whether they are still valid.
        match round.stages.iter_mut().find(|stage| stage.name == name) {
            Some(earlier) => *earlier = stage,
            None => round.stages.push(stage),
        }
    }

    /// Records that a stage is finished.
    pub fn finish(&mut self, index: usize, name: &str, output: String, summary: Value) {
        if let Some(stage) = self.rounds[index].stages.iter_mut().find(|stage| stage.name == name) {
            (stage.output, stage.summary) = (Some(output), summary);
        }
    }
}
