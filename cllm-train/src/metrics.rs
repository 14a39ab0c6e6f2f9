//! The metrics of a run over its steps: metrics.jsonl, and the same numbers as TensorBoard events.

use std::cmp::Ordering;
use std::fs::File;
use std::path::PathBuf;

use cllm_core::settings::to_yaml;
use cllm_core::{Error, Result, atomic_file, disk, progress};
use serde::Serialize;
use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use crate::losses::Losses;
use crate::settings::Settings;
use crate::tensorboard::EventFile;
use crate::validation::ValidationOutput;

/// One line of metrics.jsonl about training; docs/data-format.md describes the fields.
#[derive(Serialize)]
pub struct StepMetrics {
    pub step: usize,
    pub loss: f64,
    #[serde(flatten)]
    pub losses: NamedLosses,
    pub lr: f64,
    pub grad_norm: f64,
    pub tokens: usize,
    pub step_tokens: usize,
    pub noisy_tokens: usize,
    pub seconds: f64,
    pub tokens_per_second: f64,
}

/// The unweighted losses, by their names in metrics.jsonl.
#[derive(Serialize)]
pub struct NamedLosses {
    ar_loss: f64,
    global_loss: f64,
    local_loss: f64,
    anchor_loss: f64,
}

impl From<Losses<f64>> for NamedLosses {
    fn from(Losses { ar, global, local, anchor }: Losses<f64>) -> Self {
        NamedLosses { ar_loss: ar, global_loss: global, local_loss: local, anchor_loss: anchor }
    }
}

/// The metrics files of a run.
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    events: EventFile,
    last_step_metrics: Value,
}

impl MetricsLog {
    /// Opens the files of a run that starts or resumes after `step`. Lines of later steps are
    /// removed, since those steps are taken again. So is a validation after `step`, unless the
    /// checkpoint knows of it.
    ///
    /// # Errors
    /// File-system errors.
    pub fn open(settings: &Settings, step: usize, is_validated: bool) -> Result<Self> {
        let run = &settings.output;
        let path = run.join("metrics.jsonl");
        let old = match std::fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Error::io(&path)(error)),
        };
        let is_kept = |line: &Value| match line["step"].as_u64().map(|line_step| line_step.cmp(&(step as u64))) {
            Some(Ordering::Less) => true,
            Some(Ordering::Equal) => is_validated || is_step(line),
            _ => false,
        };
        let num_invalid = num_invalid_lines(&old);
        if num_invalid > 0 {
            let lines = progress::count(num_invalid, "line");
            progress::log(format!("{}: {lines} that are not JSON are left out", path.display()));
        }
        let lines = old.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let kept: Vec<Value> = lines.filter(is_kept).collect();
        let text: String = kept.iter().map(|line| format!("{line}\n")).collect();
        atomic_file::write(&path, text.as_bytes())?;
        let file = std::fs::OpenOptions::new().append(true).open(&path).map_err(Error::write(&path))?;
        let mut events = EventFile::create(&run.join("tensorboard"))?;
        events.write_text("settings", &to_yaml(settings)?)?;
        events.write_hyper_parameters(&serde_json::to_value(settings).map_err(Error::serialization)?)?;
        for line in &kept {
            write_events(&mut events, line)?;
        }
        let last_step_metrics = kept.into_iter().rfind(is_step).unwrap_or_default();
        Ok(MetricsLog { path, file, events, last_step_metrics })
    }

    /// # Errors
    /// File-system errors.
    pub fn write_step(&mut self, metrics: &StepMetrics) -> Result<()> {
        let line = to_fields(metrics)?.into();
        self.write(&line)?;
        if is_step(&line) {
            self.last_step_metrics = line;
        }
        Ok(())
    }

    /// # Errors
    /// File-system errors.
    pub fn write_validation(&mut self, step: usize, output: &ValidationOutput, weights: Losses<f64>) -> Result<()> {
        let mut fields = Map::new();
        if let Some(generation) = &output.generation {
            fields.extend(to_fields(generation)?);
        }
        if let Some(losses) = output.losses {
            fields.insert("loss".to_owned(), losses.weighted_sum(weights).into());
            fields.extend(to_fields(&NamedLosses::from(losses))?);
        }
        let mut line: Map<String, Value> =
            fields.into_iter().map(|(name, value)| (format!("validation_{name}"), value)).collect();
        line.insert("step".to_owned(), step.into());
        self.write(&line.into())
    }

    fn write(&mut self, line: &Value) -> Result<()> {
        atomic_file::append(&mut self.file, &self.path, format!("{line}\n").as_bytes())?;
        write_events(&mut self.events, line)
    }

    /// Waits until all lines are on disk: before a checkpoint, from which a run resumes after them. The
    /// steps of later lines would be taken again.
    ///
    /// # Errors
    /// File-system errors.
    pub fn sync(&self) -> Result<()> {
        disk::sync_file(&self.file, &self.path).map_err(Error::write(&self.path))
    }

    /// The last line about training; null if there is none.
    pub fn last_step_metrics(&self) -> &Value {
        &self.last_step_metrics
    }
}

/// Lines that are not JSON, without the one that a kill may have cut off.
fn num_invalid_lines(text: &str) -> usize {
    let complete = text.rfind('\n').map_or("", |end| &text[..end]);
    complete.lines().filter(|line| serde_json::from_str::<IgnoredAny>(line).is_err()).count()
}

fn to_fields(metrics: &impl Serialize) -> Result<Map<String, Value>> {
    match serde_json::to_value(metrics).map_err(Error::serialization)? {
        Value::Object(fields) => Ok(fields),
        _ => Err(Error::internal("metrics are not an object")),
    }
}

/// Whether a line is about training (with a finite loss), not about a validation.
fn is_step(line: &Value) -> bool {
    line["loss"].is_number()
}

fn write_events(events: &mut EventFile, line: &Value) -> Result<()> {
    let numbers = line.as_object().into_iter().flatten().filter(|(name, _)| *name != "step");
    let values: Vec<(String, f32)> =
        numbers.filter_map(|(name, value)| Some((tag(name), value.as_f64()? as f32))).collect();
    events.write(line["step"].as_i64().unwrap_or(0), &values)
}

/// The tag of a metric in TensorBoard, which shows those before a slash as a group.
fn tag(name: &str) -> String {
    match name.strip_prefix("validation_") {
        Some(rest) => format!("validation/{rest}"),
        None => format!("train/{name}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_lines_are_counted_but_not_the_one_that_a_kill_cut_off() {
        for (text, count) in [("", 0), ("{}\n{\"step\": 1}\n{\"st", 0), ("{}\n{\"st\n{}\n", 1), ("\0\n{\n{}", 2)] {
            assert_eq!(num_invalid_lines(text), count, "{text:?}");
        }
    }
}
