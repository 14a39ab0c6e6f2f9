//! `rounds.json`: which stages are finished and from what, and what each gave.

use std::path::{Path, PathBuf};

use cllm_core::{Error, Result, atomic_file, text_file};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Its name in the folder of the rounds.
pub const FILE: &str = "rounds.json";

const SCHEMA_VERSION: u32 = 1;

/// The course of all rounds.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    schema_version: u32,
    /// Whether every round is done.
    pub complete: bool,
    /// The student of the last round that is done.
    pub model: Option<PathBuf>,
    rounds: Vec<Round>,
}

/// One round.
#[derive(Debug, Serialize, Deserialize)]
struct Round {
    /// Its number, from 1.
    round: usize,
    /// Tokens of a block.
    n: usize,
    stages: Vec<Stage>,
}

/// A stage that has begun.
#[derive(Debug, Serialize, Deserialize)]
struct Stage {
    name: String,
    /// Fingerprint of what it began from: settings, model, data.
    inputs: String,
    /// Fingerprint of what it left; none while it is not finished.
    output: Option<String>,
    /// What it tells of itself.
    figures: Value,
}

/// Where a stage stands.
#[derive(Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing is there.
    New,
    /// It began from these inputs.
    Begun,
    /// It is finished, and what it left is still there.
    Finished,
}

impl Report {
    /// That of an output folder; empty where there is none.
    ///
    /// # Errors
    /// A file that is none.
    pub fn read(output: &Path) -> Result<Self> {
        let path = output.join(FILE);
        if !path.exists() {
            return Ok(Report { schema_version: SCHEMA_VERSION, ..Report::default() });
        }
        let bad =
            |why: String| Error::file(&path, format!("is no record of rounds ({why}): choose another output folder"));
        let report: Report = serde_json::from_str(&text_file::read(&path)?).map_err(|error| bad(error.to_string()))?;
        match report.schema_version {
            SCHEMA_VERSION => Ok(report),
            other => Err(bad(format!("its schema_version is {other}, this program knows {SCHEMA_VERSION}"))),
        }
    }

    /// Writes it.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write(&self, output: &Path) -> Result<()> {
        atomic_file::write_json(&output.join(FILE), self)
    }

    /// Where the stage `name` of round `index` (from 0) stands, which would begin from `inputs`. `found` is the fingerprint of
    /// what its `folder` holds now, if that is whole.
    ///
    /// # Errors
    /// When the stage was done from other inputs, or what it left is another now.
    pub fn standing(
        &self,
        index: usize,
        name: &str,
        inputs: &str,
        (folder, found): (&Path, Option<&str>),
    ) -> Result<Standing> {
        let stages = self.rounds.get(index).map(|round| round.stages.as_slice()).unwrap_or_default();
        let Some(stage) = stages.iter().find(|stage| stage.name == name).filter(|_| folder.exists()) else {
            return Ok(Standing::New);
        };
        let again = "choose another output folder, or delete this one to do it again";
        if stage.inputs != inputs {
            let message = format!("was made with other settings, from another model or from other data; {again}");
            return Err(Error::file(folder, message));
        }
        match (&stage.output, found) {
            (None, _) => Ok(Standing::Begun),
            (Some(left), Some(found)) if left == found => Ok(Standing::Finished),
            (Some(_), _) => Err(Error::file(folder, format!("is no longer what the stage left there; {again}"))),
        }
    }

    /// Notes that a stage begins, from these inputs, in a round of blocks of `n` tokens.
    pub fn begin(&mut self, index: usize, n: usize, name: &str, inputs: String) {
        self.complete = false;
        if self.rounds.len() == index {
            self.rounds.push(Round { round: index + 1, n, stages: Vec::new() });
        }
        let round = &mut self.rounds[index];
        round.n = n;
        let stage = Stage { name: name.to_owned(), inputs, output: None, figures: Value::Null };
        // What was noted of later stages stays: whether it still holds is told by their own inputs.
        match round.stages.iter_mut().find(|stage| stage.name == name) {
            Some(before) => *before = stage,
            None => round.stages.push(stage),
        }
    }

    /// Notes that a stage which began is finished.
    pub fn finish(&mut self, index: usize, name: &str, output: String, figures: Value) {
        if let Some(stage) = self.rounds[index].stages.iter_mut().find(|stage| stage.name == name) {
            (stage.output, stage.figures) = (Some(output), figures);
        }
    }
}
