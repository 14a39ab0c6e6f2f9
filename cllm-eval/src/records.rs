//! The records of a run, and the file that holds them: `samples.jsonl`.
//!
//! The file begins with a header. Every answer, timing and text window follows on a line of its
//! own, written as soon as it exists. The file alone is enough to resume a run after a kill, to
//! score its answers again and to draw a report.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::ops::Range;
use std::path::Path;

use cllm_core::chat_template::Date;
use cllm_core::decode::Strategy;
use cllm_core::environment::{Hardware, Toolkit};
use cllm_core::prompt_set::{Prompt, Sample};
use cllm_core::task::{Alternative, Task, Verdict};
use cllm_core::thought::Thought;
use cllm_core::trajectory::FinishReason;
use cllm_core::{Error, Result, atomic_file, checksum, progress};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::RunSettings;
use crate::role::Role;

/// Version of `samples.jsonl`, `results.json` and the documents that are computed from them.
pub const SCHEMA_VERSION: u32 = 2;
/// Limit of a line's counts, whose sums then fit.
const MAX_COUNT: usize = 1 << 40;
/// Name of the file in a run's folder.
pub const SAMPLES: &str = "samples.jsonl";

/// An evaluated model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelEntry {
    pub role: Role,
    /// The folder that the model was loaded from.
    pub path: String,
    /// Hash of its configuration and weights.
    pub fingerprint: String,
    /// Number of weights.
    pub parameters: i64,
    /// Fingerprint of the chat template that rendered its prompts; null without one.
    #[serde(default)]
    pub chat_template: Option<String>,
    /// Whether it is the teacher with adapters for draft tokens. Then only strategies that use these are
    /// measured: with others, it would be the teacher once more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub adapts_teacher: bool,
}

impl ModelEntry {
    /// The role of the model that has the autoregressive answers of this one.
    pub fn autoregressive_role(&self) -> Role {
        if self.adapts_teacher { Role::Teacher } else { self.role }
    }
}

/// The first line of the file: what was run, and where.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub schema_version: u32,
    /// Fingerprint of settings, models and prompts. A run resumes only if it is unchanged.
    pub identity: String,
    /// The benchmark, which also decides how answers are scored.
    pub benchmark: Task,
    /// `mixed` if the prompts come from several splits.
    pub split: String,
    /// Number of prompts.
    pub examples: usize,
    /// Number of rows of the prompt set that could not be read, and are no prompts.
    #[serde(default)]
    pub set_aside: usize,
    pub hardware: Hardware,
    pub toolkit: Toolkit,
    /// The day on which the run was started.
    #[serde(default)]
    pub started_on: Option<Date>,
    /// The commit of the toolkit, if it was built for release in a checkout.
    #[serde(default)]
    pub commit: Option<String>,
    /// Layers of the sandbox that ran the code of answers. `None` if no code ran.
    #[serde(default)]
    pub sandbox: Option<Vec<String>>,
    pub models: Vec<ModelEntry>,
    /// The resolved settings.
    pub settings: RunSettings,
}

/// One answer of the accuracy run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AnswerRecord {
    pub role: Role,
    pub strategy: Strategy,
    /// Position of the prompt in the prompt set, from 0.
    pub index: usize,
    /// Id of the prompt in the prompt set.
    pub id: String,
    /// Benchmark and split, such as `gsm8k/test`.
    pub source: String,
    /// The prompt as the model read it, after its chat template.
    pub prompt: String,
    pub prompt_tokens: usize,
    /// The data set's own answer.
    pub reference: Option<String>,
    /// What the task needs to score the answer, such as Spider's `db_id`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<Value>,
    /// Tokens of the answer, EOS included.
    pub response_ids: Vec<i32>,
    pub text: String,
    pub verdict: Verdict,
    /// The verdict by the benchmark's other rule of what is correct. Absent if it has one rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alternative: Option<Alternative>,
    pub finish_reason: FinishReason,
    /// How its thought ended. `None` if it has no thought.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thought: Option<Thought>,
    /// Forwards of this answer after prefill.
    pub forwards: usize,
    /// Tokens accepted per forward. They sum to the length of the answer, without the tokens that
    /// closed its thought at the limit.
    pub accepted: Vec<u32>,
    /// Seconds of the batch's prefill, divided by the number of its answers.
    pub batch_prefill_seconds: f64,
    /// Seconds of the batch's decoding, divided by the number of its answers.
    pub batch_seconds: f64,
    /// Peak GPU memory up to the end of its batch, excluding what was in use before this model was
    /// loaded. Null on the CPU.
    pub peak_memory_bytes: Option<u64>,
    /// Best minus second-best logit at the first token that differs from the same model's
    /// autoregressive answer, computed in one forward over all tokens before it. `None` if no token
    /// differs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logit_gap_at_difference: Option<f64>,
    /// Text of each forward's tokens. Only the first few examples keep it, for reports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forward_texts: Option<Vec<String>>,
}

/// One timing at batch 1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpeedRecord {
    pub role: Role,
    pub strategy: Strategy,
    /// Position of the prompt in the prompt set, from 0.
    pub index: usize,
    /// Id of the prompt in the prompt set.
    pub id: String,
    /// Tokens of the answer, EOS included, without those that closed its thought at the limit.
    pub tokens: usize,
    /// Forwards after prefill.
    pub forwards: usize,
    /// Tokens that these forwards had: the last token and the draft tokens of each. Null in records
    /// of earlier versions.
    #[serde(default)]
    pub window_tokens: Option<u64>,
    /// How many of these forwards tried a number of draft tokens whose time was not known, for a
    /// strategy that chooses it.
    #[serde(default)]
    pub probes: usize,
    pub finish_reason: FinishReason,
    pub prefill_seconds: f64,
    /// Seconds of decoding, excluding prefill.
    pub seconds: f64,
    /// When each forward had ended, in seconds of decoding. Only the examples that keep the text of
    /// each forward have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forward_ends: Option<Vec<f64>>,
    /// Peak GPU memory of this model and strategy at batch 1 on the longest timed prompt. Null on
    /// the CPU.
    #[serde(default)]
    pub peak_memory_bytes: Option<u64>,
}

impl SpeedRecord {
    /// When each forward had ended, in seconds of decoding; in records that do not say it, the
    /// forwards share the time evenly.
    pub fn forward_ends(&self) -> Vec<f64> {
        let evenly = || (1..=self.forwards).map(|number| self.seconds * number as f64 / self.forwards as f64).collect();
        self.forward_ends.clone().unwrap_or_else(evenly)
    }
}

/// One repetition of continuous batching: all timed examples, answered as often as it takes to keep
/// the batch full.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ThroughputRecord {
    pub role: Role,
    pub strategy: Strategy,
    /// Number of answers decoded at once.
    pub concurrency: usize,
    /// From 0.
    pub repetition: usize,
    /// Number of answers.
    pub answers: usize,
    /// Number of answers that reached the length limit.
    pub unfinished: usize,
    /// Tokens of the answers, without those that closed a thought at the limit.
    pub tokens: usize,
    /// Forwards after prefill, summed over the answers.
    pub forwards: usize,
    /// Seconds in forwards that cache prompts, while other answers wait.
    pub prefill_seconds: f64,
    /// Seconds in all other forwards, until the last answer has ended.
    pub seconds: f64,
    /// `prefill_seconds` from the admission of an answer to its end, summed over the answers.
    pub answer_prefill_seconds: f64,
    /// `seconds` from the admission of an answer to its end, summed over the answers.
    pub answer_seconds: f64,
}

/// The likelihood of the tokens in one window of a text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct WindowRecord {
    pub role: Role,
    /// Position of the text in the data, from 0.
    pub index: usize,
    /// Id of the text.
    pub id: String,
    /// Position in the text of the window's first token, from 0.
    pub start: usize,
    /// Number of tokens scored, which are the last ones of the window.
    pub tokens: usize,
    /// Sum of the scored tokens' negative log-likelihoods, in nats.
    pub nll: f64,
}

/// A line of the file as it is read.
#[derive(Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
enum Line {
    Header(Box<Header>),
    Answer(Box<AnswerRecord>),
    Speed(SpeedRecord),
    Throughput(ThroughputRecord),
    Window(WindowRecord),
}

impl Line {
    /// What no run with this many examples writes, though it is a record. Figures are sums over lines.
    fn problem(&self, num_examples: usize) -> Option<String> {
        let (index, counts) = match self {
            Line::Header(_) => return None,
            Line::Answer(answer) => (answer.index, vec![answer.prompt_tokens, answer.forwards]),
            Line::Speed(speed) => {
                let window_tokens = speed.window_tokens.unwrap_or(0) as usize;
                (speed.index, vec![speed.tokens, speed.forwards, speed.probes, window_tokens])
            }
            Line::Throughput(one) => (0, vec![one.concurrency, one.answers, one.unfinished, one.tokens, one.forwards]),
            Line::Window(window) => (window.index, vec![window.start, window.tokens]),
        };
        if index >= num_examples {
            return Some(format!("its index is {index}, and there are {num_examples} examples"));
        }
        if let Line::Answer(answer) = self {
            if answer.forced_tokens().end > answer.response_ids.len() {
                return Some("its thought is longer than the answer".to_owned());
            }
            let num_accepted: u64 = answer.accepted.iter().copied().map(u64::from).sum();
            let num_decoded = answer.num_decoded_tokens();
            if num_accepted > num_decoded as u64 {
                return Some(format!("its forwards accepted {num_accepted} tokens, and decoded {num_decoded}"));
            }
        }
        let absurd = counts.into_iter().find(|&count| count > MAX_COUNT)?;
        Some(format!("it says {absurd}, and counts are up to {MAX_COUNT}"))
    }
}

/// A line of the file as it is written.
#[derive(Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(crate) enum LineRef<'r> {
    Header(&'r Header),
    Answer(&'r AnswerRecord),
    Speed(&'r SpeedRecord),
    Throughput(&'r ThroughputRecord),
    Window(&'r WindowRecord),
}

/// All records of a run. Until the run has ended, those of each kind are in the order in which they
/// were made.
#[derive(Debug, Clone, PartialEq)]
pub struct Records {
    pub header: Header,
    pub answers: Vec<AnswerRecord>,
    pub speeds: Vec<SpeedRecord>,
    pub throughputs: Vec<ThroughputRecord>,
    pub windows: Vec<WindowRecord>,
}

impl Header {
    pub fn model(&self, role: Role) -> Option<&ModelEntry> {
        self.models.iter().find(|model| model.role == role)
    }

    /// The strategies of a model. Only the teacher has those with a draft model, which is the
    /// student, and only the student those with adapters for draft tokens; if it is the teacher with
    /// such adapters, it has no others.
    pub fn strategies_of(&self, role: Role) -> impl Iterator<Item = Strategy> + '_ {
        let only_drafts = self.autoregressive_role(role) != role;
        self.settings.strategies.iter().copied().filter(move |strategy| match role {
            Role::Teacher => !strategy.needs_draft_adapters(),
            Role::Student => !strategy.needs_draft_model() && (strategy.needs_draft_adapters() || !only_drafts),
        })
    }

    /// As [`ModelEntry::autoregressive_role`].
    pub fn autoregressive_role(&self, role: Role) -> Role {
        self.model(role).map_or(role, ModelEntry::autoregressive_role)
    }

    /// Machine and versions in one line.
    pub(crate) fn environment(&self) -> String {
        let Toolkit { version, libtorch } = &self.toolkit;
        format!("{}; cllm {version}, libtorch {}", self.hardware.summary(), libtorch.as_deref().unwrap_or("unknown"))
    }
}

impl AnswerRecord {
    /// Positions of the tokens that closed the thought at its limit; an empty range if there are
    /// none.
    pub fn forced_tokens(&self) -> Range<usize> {
        self.thought.as_ref().map_or(0..0, Thought::forced_tokens)
    }

    /// Number of tokens of the answer that the model decoded: all but those that closed its thought.
    pub fn num_decoded_tokens(&self) -> usize {
        self.response_ids.len() - self.forced_tokens().len()
    }

    /// The parts of the prompt that scoring needs.
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

impl Header {
    /// Reads the first line of a file, which may be missing or cut.
    ///
    /// # Errors
    /// File-system errors.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let mut line = Vec::new();
        let mut reader = BufReader::new(File::open(path).map_err(Error::io(path))?);
        reader.read_until(b'\n', &mut line).map_err(Error::io(path))?;
        Ok(serde_json::from_slice(&line).ok())
    }
}

impl Records {
    pub fn new(header: Header) -> Self {
        Records { header, answers: Vec::new(), speeds: Vec::new(), throughputs: Vec::new(), windows: Vec::new() }
    }

    /// The answers of a model with a strategy.
    pub fn answers_of(&self, role: Role, strategy: Strategy) -> impl Iterator<Item = &AnswerRecord> {
        self.answers.iter().filter(move |answer| answer.role == role && answer.strategy == strategy)
    }

    /// The timings of a model with a strategy.
    pub fn speeds_of(&self, role: Role, strategy: Strategy) -> impl Iterator<Item = &SpeedRecord> {
        self.speeds.iter().filter(move |speed| speed.role == role && speed.strategy == strategy)
    }

    /// The repetitions of continuous batching of a model with a strategy.
    pub fn throughputs_of(&self, role: Role, strategy: Strategy) -> impl Iterator<Item = &ThroughputRecord> {
        self.throughputs.iter().filter(move |one| one.role == role && one.strategy == strategy)
    }

    /// The text windows of a model.
    pub fn windows_of(&self, role: Role) -> impl Iterator<Item = &WindowRecord> {
        self.windows.iter().filter(move |window| window.role == role)
    }

    /// Logs which strategies have fewer answers than the run has prompts. `path` is the file of these
    /// records.
    pub(crate) fn log_missing_answers(&self, path: &Path) {
        for role in self.header.models.iter().map(|model| model.role) {
            for strategy in self.header.strategies_of(role) {
                let (num_answers, num_prompts) = (self.answers_of(role, strategy).count(), self.header.examples);
                if num_answers < num_prompts {
                    let path = path.display();
                    progress::log(format!(
                        "{path}: {role} {strategy} has {num_answers} of {num_prompts} answers: run the same `cllm-eval \
                         run` again"
                    ));
                }
            }
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        // Throughput is measured after answers.
        self.answers.is_empty() && self.speeds.is_empty() && self.windows.is_empty()
    }

    /// Reads a file, which may be that of a run that was killed: a last line that was cut off is left
    /// out, and logged.
    ///
    /// # Errors
    /// When a line is not a record: names file and line.
    pub fn read(path: &Path) -> Result<Self> {
        let empty = || Error::file(path, "holds no answers yet: run the same `cllm-eval run` again");
        Ok(Self::read_lines(path, false)?.ok_or_else(empty)?.0)
    }

    /// Reads the file of a run that is to be resumed. Returns the records of the complete lines and
    /// their length in bytes, or `None` if no line is complete.
    ///
    /// # Errors
    /// When a line is not a record: names file and line.
    pub(crate) fn read_interrupted(path: &Path) -> Result<Option<(Self, u64)>> {
        Self::read_lines(path, true)
    }

    fn read_lines(path: &Path, is_resumed: bool) -> Result<Option<(Self, u64)>> {
        let mut reader = BufReader::new(File::open(path).map_err(Error::io(path))?);
        let mut header = None;
        let (mut answers, mut speeds, mut throughputs, mut windows) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut bytes, mut whole_bytes) = (Vec::new(), 0);
        for number in 1.. {
            bytes.clear();
            let num_bytes = reader.read_until(b'\n', &mut bytes).map_err(Error::io(path))?;
            if num_bytes == 0 || (is_resumed && !bytes.ends_with(b"\n")) {
                break;
            }
            if is_cut(&bytes) {
                let path = path.display();
                progress::log(format!("{path}: its last line was cut off: run the same `cllm-eval run` again"));
                break;
            }
            whole_bytes += num_bytes as u64;
            let damaged = || {
                let advice = match number {
                    1 => {
                        "it says which run this is: restore the file from a copy, or remove the line's `checksum` if you \
                         know that the line is right"
                    }
                    _ => {
                        "delete the line, and `cllm-eval run` makes it again, or remove its `checksum` if you changed it"
                    }
                };
                let problem = "is damaged, or was changed: its checksum is of other contents";
                Error::file(path, format!("line {number} {problem}; {advice}"))
            };
            let text = checksum::whole_json(&bytes).ok_or_else(damaged)?;
            let not_a_record =
                |error| Error::file(path, format!("line {number} is not a record of cllm-eval: {error}"));
            if number == 1 {
                let first: Value = serde_json::from_str(text).map_err(not_a_record)?;
                check_version(path, &first)?;
            }
            let line: Line = serde_json::from_str(text).map_err(not_a_record)?;
            // Examples that are shown alone keep their indices. A run that resumes looks its own up.
            let header_if_resumed = header.as_ref().filter(|_| is_resumed);
            let num_examples = header_if_resumed.map_or(usize::MAX, |header: &Header| header.examples);
            if let Some(problem) = line.problem(num_examples) {
                return Err(Error::file(path, format!("line {number} is no record of this run: {problem}")));
            }
            match line {
                Line::Header(record) => header = Some(*record),
                Line::Answer(record) => answers.push(*record),
                Line::Speed(record) => speeds.push(record),
                Line::Throughput(record) => throughputs.push(record),
                Line::Window(record) => windows.push(record),
            }
        }
        if whole_bytes == 0 {
            return Ok(None);
        }
        let header = header
            .ok_or_else(|| Error::file(path, "has no header line: choose another `output`, or delete its folder"))?;
        Ok(Some((Records { header, answers, speeds, throughputs, windows }, whole_bytes)))
    }

    /// Writes a whole file.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write(&self, path: &Path) -> Result<()> {
        let lines = std::iter::once(LineRef::Header(&self.header))
            .chain(self.answers.iter().map(LineRef::Answer))
            .chain(self.speeds.iter().map(LineRef::Speed))
            .chain(self.throughputs.iter().map(LineRef::Throughput))
            .chain(self.windows.iter().map(LineRef::Window));
        atomic_file::write_with(path, |file| {
            for line in lines {
                file.write_all(line.to_json()?.as_bytes()).map_err(Error::write(path))?;
            }
            Ok(())
        })
        .map(drop)
    }
}

impl LineRef<'_> {
    /// The line with its checksum and its newline.
    pub(crate) fn to_json(&self) -> Result<String> {
        let mut text = checksum::add_to_json(&serde_json::to_string(self).map_err(Error::serialization)?)?;
        text.push('\n');
        Ok(text)
    }
}

/// Whether a line was cut off when the run that wrote it was killed: it lacks its newline, and more.
/// The last line of an edited file may lack the newline alone.
fn is_cut(line: &[u8]) -> bool {
    !line.ends_with(b"\n") && serde_json::from_slice::<IgnoredAny>(line).is_err()
}

/// Refuses a document of another schema version. A document without a version passes, so that the
/// code that parses it can report what it is.
///
/// # Errors
/// When the versions differ: names both.
pub fn check_version(path: &Path, document: &Value) -> Result<()> {
    match &document["schema_version"] {
        Value::Null => Ok(()),
        version if *version == SCHEMA_VERSION => Ok(()),
        version => Err(Error::file(
            path,
            format!("has schema version {version}; this build reads {SCHEMA_VERSION}: use the build that wrote it"),
        )),
    }
}
