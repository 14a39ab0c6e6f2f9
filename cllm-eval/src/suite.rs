//! `suite`: every benchmark whose data is there, one run each, and one report over all.

use std::path::{Path, PathBuf};

use cllm_core::decode::Strategy;
use cllm_core::program::catch_panics;
use cllm_core::task::Task;
use cllm_core::{Error, Result, progress, settings};
use comfy_table::{Table, presets};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{RunSettings, valid_strategies};
use crate::records::SCHEMA_VERSION;
use crate::results::Results;
use crate::table::{HEADS, cells, notes, perplexity};
use crate::{report, run};

/// Settings of a suite; what is not here has the default of `run`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct SuiteSettings {
    /// Folder or id of the model before consistency training.
    #[garde(skip)]
    pub teacher: Option<String>,
    /// Folder or id of the model after it.
    #[garde(skip)]
    pub student: Option<String>,
    /// Folder with a folder (or file) for each benchmark, by its name in `cllm-eval ls` or as code_search_net, human_eval, mt_bench; a benchmark
    /// that is not there is skipped.
    #[garde(custom(settings::required_path))]
    pub data: PathBuf,
    /// Takes only the first examples of each benchmark.
    #[garde(range(min = 1))]
    pub limit: Option<usize>,
    /// How many examples of each, spread evenly over all, are timed at batch 1; 0 measures accuracy alone.
    #[garde(skip)]
    pub num_speed_examples: usize,
    /// How to decode, as in `run`.
    #[garde(length(min = 1), custom(valid_strategies))]
    pub strategies: Vec<Strategy>,
    /// Runs the Python code in answers to humaneval and mbpp, as in `run`.
    #[garde(skip)]
    pub execute_code: bool,
    /// Most tokens of an answer.
    #[garde(range(min = 1))]
    pub max_new_tokens: usize,
    /// Answers generated together when accuracy is measured.
    #[garde(range(min = 1))]
    pub batch_size: usize,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
    /// Folder for a folder of each benchmark, and for the report.
    #[garde(skip)]
    pub output: PathBuf,
}

impl Default for SuiteSettings {
    fn default() -> Self {
        let RunSettings {
            teacher,
            student,
            limit,
            num_speed_examples,
            strategies,
            execute_code,
            max_new_tokens,
            batch_size,
            device,
            ..
        } = RunSettings::default();
        let (data, output) = (PathBuf::new(), PathBuf::from("runs/suite"));
        Self {
            teacher,
            student,
            data,
            limit,
            num_speed_examples,
            strategies,
            execute_code,
            max_new_tokens,
            batch_size,
            device,
            output,
        }
    }
}

/// What a suite found.
#[derive(Debug, Serialize)]
pub struct Suite {
    /// Version of this form.
    pub schema_version: u32,
    /// Every benchmark, in the order of `ls`.
    pub benchmarks: Vec<Entry>,
    /// The report's files.
    pub report: Vec<PathBuf>,
}

/// How a benchmark went.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// Its name.
    pub name: &'static str,
    /// What came of it.
    #[serde(flatten)]
    pub ended: Ended,
}

/// What came of a benchmark.
#[derive(Debug, Serialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum Ended {
    /// It was measured.
    Done {
        /// Its results.json.
        results: Box<Results>,
    },
    /// Its data is not there.
    Skipped {
        /// What was looked for.
        reason: String,
    },
    /// It ended with an error.
    Failed {
        /// The error.
        reason: String,
    },
}

/// Runs every benchmark whose data is there, or goes on with an interrupted suite, and draws one report.
///
/// # Errors
/// A data folder that is not there, interruption, a report that cannot be written. What a benchmark fails with stands in its entry.
pub fn suite(settings: &SuiteSettings) -> Result<Suite> {
    if !settings.data.is_dir() {
        return Err(Error::file(
            &settings.data,
            "is no folder: set `data` to the one that holds a folder for each benchmark",
        ));
    }
    let mut benchmarks = Vec::new();
    let mut folders = Vec::new();
    for task in Task::ALL {
        let ended = one(task, settings)?;
        if matches!(ended, Ended::Done { .. }) {
            folders.push(settings.output.join(task.name()));
        }
        benchmarks.push(Entry { name: task.name(), ended });
    }
    let report = if folders.is_empty() { Vec::new() } else { report::report(&folders, Some(&settings.output))? };
    Ok(Suite { schema_version: SCHEMA_VERSION, benchmarks, report })
}

fn one(task: Task, settings: &SuiteSettings) -> Result<Ended> {
    let data = find(task, &settings.data);
    if data.is_none() && task != Task::Synthetic {
        let (folder, name) = (settings.data.display(), task.name());
        return Ok(Ended::Skipped { reason: format!("no `{name}` in {folder}: it needs {}", task.expected_data()) });
    }
    progress::log(format!("{}:", task.name()));
    let run = RunSettings {
        teacher: settings.teacher.clone(),
        student: settings.student.clone(),
        benchmark: Some(task),
        data,
        // Spider keeps the answers of its test split to itself.
        split: (task == Task::Spider).then(|| "dev".to_owned()),
        limit: settings.limit,
        num_speed_examples: settings.num_speed_examples,
        strategies: settings.strategies.clone(),
        execute_code: settings.execute_code,
        max_new_tokens: settings.max_new_tokens,
        batch_size: settings.batch_size,
        device: settings.device.clone(),
        output: settings.output.join(task.name()),
        ..RunSettings::default()
    };
    match catch_panics(|| run::run(&run)) {
        Ok(results) => Ok(Ended::Done { results: Box::new(results) }),
        Err(error @ Error::Interrupted(_)) => Err(error),
        Err(error) => {
            progress::log(format!("{} failed: {error}", task.name()));
            Ok(Ended::Failed { reason: error.to_string() })
        }
    }
}

/// The data of a benchmark in a suite's folder.
fn find(task: Task, data: &Path) -> Option<PathBuf> {
    let names = match task {
        Task::Codesearchnet => vec!["codesearchnet", "code_search_net"],
        Task::Humaneval => vec!["humaneval", "human_eval"],
        Task::MtBench => vec!["mt-bench", "mt_bench"],
        Task::Synthetic => vec![],
        task => vec![task.name()],
    };
    let place = |name: &str| {
        let files = ["jsonl", "parquet", "txt"].map(|ending| data.join(format!("{name}.{ending}")));
        [data.join(name)].into_iter().chain(files).find(|path| path.exists())
    };
    let found = names.into_iter().find_map(place)?;
    // Of these a file holds all, whatever its name.
    let alone = matches!(task, Task::Jsonl | Task::Mbpp | Task::Humaneval);
    Some(if alone { only_file(&found).unwrap_or(found) } else { found })
}

/// The one file of rows in a folder, where there is one alone.
fn only_file(folder: &Path) -> Option<PathBuf> {
    let rows = |path: &PathBuf| {
        path.extension().is_some_and(|ending| ["jsonl", "json", "parquet", "gz"].iter().any(|known| ending == *known))
    };
    let mut files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path()).filter(rows);
    let first = files.next()?;
    files.next().is_none().then_some(first)
}

impl Suite {
    /// Whether a benchmark failed.
    pub fn failed(&self) -> bool {
        self.benchmarks.iter().any(|entry| matches!(entry.ended, Ended::Failed { .. }))
    }

    /// A row for every benchmark: its figures, or why there are none.
    pub fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL);
        table.set_header([&["benchmark"], &HEADS[..]].concat());
        for Entry { name, ended } in &self.benchmarks {
            let mut columns = vec![Vec::new(); HEADS.len()];
            if let Ended::Done { results } = ended {
                for model in &results.models {
                    if let Some(found) = &model.perplexity {
                        let cells = [model.model.role.name(), "", &perplexity(found)];
                        columns.iter_mut().zip(cells).for_each(|(column, cell)| column.push(cell.to_owned()));
                    }
                    for found in &model.strategies {
                        let names = vec![model.model.role.name().to_owned(), found.label.clone()];
                        let row = names.into_iter().chain(cells(found));
                        columns.iter_mut().zip(row).for_each(|(column, cell)| column.push(cell));
                    }
                }
            }
            let row = columns.into_iter().map(|column| column.join("\n"));
            let state = match ended {
                Ended::Done { results } => format!("{} examples", results.examples),
                Ended::Skipped { .. } => "skipped".to_owned(),
                Ended::Failed { .. } => "failed".to_owned(),
            };
            table.add_row(std::iter::once(format!("{name}\n{state}")).chain(row));
        }
        let mut text = format!("{table}\n");
        for Entry { name, ended } in &self.benchmarks {
            match ended {
                Ended::Done { results } => {
                    text.extend(notes(results).into_iter().map(|note| format!("{name}: {note}\n")));
                }
                Ended::Skipped { reason } => text += &format!("{name}: skipped: {reason}\n"),
                Ended::Failed { reason } => text += &format!("{name}: failed: {reason}\n"),
            }
        }
        text
    }
}
