//! `suite`: runs every benchmark that has data, and draws one report of all of them.

use std::path::{Path, PathBuf};

use cllm_core::chat_template::{RenderSettings, today};
use cllm_core::decode::Strategy;
use cllm_core::program::catch_panics;
use cllm_core::progress::count;
use cllm_core::task::Task;
use cllm_core::{Error, Result, atomic_file, output_folder, progress, settings};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{RunSettings, valid_strategies};
use crate::records::SCHEMA_VERSION;
use crate::results::Results;
use crate::terminal::{self, wrap};
use crate::{report, run};

/// Settings of a suite. Every other setting has the default of `run`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SuiteSettings {
    /// Folder or id of the model before consistency training.
    #[garde(skip)]
    pub teacher: Option<String>,
    /// Folder or id of the model after consistency training.
    #[garde(skip)]
    pub student: Option<String>,
    /// Folder that contains a folder (or file) for each benchmark, named as in `cllm-eval ls` or
    /// code_search_net, human_eval, mt_bench. Benchmarks without one are skipped.
    #[garde(custom(settings::required_path))]
    pub data: PathBuf,
    /// Use only the first N examples of each benchmark.
    #[garde(range(min = 1))]
    pub limit: Option<usize>,
    /// Number of examples of each benchmark to time at batch 1, spread evenly over all; 0 measures
    /// only accuracy.
    #[garde(skip)]
    pub num_speed_examples: usize,
    /// How to decode, as in `run`.
    #[garde(length(min = 1), custom(valid_strategies))]
    pub strategies: Vec<Strategy>,
    /// Run the Python code in answers to humaneval and mbpp, as in `run`.
    #[garde(skip)]
    pub execute_code: bool,
    /// For spider: compare the results of the queries with their `DISTINCT`, as in `run`.
    #[garde(skip)]
    pub keep_distinct: bool,
    /// System message to put before each prompt that is a conversation without one. Default: none.
    #[garde(length(min = 1))]
    pub system: Option<String>,
    /// Maximum number of tokens in an answer.
    #[garde(range(min = 1, max = 1_048_576))]
    pub max_new_tokens: usize,
    /// For thinking models: maximum number of tokens in the thought before an answer, as in `run`.
    /// Default: no limit.
    #[garde(range(min = 1, max = 1_048_576))]
    pub max_thinking_tokens: Option<usize>,
    /// Number of answers decoded at once to measure accuracy.
    #[garde(range(min = 1, max = 65_536))]
    pub batch_size: usize,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
    /// Folder to write the report and a folder for each benchmark to.
    #[garde(skip)]
    pub output: PathBuf,
    /// How prompts are rendered.
    #[garde(dive)]
    #[serde(flatten)]
    pub rendering: RenderSettings,
}

impl Default for SuiteSettings {
    fn default() -> Self {
        let run = RunSettings::default();
        SuiteSettings {
            teacher: run.teacher,
            student: run.student,
            data: PathBuf::new(),
            limit: run.limit,
            num_speed_examples: run.num_speed_examples,
            strategies: run.strategies,
            execute_code: run.execute_code,
            keep_distinct: run.keep_distinct,
            system: run.system,
            max_new_tokens: run.max_new_tokens,
            max_thinking_tokens: run.max_thinking_tokens,
            batch_size: run.batch_size,
            device: run.device,
            output: PathBuf::from("runs/suite"),
            rendering: run.rendering,
        }
    }
}

#[derive(Debug, Serialize)]
pub struct Suite {
    pub schema_version: u32,
    /// Every benchmark, in the order of `ls`.
    pub benchmarks: Vec<Entry>,
    /// Files of the report that were written.
    pub report: Vec<PathBuf>,
}

#[derive(Debug, Serialize)]
pub struct Entry {
    pub name: &'static str,
    #[serde(flatten)]
    pub outcome: BenchmarkOutcome,
}

#[derive(Debug, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum BenchmarkOutcome {
    Done { results: Box<Results> },
    Skipped { reason: String },
    Failed { reason: String },
}

/// The command, as its saved settings name it.
pub(crate) const COMMAND: &str = "cllm-eval suite";

/// Runs every benchmark that has data, or resumes an interrupted suite, and draws one report. A
/// benchmark that fails does not stop the others.
///
/// # Errors
/// A data folder that does not exist, interruption, a report that cannot be written.
pub fn suite(settings: &SuiteSettings) -> Result<Suite> {
    if !settings.data.is_dir() {
        return Err(Error::file(
            &settings.data,
            "is not a folder: set `data` to the folder that contains a folder for each benchmark",
        ));
    }
    let settings = &with_date(settings);
    let _lock = output_folder::lock(&settings.output)?;
    output_folder::expect_own(&settings.output, || output_folder::has_settings_of(&settings.output, COMMAND))?;
    atomic_file::recover(&settings.output)?;
    output_folder::save_settings(&settings.output, COMMAND, settings)?;
    let mut benchmarks = Vec::new();
    let mut folders = Vec::new();
    for task in Task::ALL {
        let outcome = run_benchmark(task, settings)?;
        if matches!(outcome, BenchmarkOutcome::Done { .. }) {
            folders.push(settings.output.join(task.name()));
        }
        benchmarks.push(Entry { name: task.name(), outcome });
    }
    let remarks: Vec<String> = benchmarks.iter().filter_map(Entry::remark).collect();
    let report =
        if folders.is_empty() { Vec::new() } else { report::report(&folders, Some(&settings.output), &remarks)? };
    Ok(Suite { schema_version: SCHEMA_VERSION, benchmarks, report })
}

/// The settings with one date for all benchmarks: the one that they set, or that of an interrupted
/// suite in the output folder, or today's.
fn with_date(settings: &SuiteSettings) -> SuiteSettings {
    let mut settings = settings.clone();
    // A file that cannot be read is reported by the run of its benchmark.
    let stored = |task: &Task| run::stored_date(&settings.output.join(task.name())).ok().flatten();
    let date = settings.rendering.date.or_else(|| Task::ALL.iter().find_map(stored));
    settings.rendering.date = date.or_else(|| Some(today()));
    settings
}

fn run_benchmark(task: Task, settings: &SuiteSettings) -> Result<BenchmarkOutcome> {
    let data = find_data(task, &settings.data);
    if data.is_none() && task != Task::Synthetic {
        let (folder, name) = (settings.data.display(), task.name());
        return Ok(BenchmarkOutcome::Skipped {
            reason: format!("no `{name}` in {folder}: it needs {}", task.expected_data()),
        });
    }
    progress::log(format!("{}:", task.name()));
    let settings = run_settings(task, settings, data);
    match catch_panics(|| run::run(&settings)) {
        Ok(results) => Ok(BenchmarkOutcome::Done { results: Box::new(results) }),
        Err(error @ Error::Interrupted(_)) => Err(error),
        Err(error) => {
            progress::log(format!("{} failed: {error}", task.name()));
            Ok(BenchmarkOutcome::Failed { reason: error.to_string() })
        }
    }
}

/// The settings of `run` for one benchmark.
fn run_settings(task: Task, settings: &SuiteSettings, data: Option<PathBuf>) -> RunSettings {
    RunSettings {
        teacher: settings.teacher.clone(),
        student: settings.student.clone(),
        benchmark: Some(task),
        data,
        // Spider does not publish the answers of its test split.
        split: (task == Task::Spider).then(|| "dev".to_owned()),
        limit: settings.limit,
        num_speed_examples: settings.num_speed_examples,
        strategies: settings.strategies.clone(),
        execute_code: settings.execute_code,
        keep_distinct: settings.keep_distinct && task == Task::Spider,
        system: settings.system.clone(),
        max_new_tokens: settings.max_new_tokens,
        max_thinking_tokens: settings.max_thinking_tokens,
        batch_size: settings.batch_size,
        device: settings.device.clone(),
        output: settings.output.join(task.name()),
        rendering: settings.rendering.clone(),
        ..RunSettings::default()
    }
}

/// Finds the data of a benchmark in the folder of a suite.
fn find_data(task: Task, data: &Path) -> Option<PathBuf> {
    let names = match task {
        Task::Codesearchnet => vec!["codesearchnet", "code_search_net"],
        Task::Humaneval => vec!["humaneval", "human_eval"],
        Task::MtBench => vec!["mt-bench", "mt_bench"],
        Task::Synthetic => vec![],
        task => vec![task.name()],
    };
    let find = |name: &str| {
        let files = ["jsonl", "parquet", "txt"].map(|extension| data.join(format!("{name}.{extension}")));
        [data.join(name)].into_iter().chain(files).find(|path| path.exists())
    };
    names.into_iter().find_map(find)
}

impl Suite {
    /// Whether a benchmark failed.
    pub fn has_failed(&self) -> bool {
        self.benchmarks.iter().any(|entry| matches!(entry.outcome, BenchmarkOutcome::Failed { .. }))
    }

    /// A block for every benchmark: its figures and notes, or the reason why it has none.
    pub fn text(&self) -> String {
        self.benchmarks.iter().map(Entry::text).collect()
    }
}

impl Entry {
    /// Why the benchmark has no results; `None` if it has.
    fn remark(&self) -> Option<String> {
        let name = self.name;
        match &self.outcome {
            BenchmarkOutcome::Done { .. } => None,
            BenchmarkOutcome::Skipped { reason } => Some(format!("{name}: skipped: {reason}")),
            BenchmarkOutcome::Failed { reason } => Some(format!("{name}: failed: {reason}")),
        }
    }

    fn text(&self) -> String {
        let name = self.name;
        match &self.outcome {
            BenchmarkOutcome::Done { results } => {
                let heading = format!("{name}: {}\n", count(results.examples, "example"));
                format!("{heading}{}{}\n", terminal::strategies(results), terminal::details(results))
            }
            _ => self.remark().map_or_else(String::new, |remark| wrap(&remark)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_benchmark_gets_the_settings_of_the_suite_that_concern_it() {
        let suite = SuiteSettings {
            keep_distinct: true,
            system: Some("Be brief.".to_owned()),
            max_thinking_tokens: Some(64),
            ..SuiteSettings::default()
        };
        for task in Task::ALL {
            let run = run_settings(task, &suite, None);
            assert_eq!((run.system, run.max_thinking_tokens), (suite.system.clone(), Some(64)));
            assert_eq!(run.keep_distinct, task == Task::Spider);
        }
    }
}
