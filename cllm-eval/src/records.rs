//! `samples.jsonl`: a header, then every answer and every timing as it comes. It alone is enough to go on after a kill,
//! to score again and to draw a report.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, Write};
use std::path::{Path, PathBuf};

use cllm_core::decode::Strategy;
use cllm_core::environment::{Hardware, Toolkit};
use cllm_core::prompt_set::{Prompt, Sample};
use cllm_core::task::{Task, Verdict};
use cllm_core::trajectory::FinishReason;
use cllm_core::{Error, Result, atomic_file};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::RunSettings;
use crate::role::Role;

/// Version of `samples.jsonl` and `results.json`.
pub const SCHEMA_VERSION: u32 = 2;
/// Name of the file of answers.
pub const SAMPLES: &str = "samples.jsonl";

/// A model under test.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelEntry {
    /// Which.
    pub role: Role,
    /// Its folder.
    pub path: String,
    /// Of config and weights.
    pub fingerprint: String,
    /// Number of weights.
    pub parameters: i64,
}

/// What was run; the first line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Fingerprint of settings, models and prompts: a run goes on only where it is the same.
    pub identity: String,
    /// The benchmark, which also says how answers are scored.
    pub benchmark: Task,
    /// Its split; `mixed` where the prompts are of several.
    pub split: String,
    /// Number of examples.
    pub examples: usize,
    /// Where.
    pub hardware: Hardware,
    /// With what.
    pub toolkit: Toolkit,
    /// What held the code of answers while it ran; none where none did.
    #[serde(default)]
    pub sandbox: Option<Vec<String>>,
    /// The models.
    pub models: Vec<ModelEntry>,
    /// The resolved configuration.
    pub settings: RunSettings,
}

/// One answer of the accuracy run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnswerRecord {
    /// Whose.
    pub role: Role,
    /// How decoded.
    pub strategy: Strategy,
    /// Place in the prompt set.
    pub index: usize,
    /// Id in the prompt set.
    pub id: String,
    /// Benchmark and split.
    pub source: String,
    /// The rendered prompt.
    pub prompt: String,
    /// Its number of tokens.
    pub prompt_tokens: usize,
    /// The data set's answer.
    pub reference: Option<String>,
    /// What the task needs to score.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<Value>,
    /// Tokens of the answer.
    pub response_ids: Vec<i32>,
    /// Text of the answer.
    pub text: String,
    /// Score.
    pub verdict: Verdict,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Forwards of this row.
    pub forwards: usize,
    /// Tokens that each forward made final.
    pub accepted: Vec<u32>,
    /// This row's share of the batch's prefill.
    pub batch_prefill_seconds: f64,
    /// This row's share of the batch's decoding.
    pub batch_seconds: f64,
    /// Most GPU memory in use while its batch ran, less what was in use before this model was loaded.
    pub peak_memory_bytes: Option<u64>,
    /// Where the tokens first differ from the same model's autoregressive ones: by how much its best logit there is above the
    /// second, computed in one forward over all that comes before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logit_gap_at_difference: Option<f64>,
    /// Text of each forward's tokens, for the first few examples: reports show them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forward_texts: Option<Vec<String>>,
}

/// One timing at batch 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpeedRecord {
    /// Whose.
    pub role: Role,
    /// How decoded.
    pub strategy: Strategy,
    /// Place in the prompt set.
    pub index: usize,
    /// Id in the prompt set.
    pub id: String,
    /// Tokens of the answer.
    pub tokens: usize,
    /// Forwards after prefill.
    pub forwards: usize,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Seconds of the prompt's forward.
    pub prefill_seconds: f64,
    /// Seconds of everything after it.
    pub seconds: f64,
    /// Most GPU memory in use by this model and strategy at batch 1, of the longest prompt that is timed; none on the CPU.
    #[serde(default)]
    pub peak_memory_bytes: Option<u64>,
}

/// A window of a text under a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WindowRecord {
    /// Whose.
    pub role: Role,
    /// The text's place in the data.
    pub index: usize,
    /// The text's id.
    pub id: String,
    /// The text's token that the window begins with, from 0.
    pub start: usize,
    /// So many of its last tokens are scored.
    pub tokens: usize,
    /// Their negative log-likelihoods, summed, in nats.
    pub nll: f64,
}

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Line {
    /// The first.
    Header(Box<Header>),
    /// An answer.
    Answer(Box<AnswerRecord>),
    /// A timing.
    Speed(SpeedRecord),
    /// A window.
    Window(WindowRecord),
}

/// All of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Records {
    /// What was run.
    pub header: Header,
    /// The answers, as they came.
    pub answers: Vec<AnswerRecord>,
    /// The timings, as they came.
    pub speeds: Vec<SpeedRecord>,
    /// The windows, as they came.
    pub windows: Vec<WindowRecord>,
}

impl Header {
    /// Where the figures come from, in one line.
    fn place(&self) -> String {
        let Toolkit { version, libtorch } = &self.toolkit;
        format!("{}; cllm {version}, libtorch {}", self.hardware.summary(), libtorch.as_deref().unwrap_or("unknown"))
    }
}

impl AnswerRecord {
    /// The sample, as far as scoring needs it.
    pub fn sample(&self) -> Sample {
        Sample {
            id: self.id.clone(),
            source: self.source.clone(),
            prompt: Prompt::Text(self.prompt.clone()),
            reference: self.reference.clone(),
            meta: self.meta.clone(),
        }
    }
}

impl Records {
    /// Before anything was measured.
    pub fn new(header: Header) -> Self {
        Records { header, answers: Vec::new(), speeds: Vec::new(), windows: Vec::new() }
    }

    fn is_empty(&self) -> bool {
        self.answers.is_empty() && self.speeds.is_empty() && self.windows.is_empty()
    }

    /// Reads a whole file.
    ///
    /// # Errors
    /// Names file and line of what is not as expected.
    pub fn read(path: &Path) -> Result<Self> {
        let none = || Error::file(path, "holds no answers yet: run the same `cllm-eval run` again");
        Ok(Self::read_prefix(path, false)?.ok_or_else(none)?.0)
    }

    /// Reads what is whole, and how many bytes that is: a kill may have cut the last line. None where nothing is.
    fn read_prefix(path: &Path, may_be_cut: bool) -> Result<Option<(Self, u64)>> {
        let mut reader = BufReader::new(File::open(path).map_err(Error::io(path))?);
        let (mut header, mut answers, mut speeds, mut windows) = (None, Vec::new(), Vec::new(), Vec::new());
        let (mut text, mut whole) = (String::new(), 0);
        for number in 1.. {
            text.clear();
            let read = reader.read_line(&mut text).map_err(Error::io(path))?;
            if read == 0 || (may_be_cut && !text.ends_with('\n')) {
                break;
            }
            whole += read as u64;
            let bad = |error| Error::file(path, format!("line {number} is not a record of cllm-eval: {error}"));
            if number == 1 {
                let first: Value = serde_json::from_str(&text).map_err(bad)?;
                expect_version(path, &first)?;
            }
            let line: Line = serde_json::from_str(&text).map_err(bad)?;
            match line {
                Line::Header(found) => header = Some(*found),
                Line::Answer(record) => answers.push(*record),
                Line::Speed(record) => speeds.push(record),
                Line::Window(record) => windows.push(record),
            }
        }
        if whole == 0 {
            return Ok(None);
        }
        let header =
            header.ok_or_else(|| Error::file(path, "has no header line: choose another `output`, or remove it"))?;
        Ok(Some((Records { header, answers, speeds, windows }, whole)))
    }

    /// Writes a whole file.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write(&self, path: &Path) -> Result<()> {
        let lines = std::iter::once(Line::Header(Box::new(self.header.clone())))
            .chain(self.answers.iter().cloned().map(|record| Line::Answer(Box::new(record))))
            .chain(self.speeds.iter().cloned().map(Line::Speed))
            .chain(self.windows.iter().cloned().map(Line::Window));
        atomic_file::write_with(path, |file| {
            for line in lines {
                file.write_all(to_line(path, &line)?.as_bytes()).map_err(Error::write(path))?;
            }
            Ok(())
        })
    }
}

/// The file while a run adds to it.
pub struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    /// Opens the file of a run: a new one, or what an interrupted run of the same identity left.
    ///
    /// # Errors
    /// When another run's file is in the way; file-system errors.
    pub fn open(path: &Path, header: Header) -> Result<(Self, Records)> {
        let found = if path.exists() { Records::read_prefix(path, true)? } else { None };
        if let Some((records, whole)) = found {
            // A run that ended before its first answer is nothing to lose.
            if records.is_empty() {
                return Self::create(path, header);
            }
            if records.header.identity != header.identity {
                return Err(Error::file(
                    path,
                    "belongs to a run with other settings, models or prompts; choose another `output` or remove it",
                ));
            }
            let (there, here) = (records.header.place(), header.place());
            if there != here {
                return Err(Error::file(
                    path,
                    format!(
                        "belongs to a run on [{there}]; this is [{here}], and times of both would stand under one name: go on \
                         there, or choose another `output`"
                    ),
                ));
            }
            let mut file = OpenOptions::new().write(true).open(path).map_err(Error::write(path))?;
            file.set_len(whole).and_then(|()| file.seek(std::io::SeekFrom::End(0))).map_err(Error::write(path))?;
            return Ok((Journal { path: path.to_owned(), file }, records));
        }
        Self::create(path, header)
    }

    fn create(path: &Path, header: Header) -> Result<(Self, Records)> {
        let records = Records::new(header);
        records.write(path)?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::write(path))?;
        Ok((Journal { path: path.to_owned(), file }, records))
    }

    /// Adds lines, on disk when this returns.
    ///
    /// # Errors
    /// File-system errors.
    pub fn append(&mut self, lines: &[Line]) -> Result<()> {
        let mut text = String::new();
        for line in lines {
            text.push_str(&to_line(&self.path, line)?);
        }
        self.file.write_all(text.as_bytes()).and_then(|()| self.file.sync_data()).map_err(Error::write(&self.path))
    }
}

/// Refuses what another version wrote; without one it is something else, which is told when it is read.
///
/// # Errors
/// Names both versions.
pub fn expect_version(path: &Path, document: &Value) -> Result<()> {
    match &document["schema_version"] {
        Value::Null => Ok(()),
        found if *found == SCHEMA_VERSION => Ok(()),
        found => Err(Error::file(
            path,
            format!("has schema version {found}; this build reads {SCHEMA_VERSION}: use the build that wrote it"),
        )),
    }
}

fn to_line(path: &Path, line: &Line) -> Result<String> {
    let mut text = serde_json::to_string(line).map_err(|error| Error::file(path, error.to_string()))?;
    text.push('\n');
    Ok(text)
}
