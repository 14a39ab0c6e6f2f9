//! One side of a comparison: the answers and timings of one model with one strategy of a run.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use cllm_core::chat_template::Date;
use cllm_core::decode::Strategy;
use cllm_core::task::Task;
use cllm_core::{Error, Result, progress};
use serde_json::json;

use super::selector::{DefaultChoice, answered, select};
use crate::config::RunSettings;
use crate::records::{AnswerRecord, Header, Records, SAMPLES, SpeedRecord};
use crate::results::Results;
use crate::role::Role;

pub(super) struct Selection {
    /// Folder of the run.
    pub(super) run: PathBuf,
    records: Records,
    pub(super) role: Role,
    pub(super) strategy: Strategy,
}

impl Selection {
    /// Reads a run, given its folder or a file in it. `option` is the name of the selector on the
    /// command line.
    ///
    /// # Errors
    /// When the run is missing or broken, or the selector matches nothing.
    pub(super) fn read(path: &Path, selector: Option<&str>, option: &str, default: DefaultChoice) -> Result<Self> {
        let run = if path.is_dir() { path } else { path.parent().unwrap_or(Path::new("")) }.to_owned();
        if !path.exists() {
            return Err(Error::file(
                path,
                "does not exist: name the folder of a run of cllm-eval, or its results.json",
            ));
        }
        let records = Records::read(&run.join(SAMPLES))?;
        if records.header.benchmark == Task::Perplexity {
            return Err(Error::file(
                &run,
                "holds perplexities and no answers: its results.json has those of both models",
            ));
        }
        let results = Results::from_records(&records);
        let (role, strategy) = select(&results, selector, default).map_err(|problem| {
            let choices: Vec<String> =
                answered(&results).map(|(role, figures)| format!("{role}/{}", figures.label)).collect();
            Error::file(&run, format!("{problem}; select one of {} with {option}", choices.join(", ")))
        })?;
        Ok(Selection { run, records, role, strategy })
    }

    pub(super) fn name(&self) -> String {
        format!("{}/{} of {}", self.role, self.strategy, self.run.display())
    }

    pub(super) fn header(&self) -> &Header {
        &self.records.header
    }

    pub(super) fn is_same_as(&self, other: &Selection) -> bool {
        self.run == other.run && (self.role, self.strategy) == (other.role, other.strategy)
    }

    /// Refuses a run of different prompts, and logs settings that could by themselves cause a
    /// difference.
    ///
    /// # Errors
    /// When benchmark or split differs.
    pub(super) fn expect_comparable(&self, other: &Selection) -> Result<()> {
        let (a, b) = (self.header(), other.header());
        let describe = |header: &Header| format!("{} / {}", header.benchmark.name(), header.split);
        if describe(a) != describe(b) {
            let run = self.run.display();
            let message =
                format!("answers {}, but {run} answers {}: compare runs of the same prompts", describe(b), describe(a));
            return Err(Error::file(&other.run, message));
        }
        let differs = |key: &str, a: String, b: String| {
            if a != b {
                progress::log(format!("{key} is {a} in A and {b} in B, which may also cause a difference"));
            }
        };
        let (a, b) = (&a.settings, &b.settings);
        differs("keep_distinct", a.keep_distinct.to_string(), b.keep_distinct.to_string());
        differs("max_new_tokens", a.max_new_tokens.to_string(), b.max_new_tokens.to_string());
        let limit = |settings: &RunSettings| json!(settings.max_thinking_tokens).to_string();
        differs("max_thinking_tokens", limit(a), limit(b));
        differs("temperature", a.temperature.to_string(), b.temperature.to_string());
        let (a, b) = (&a.rendering, &b.rendering);
        differs(
            "chat_template_kwargs",
            json!(a.chat_template_kwargs).to_string(),
            json!(b.chat_template_kwargs).to_string(),
        );
        let date = |date: Option<Date>| date.map_or("none or not recorded".to_owned(), |date| date.to_string());
        differs("date", date(a.date), date(b.date));
        let template = |side: &Selection| {
            let model = side.header().model(side.role);
            model.and_then(|model| model.chat_template.clone()).unwrap_or("none or not recorded".to_owned())
        };
        differs("chat_template", template(self), template(other));
        Ok(())
    }

    fn answers(&self) -> HashMap<&str, &AnswerRecord> {
        self.records.answers_of(self.role, self.strategy).map(|answer| (answer.id.as_str(), answer)).collect()
    }

    pub(super) fn num_answers(&self) -> usize {
        self.answers().len()
    }

    /// Returns the answers of both sides to the same examples, in the order of the prompt set, so
    /// that the same files always give the same intervals.
    ///
    /// # Errors
    /// When there is no such example, or examples with the same id differ.
    pub(super) fn pair_answers<'s>(
        &'s self,
        other: &'s Selection,
    ) -> Result<Vec<(&'s AnswerRecord, &'s AnswerRecord)>> {
        let of_other = other.answers();
        let mut pairs: Vec<(&AnswerRecord, &AnswerRecord)> =
            self.answers().into_iter().filter_map(|(id, answer)| Some((answer, *of_other.get(id)?))).collect();
        pairs.sort_by_key(|(answer, _)| answer.index);
        let run = self.run.display();
        if pairs.is_empty() {
            let message = format!("has no example in common with {run}: compare runs of the same prompts");
            return Err(Error::file(&other.run, message));
        }
        if let Some((a, b)) = pairs.iter().find(|(a, b)| (&a.source, &a.reference) != (&b.source, &b.reference)) {
            let (id, source_a, source_b) = (&b.id, &a.source, &b.source);
            let message = format!(
                "example `{id}` has another source or reference than in {run} (`{source_b}` here, `{source_a}` there): the \
                 runs answered other prompts with the same ids"
            );
            return Err(Error::file(&other.run, message));
        }
        Ok(pairs)
    }

    /// Returns the timings of both sides on the same examples, in the order of the prompt set.
    pub(super) fn pair_speeds<'s>(&'s self, other: &'s Selection) -> Vec<(&'s SpeedRecord, &'s SpeedRecord)> {
        let of_other: HashMap<&str, &SpeedRecord> =
            other.records.speeds_of(other.role, other.strategy).map(|speed| (speed.id.as_str(), speed)).collect();
        let mut pairs: Vec<(&SpeedRecord, &SpeedRecord)> = self
            .records
            .speeds_of(self.role, self.strategy)
            .filter_map(|speed| Some((speed, *of_other.get(speed.id.as_str())?)))
            .collect();
        pairs.sort_by_key(|(speed, _)| speed.index);
        pairs
    }
}
