//! The journal of a run: its records, kept in memory and written to disk as soon as they exist.
//!
//! A run that was killed resumes from the complete lines of its file. Records of different
//! settings, models, prompts or machines are never mixed: the header of the file must say that it
//! belongs to the same run.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};

use cllm_core::{Error, Result, atomic_file, disk, progress, settings};
use serde_json::{Value, json};

use crate::config::RunSettings;
use crate::records::{AnswerRecord, Header, LineRef, ModelEntry, Records, SpeedRecord, ThroughputRecord, WindowRecord};
use crate::role::Role;
use crate::score::AnswerScorer;

pub struct Journal {
    path: PathBuf,
    file: File,
    records: Records,
}

impl Journal {
    /// Opens the file of a run: a new one, or the one that an interrupted run with the same header
    /// left. If its answers were scored by other settings, `scorer` scores them again: all verdicts of
    /// a run are by the same rules.
    ///
    /// # Errors
    /// When the file belongs to another run, or its answers would lose verdicts; as
    /// [`AnswerScorer::score`]; file-system errors.
    pub fn open(path: &Path, header: Header, scorer: AnswerScorer<'_>) -> Result<Self> {
        let left = if path.exists() { Records::read_interrupted(path)? } else { None };
        match left {
            // A run that ended before its first answer has nothing to lose.
            Some((mut records, whole_bytes)) if !records.is_empty() => {
                expect_same_run(path, &records.header, &header)?;
                expect_no_lost_verdicts(path, &records.header.settings, &header.settings)?;
                let is_scored_alike = records.header.settings.scoring() == header.settings.scoring();
                (records.header.settings, records.header.sandbox) = (header.settings, header.sandbox);
                if !is_scored_alike {
                    progress::log(
                        "scoring the finished answers again: data, execute_code or keep_distinct has changed",
                    );
                    scorer.score(&mut records.answers).map_err(|error| error.in_file(path))?;
                    return Self::create(path, records);
                }
                let mut file = OpenOptions::new().write(true).open(path).map_err(Error::write(path))?;
                file.set_len(whole_bytes).and_then(|()| file.seek(SeekFrom::End(0))).map_err(Error::write(path))?;
                Ok(Journal { path: path.to_owned(), file, records })
            }
            _ => Self::create(path, Records::new(header)),
        }
    }

    fn create(path: &Path, records: Records) -> Result<Self> {
        records.write(path)?;
        let file = OpenOptions::new().append(true).open(path).map_err(Error::write(path))?;
        Ok(Journal { path: path.to_owned(), file, records })
    }

    pub fn records(&self) -> &Records {
        &self.records
    }

    /// The answers, for filling in what was unknown when they were appended. [`Journal::finish`]
    /// writes the changes.
    pub fn answers_mut(&mut self) -> &mut [AnswerRecord] {
        &mut self.records.answers
    }

    /// Appends answers. They are on disk when this returns.
    ///
    /// # Errors
    /// File-system errors.
    pub fn append_answers(&mut self, answers: Vec<AnswerRecord>) -> Result<()> {
        self.append(answers.iter().map(LineRef::Answer))?;
        self.records.answers.extend(answers);
        Ok(())
    }

    /// Appends a timing. It is on disk when this returns.
    ///
    /// # Errors
    /// File-system errors.
    pub fn append_speed(&mut self, speed: SpeedRecord) -> Result<()> {
        self.append(std::iter::once(LineRef::Speed(&speed)))?;
        self.records.speeds.push(speed);
        Ok(())
    }

    /// Appends a repetition of continuous batching. It is on disk when this returns.
    ///
    /// # Errors
    /// File-system errors.
    pub fn append_throughput(&mut self, throughput: ThroughputRecord) -> Result<()> {
        self.append(std::iter::once(LineRef::Throughput(&throughput)))?;
        self.records.throughputs.push(throughput);
        Ok(())
    }

    /// Appends a text window. It is on disk when this returns.
    ///
    /// # Errors
    /// File-system errors.
    pub fn append_window(&mut self, window: WindowRecord) -> Result<()> {
        self.append(std::iter::once(LineRef::Window(&window)))?;
        self.records.windows.push(window);
        Ok(())
    }

    fn append<'r>(&mut self, lines: impl Iterator<Item = LineRef<'r>>) -> Result<()> {
        let mut text = String::new();
        for line in lines {
            text.push_str(&line.to_json()?);
        }
        let written = atomic_file::append(&mut self.file, &self.path, text.as_bytes());
        let synced = written.and_then(|()| disk::sync_file(&self.file, &self.path).map_err(Error::write(&self.path)));
        synced.map_err(|error| match self.records.answers.is_empty() {
            true => error,
            false => error.with_kept_work("finished answers are kept"),
        })
    }

    /// Rewrites the file in the order of models, strategies and prompts, because batches ran by
    /// length.
    ///
    /// # Errors
    /// File-system errors.
    pub fn finish(self) -> Result<Records> {
        let Journal { path, mut records, .. } = self;
        let strategies = records.header.settings.strategies.clone();
        let order =
            |role: Role, strategy| (role == Role::Student, strategies.iter().position(|&other| other == strategy));
        records.answers.sort_by_key(|answer| (order(answer.role, answer.strategy), answer.index));
        records.speeds.sort_by_key(|speed| (order(speed.role, speed.strategy), speed.index));
        records.throughputs.sort_by_key(|one| (order(one.role, one.strategy), one.concurrency, one.repetition));
        records.write(&path)?;
        Ok(records)
    }
}

/// Refuses to resume another run, naming what differs.
fn expect_same_run(path: &Path, before: &Header, now: &Header) -> Result<()> {
    if before.identity != now.identity {
        let difference = difference(before, now);
        return Err(Error::file(path, format!("{difference}; choose another `output`, or delete its folder")));
    }
    let (there, here) = (before.environment(), now.environment());
    if there != here {
        return Err(Error::file(
            path,
            format!(
                "belongs to a run on [{there}]; this is [{here}], and timings of two machines must not be mixed: resume \
                 it there, or choose another `output`"
            ),
        ));
    }
    Ok(())
}

/// Refuses to resume a run whose answers `score`, or an earlier command, scored by a setting that this
/// command lacks.
fn expect_no_lost_verdicts(path: &Path, before: &RunSettings, now: &RunSettings) -> Result<()> {
    let data = before.data.as_ref().filter(|_| now.data.is_none()).map(|data| format!("data={}", data.display()));
    let execute_code = (before.execute_code && !now.execute_code).then(|| "execute_code=true".to_owned());
    match data.or(execute_code) {
        None => Ok(()),
        Some(setting) => Err(Error::file(
            path,
            format!(
                "its answers were scored with {setting}, and this command would take their verdicts away: add \
                 `{setting}`, or choose another `output`"
            ),
        )),
    }
}

/// Describes how two runs differ.
fn difference(before: &Header, now: &Header) -> String {
    let values = |header: &Header| serde_json::to_value(header.settings.of_run()).unwrap_or(Value::Null);
    let (old, new) = (values(before), values(now));
    let mut keys = new.as_object().into_iter().flatten().map(|(key, _)| key.as_str());
    if let Some(key) = keys.find(|&key| old[key] != new[key]) {
        return settings::change("was started", key, &old[key], &new[key]);
    }
    let same_weights =
        |model: &&ModelEntry| before.model(model.role).is_some_and(|old| old.fingerprint == model.fingerprint);
    let other_template = now
        .models
        .iter()
        .filter(same_weights)
        .find(|model| before.model(model.role).is_some_and(|old| old.chat_template != model.chat_template));
    if let Some(model) = other_template {
        return format!("was started with another chat template of the {}", model.role);
    }
    let other_model = now.models.iter().find(|model| before.model(model.role) != Some(model));
    match other_model {
        Some(model) => format!("was started with another {}: {} has changed since", model.role, model.path),
        // The prompts are those of `data`.
        None if now.settings.prompts.is_none() && before.settings.data != now.settings.data => {
            settings::change("was started", "data", &json!(before.settings.data), &json!(now.settings.data))
        }
        None => "was started with other prompts".to_owned(),
    }
}
