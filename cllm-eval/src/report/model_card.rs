//! The head of a model card: the metadata that the Hugging Face Hub reads (`model-index`), and how
//! to repeat the runs.

use std::path::Path;

use cllm_core::task::Task;
use cllm_core::{Result, settings};
use serde::Serialize;
use serde_json::Value;

use super::run::Run;
use crate::config::RunSettings;
use crate::records::ModelEntry;
use crate::role::Role;

/// Folder names that say where a model is stored, not which model it is.
const GENERIC_FOLDERS: [&str; 13] =
    ["/", ".", "..", "final", "best", "latest", "last", "student", "teacher", "model", "models", "rounds", "runs"];
/// Names that are just as generic when a number follows them.
const NUMBERED_FOLDERS: [&str; 4] = ["round", "step", "epoch", "checkpoint"];

#[derive(Serialize)]
struct FrontMatter {
    library_name: &'static str,
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

/// The YAML front matter of the card: accuracy, tokens per forward and speed-up of each run's
/// fastest strategy.
pub(super) fn front_matter(runs: &[Run]) -> Result<String> {
    let model = |role: Role| runs.iter().flat_map(|run| &run.results.models).find(|model| model.model.role == role);
    let (teacher, student) = (model(Role::Teacher), model(Role::Student));
    let described = student.or(teacher);
    settings::to_yaml(&FrontMatter {
        library_name: "transformers",
        pipeline_tag: "text-generation",
        tags: ["consistency-llm", "jacobi-decoding", "cllm"],
        base_model: teacher.filter(|_| student.is_some()).and_then(|teacher| hub_id(&teacher.model)),
        license: teacher.filter(|_| student.is_some()).and_then(|teacher| license(&teacher.model)),
        model_index: vec![ModelIndex {
            name: described.map_or_else(|| "model".to_owned(), |model| model_name(&model.model)),
            results: runs.iter().filter_map(indexed_result).collect(),
        }],
    })
}

/// `owner/name` of a model in the Hugging Face cache, whose folder is
/// `models--owner--name/snapshots/…`; `None` for any other folder.
fn hub_id(model: &ModelEntry) -> Option<String> {
    let mut folders = Path::new(&model.path).iter().filter_map(|folder| folder.to_str());
    let (owner, name) = folders.find_map(|folder| folder.strip_prefix("models--")?.split_once("--"))?;
    Some(format!("{owner}/{name}"))
}

/// The licence that the card in a model's folder names.
fn license(model: &ModelEntry) -> Option<String> {
    let card = std::fs::read_to_string(Path::new(&model.path).join("README.md")).ok()?;
    let front_matter = card.strip_prefix("---\n")?.split_once("\n---")?.0;
    front_matter.lines().find_map(|line| line.strip_prefix("license: ")).map(|name| name.trim().to_owned())
}

/// The model's name on the Hub, or the last folder of its path that says which model it is.
pub(super) fn model_name(model: &ModelEntry) -> String {
    let mut folders = Path::new(&model.path).iter().rev().filter_map(|folder| folder.to_str());
    let on_hub = hub_id(model).and_then(|id| Some(id.split_once('/')?.1.to_owned()));
    on_hub
        .or_else(|| folders.find(|folder| is_descriptive(folder)).map(str::to_owned))
        .unwrap_or_else(|| "model".to_owned())
}

fn is_descriptive(folder: &str) -> bool {
    let is_numbered = |kind: &&str| {
        let number = folder.strip_prefix(kind).map(|rest| rest.trim_start_matches(['-', '_']));
        number.is_some_and(|number| number.chars().all(|digit| digit.is_ascii_digit()))
    };
    !GENERIC_FOLDERS.contains(&folder) && !NUMBERED_FOLDERS.iter().any(is_numbered)
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
            other => other,
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(" and ")
}

/// Whether the student is adapters for draft tokens, which only the strategy `gated` needs.
pub(super) fn adapts_drafts(runs: &[Run]) -> bool {
    let strategies = runs.iter().flat_map(|run| &run.results.models).flat_map(|model| &model.strategies);
    strategies.into_iter().any(|strategy| strategy.strategy.needs_draft_adapters())
}

/// The command that repeats a run, with every setting that differs from its default.
pub(super) fn command(settings: &RunSettings) -> String {
    let (settings, defaults) = (serde_json::to_value(settings), serde_json::to_value(RunSettings::default()));
    let (Ok(Value::Object(settings)), Ok(defaults)) = (settings, defaults) else { return String::new() };
    let changed = settings.iter().filter(|(key, value)| defaults[key.as_str()] != **value);
    let shell_word = |(key, value): (&String, &Value)| {
        let word = format!("{key}={}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "=_-./:".contains(c);
        if word.chars().all(is_plain) { word } else { format!("'{}'", word.replace('\'', r"'\''")) }
    };
    std::iter::once("cllm-eval run".to_owned()).chain(changed.map(shell_word)).collect::<Vec<_>>().join(" \\\n  ")
}

fn indexed_result(run: &Run) -> Option<IndexedResult> {
    let results = &run.results;
    let (_, fastest) = results.headline()?;
    let metric = |what: &str, r#type: &'static str, value: Option<f64>| {
        Some(Metric { name: format!("{what} ({})", fastest.label), r#type, value: value? })
    };
    let percent = fastest.accuracy.map(|accuracy| 100.0 * accuracy);
    let metrics = [
        metric("accuracy, %", "accuracy", percent),
        metric("tokens per forward, finished answers", "tokens_per_forward", fastest.tokens_per_forward_finished),
        metric("speed-up over the teacher's autoregressive decoding", "speedup", fastest.speedup_vs_teacher_ar),
    ];
    let benchmark = results.benchmark.name().to_owned();
    Some(IndexedResult {
        task: TaskType { r#type: "text-generation" },
        dataset: Dataset {
            r#type: hub_dataset(results.benchmark).map_or_else(|| benchmark.clone(), str::to_owned),
            name: benchmark,
            split: results.split.clone(),
        },
        metrics: metrics.into_iter().flatten().collect(),
    })
}
