//! The head of a model card: the metadata that the Hugging Face Hub reads (`model-index`), and how
//! to repeat the runs.

use std::path::Path;

use cllm_core::checkpoint::hub;
use cllm_core::decode::Strategy;
use cllm_core::task::Task;
use cllm_core::{Result, settings};
use serde::Serialize;
use serde_json::Value;

use super::run::Run;
use crate::config::RunSettings;
use crate::records::ModelEntry;
use crate::results::{StrategyResults, only_drafts};
use crate::role::Role;

#[derive(Serialize)]
struct FrontMatter {
    #[serde(skip_serializing_if = "Option::is_none")]
    library_name: Option<&'static str>,
    pipeline_tag: &'static str,
    tags: [&'static str; 3],
    #[serde(skip_serializing_if = "Option::is_none")]
    base_model: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    license: Option<String>,
    #[serde(rename = "model-index")]
    model_index: Vec<ModelIndex>,
}

#[derive(Serialize)]
struct ModelIndex {
    name: String,
    results: Vec<IndexedResult>,
}

#[derive(Serialize)]
struct IndexedResult {
    task: TaskType,
    dataset: Dataset,
    metrics: Vec<Metric>,
}

#[derive(Serialize)]
struct TaskType {
    r#type: &'static str,
}

#[derive(Serialize)]
struct Dataset {
    name: String,
    r#type: String,
    split: String,
}

#[derive(Serialize)]
struct Metric {
    name: String,
    r#type: &'static str,
    value: f64,
}

/// Whether all runs evaluated the same student, or the same model if there is no student.
pub(super) fn describes_one_model(runs: &[Run]) -> bool {
    let described = |run: &Run| {
        let model = run.results.model(Role::Student).or(run.results.models.first());
        model.map(|model| model.model.fingerprint.clone())
    };
    runs.windows(2).all(|pair| described(&pair[0]) == described(&pair[1]))
}

/// The YAML front matter of the card: accuracy, tokens per forward and speed-up of each run's
/// fastest strategy.
pub(super) fn front_matter(runs: &[Run]) -> Result<String> {
    let model = |role: Role| runs.iter().flat_map(|run| &run.results.models).find(|model| model.model.role == role);
    let (teacher, student) = (model(Role::Teacher), model(Role::Student));
    let described = student.or(teacher);
    settings::to_yaml(&FrontMatter {
        // Adapters for draft tokens are nothing that another library may load.
        library_name: (kind(runs) != Kind::DraftAdapters).then_some("transformers"),
        pipeline_tag: "text-generation",
        tags: ["consistency-llm", "jacobi-decoding", hub::CARD_TAG],
        base_model: teacher
            .filter(|_| student.is_some())
            .and_then(|teacher| hub::base_model(Path::new(&teacher.model.path))),
        license: teacher.filter(|_| student.is_some()).and_then(|teacher| hub::license(Path::new(&teacher.model.path))),
        model_index: vec![ModelIndex {
            name: described.map_or_else(|| "model".to_owned(), |model| model_name(&model.model)),
            results: runs.iter().filter_map(indexed_result).collect(),
        }],
    })
}

/// The model's name, without its owner on the Hub.
pub(super) fn model_name(model: &ModelEntry) -> String {
    let name = hub::name(Path::new(&model.path));
    name.rsplit('/').next().unwrap_or(&name).to_owned()
}

/// The Hub's id of a benchmark's data set.
fn hub_dataset(benchmark: Task) -> Option<&'static str> {
    match benchmark {
        Task::Gsm8k => Some("openai/gsm8k"),
        Task::Spider => Some("xlangai/spider"),
        Task::Humaneval => Some("openai/openai_humaneval"),
        Task::Mbpp => Some("google-research-datasets/mbpp"),
        Task::Codesearchnet => Some("code-search-net/code_search_net"),
        Task::MtBench => Some("HuggingFaceH4/mt_bench_prompts"),
        Task::Perplexity | Task::Jsonl | Task::Synthetic => None,
    }
}

/// Spells out the strategies that the card's headline numbers were measured with.
pub(super) fn headline_strategies(runs: &[Run]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for (_, fastest) in runs.iter().filter_map(|run| run.results.headline()) {
        let name = match fastest.name.as_str() {
            "ar" => "autoregressive decoding",
            "jacobi" => "Jacobi decoding",
            "rolling" => "Jacobi decoding with a rolling window (`rolling`)",
            "multiblock" => "Jacobi decoding of several blocks (`multiblock`)",
            "lookahead" => "lookahead decoding",
            "gated" => "gated decoding (`gated`)",
            "drafted" => "speculative decoding with a draft model (`drafted`)",
            other => other,
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(" and ")
}

/// What the described model is, which decides how to decode with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// It decodes several tokens per forward by itself.
    Student,
    /// It drafts for its teacher.
    DraftModel,
    /// Adapters for the draft tokens of their teacher.
    DraftAdapters,
}

pub(super) fn kind(runs: &[Run]) -> Kind {
    let strategies: Vec<_> = runs.iter().flat_map(|run| run.results.strategies()).collect();
    let needs_adapters =
        |(role, figures): &(Role, &StrategyResults)| *role == Role::Student && figures.strategy.needs_draft_adapters();
    if strategies.iter().any(needs_adapters) {
        Kind::DraftAdapters
    } else if only_drafts(&strategies) {
        Kind::DraftModel
    } else {
        Kind::Student
    }
}

/// The strategy of the first headline as settings files write it, if the model decodes with it by
/// itself.
pub(super) fn own_strategy(runs: &[Run]) -> Option<String> {
    let (_, fastest) = runs.iter().find_map(|run| run.results.headline())?;
    let is_own = fastest.strategy != Strategy::Ar && !fastest.strategy.needs_draft_model();
    is_own.then(|| {
        serde_json::to_value(fastest.strategy).map(|strategy| settings::written(&strategy)).unwrap_or_default()
    })
}

/// The command that repeats a run, with every setting that differs from its default.
pub(super) fn command(of_run: &RunSettings) -> String {
    let (values, defaults) = (serde_json::to_value(of_run), serde_json::to_value(RunSettings::default()));
    let (Ok(Value::Object(values)), Ok(defaults)) = (values, defaults) else { return String::new() };
    let changed = values.iter().filter(|(key, value)| defaults[key.as_str()] != **value);
    let shell_word = |(key, value): (&String, &Value)| {
        let word = format!("{key}={}", value.as_str().map_or_else(|| settings::written(value), str::to_owned));
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "=_-./:".contains(c);
        if word.chars().all(is_plain) { word } else { format!("'{}'", word.replace('\'', r"'\''")) }
    };
    std::iter::once("cllm-eval run".to_owned()).chain(changed.map(shell_word)).collect::<Vec<_>>().join(" \\\n  ")
}

fn rounded(value: f64) -> f64 {
    (100.0 * value).round() / 100.0
}

fn indexed_result(run: &Run) -> Option<IndexedResult> {
    let results = &run.results;
    let (_, fastest) = results.headline()?;
    let metric = |what: &str, r#type: &'static str, value: Option<f64>| {
        Some(Metric { name: format!("{what} ({})", fastest.label), r#type, value: rounded(value?) })
    };
    let percent = fastest.accuracy.map(|accuracy| 100.0 * accuracy);
    let metrics = [
        metric("accuracy, %", "accuracy", percent),
        metric("tokens per forward, finished answers", "tokens_per_forward", fastest.tokens_per_forward_finished),
        metric(
            "speed-up at batch 1 over the teacher's autoregressive decoding",
            "speedup",
            fastest.speedup_vs_teacher_ar,
        ),
    ];
    let benchmark = results.benchmark.name().to_owned();
    // A benchmark is known by its name; a file of the user is not known at all.
    let name = if results.benchmark == Task::Jsonl { run.title.clone() } else { benchmark.clone() };
    Some(IndexedResult {
        task: TaskType { r#type: "text-generation" },
        dataset: Dataset {
            r#type: hub_dataset(results.benchmark).map_or(benchmark, str::to_owned),
            name,
            split: results.split.clone(),
        },
        metrics: metrics.into_iter().flatten().collect(),
    })
}
