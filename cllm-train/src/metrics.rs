//! The course of a run: metrics.jsonl, and the same numbers as TensorBoard events.

use std::cmp::Ordering;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use cllm_core::{Error, Result, atomic_file};
use serde_json::Value;

use crate::tensorboard::Events;

/// Both files of a run.
pub struct Metrics {
    path: PathBuf,
    file: File,
    events: Events,
    last_losses: Value,
}

impl Metrics {
    /// Opens the files; what an earlier run wrote after its checkpoint at `step` is dropped, since it comes again. So does the
    /// probe there unless it is `probed`.
    pub fn open(run: &Path, step: usize, probed: bool) -> Result<Self> {
        let path = run.join("metrics.jsonl");
        let old = match std::fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::io(&path)(error)),
        };
        let lines = old.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let before = |line: &Value| match line["step"].as_u64().map(|at| at.cmp(&(step as u64))) {
            Some(Ordering::Less) => true,
            Some(Ordering::Equal) => probed || line["loss"].is_number(),
            _ => false,
        };
        let kept: Vec<Value> = lines.filter(before).collect();
        let text: String = kept.iter().map(|line| format!("{line}\n")).collect();
        atomic_file::write(&path, text.as_bytes())?;
        let file = std::fs::OpenOptions::new().append(true).open(&path).map_err(Error::write(&path))?;
        let mut events = Events::create(&run.join("tensorboard"))?;
        for line in &kept {
            write_events(&mut events, line)?;
        }
        let last_losses = kept.into_iter().rfind(|line| line["loss"].is_number()).unwrap_or_default();
        Ok(Metrics { path, file, events, last_losses })
    }

    /// Writes one line: an object of numbers with its `step`.
    pub fn write(&mut self, line: &Value) -> Result<()> {
        writeln!(self.file, "{line}").map_err(Error::write(&self.path))?;
        if !line["loss"].is_null() {
            self.last_losses = line.clone();
        }
        write_events(&mut self.events, line)
    }

    /// The last line with losses.
    pub fn last_losses(&self) -> Value {
        self.last_losses.clone()
    }
}

fn write_events(events: &mut Events, line: &Value) -> Result<()> {
    let numbers = line.as_object().into_iter().flatten().filter(|(name, _)| *name != "step");
    let values: Vec<(&str, f32)> =
        numbers.filter_map(|(name, value)| Some((name.as_str(), value.as_f64()? as f32))).collect();
    events.write(line["step"].as_i64().unwrap_or(0), &values)
}
