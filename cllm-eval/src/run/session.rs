//! A run with checked inputs and an open journal: the state that the stages share.

use std::path::Path;

use cllm_core::chat_template::today;
use cllm_core::decode::Strategy;
use cllm_core::environment::{Hardware, Toolkit};
use cllm_core::prompt_set::Sample;
use cllm_core::sandbox::Sandbox;
use cllm_core::task::Task;
use cllm_core::{Error, Result, atomic_file, fingerprint, output_folder};
use tch::Device;

use super::concurrency::NUM_REPETITIONS;
use super::examples::Examples;
use super::models::IdentifiedModel;
use crate::config::RunSettings;
use crate::journal::Journal;
use crate::records::{Header, ModelEntry, SAMPLES, SCHEMA_VERSION};
use crate::results::Results;
use crate::role::Role;
use crate::score::AnswerScorer;

pub(super) struct Session<'a> {
    /// The settings that matter for this benchmark.
    pub(super) settings: RunSettings,
    pub(super) samples: &'a [Sample],
    pub(super) scorer: AnswerScorer<'a>,
    pub(super) device: Device,
    /// Indices of the examples to time.
    pub(super) timed: Vec<usize>,
    pub(super) journal: Journal,
}

impl<'a> Session<'a> {
    /// Creates the output folder, or opens that of an interrupted run.
    ///
    /// # Errors
    /// When the folder belongs to another run; file-system errors.
    pub(super) fn open(
        settings: &RunSettings,
        examples: &'a Examples,
        scorer: AnswerScorer<'a>,
        sandbox: Option<&Sandbox>,
        models: &[IdentifiedModel],
        device: Device,
    ) -> Result<Self> {
        let used = relevant_settings(settings, examples.task);
        let models: Vec<ModelEntry> = models.iter().map(|model| model.entry.clone()).collect();
        let header = Header {
            schema_version: SCHEMA_VERSION,
            identity: identity(&used, &models, &examples.samples)?,
            benchmark: examples.task,
            split: examples.split.clone(),
            examples: examples.samples.len(),
            set_aside: examples.num_set_aside,
            hardware: Hardware::detect(device),
            toolkit: Toolkit::current(),
            started_on: Some(today()),
            commit: option_env!("CLLM_COMMIT").map(str::to_owned),
            sandbox: sandbox.map(|sandbox| sandbox.layers().to_vec()),
            models,
            settings: used.clone(),
        };
        let journal = open_journal(&settings.output, header, scorer)?;
        output_folder::save_settings(&settings.output, "cllm-eval run", settings)?;
        let samples = &examples.samples[..];
        let timed = spread_evenly(used.num_speed_examples, samples.len());
        Ok(Session { settings: used, samples, scorer, device, timed, journal })
    }

    /// The strategies of a model.
    pub(super) fn strategies_of(&self, role: Role) -> impl Iterator<Item = Strategy> + '_ {
        self.journal.records().header.strategies_of(role)
    }

    /// Whether an earlier run measured everything and wrote its results.
    pub(super) fn is_complete(&self) -> bool {
        let (records, settings) = (self.journal.records(), &self.settings);
        let header = &records.header;
        let num_turns: usize = header.models.iter().map(|model| header.strategies_of(model.role).count()).sum();
        let is_measured = records.answers.len() == num_turns * self.samples.len()
            && records.speeds.len() == num_turns * self.timed.len()
            && settings.concurrency.iter().filter(|&&rows| rows > 1).all(|rows| {
                let repetitions = records.throughputs.iter().filter(|one| one.concurrency == *rows);
                repetitions.count() == num_turns * NUM_REPETITIONS
            });
        is_measured && Results::read(&settings.output).is_ok_and(|results| results.settings == *settings)
    }
}

fn open_journal(output: &Path, header: Header, scorer: AnswerScorer<'_>) -> Result<Journal> {
    output_folder::expect_own(output, || output.join(SAMPLES).exists())?;
    atomic_file::recover(output)?;
    Journal::open(&output.join(SAMPLES), header, scorer)
}

/// Texts are read, not answered, so strategies and timing do not apply to them.
fn relevant_settings(settings: &RunSettings, task: Task) -> RunSettings {
    match task {
        Task::Perplexity => {
            RunSettings { strategies: Vec::new(), num_speed_examples: 0, concurrency: Vec::new(), ..settings.clone() }
        }
        _ => settings.clone(),
    }
}

/// Fingerprint of everything that must be unchanged for a run to resume. A run that was started when
/// the settings of scoring were part of it keeps its own. Which they were then is unknown, because
/// `score` changes them.
fn identity(settings: &RunSettings, models: &[ModelEntry], samples: &[Sample]) -> Result<String> {
    let identity = hash(&settings.of_run(), models, samples)?;
    let recorded = Header::read(&settings.output.join(SAMPLES))?.filter(|header| header.identity != identity);
    let Some(recorded) = recorded else { return Ok(identity) };
    for data in [None, settings.data.clone(), recorded.settings.data] {
        for (execute_code, keep_distinct) in [(false, false), (false, true), (true, false), (true, true)] {
            let started = RunSettings { data: data.clone(), execute_code, keep_distinct, ..settings.of_run() };
            if hash(&started, models, samples)? == recorded.identity {
                return Ok(recorded.identity);
            }
        }
    }
    Ok(identity)
}

/// Whether a student adapts its teacher is left out, because it follows from the two models.
fn hash(settings: &RunSettings, models: &[ModelEntry], samples: &[Sample]) -> Result<String> {
    let models: Vec<_> = models.iter().map(|model| ModelEntry { adapts_teacher: false, ..model.clone() }).collect();
    let text = serde_json::to_vec(&(settings, models, samples)).map_err(Error::serialization)?;
    Ok(fingerprint::hash_bytes(&text))
}

/// Indices of `num` of `total` examples. They are spread evenly because neighbours are often alike,
/// such as questions about one database.
fn spread_evenly(num: usize, total: usize) -> Vec<usize> {
    let num = num.min(total);
    (0..num).map(|number| number * total / num).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timed_examples_are_spread_evenly() {
        assert_eq!(spread_evenly(3, 10), [0, 3, 6]);
        assert_eq!(spread_evenly(5, 4), [0, 1, 2, 3]);
        assert!(spread_evenly(0, 4).is_empty() && spread_evenly(3, 0).is_empty());
    }
}
