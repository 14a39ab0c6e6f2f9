//! The head of a model card: what the Hugging Face Hub reads (its model card metadata, `model-index`).

use std::path::Path;

use cllm_core::task::Task;
use cllm_core::{Result, settings};
use serde::Serialize;
use serde_json::Value;

use super::Run;
use super::card::best;
use crate::config::RunSettings;
use crate::records::ModelEntry;
use crate::role::Role;

#[derive(Serialize)]
struct FrontMatter {
    library_name: &'static str,
    pipeline_tag: &'static str,
    tags: [&'static str; 3],
    #[serde(skip_serializing_if = "Option::is_none")]
    base_model: Option<String>,
    #[serde(rename = "model-index")]
    model_index: Vec<ModelIndex>,
}

#[derive(Serialize)]
struct ModelIndex {
    name: String,
    results: Vec<Entry>,
}

#[derive(Serialize)]
struct Entry {
    task: Kind,
    dataset: Dataset,
    metrics: Vec<Metric>,
}

#[derive(Serialize)]
struct Kind {
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

/// The YAML between the card's two lines of dashes: of each run, accuracy, tokens per forward and speed-up of the fastest strategy
/// of the student, or of the only model.
///
/// # Errors
/// When it cannot be written as YAML.
pub(super) fn front_matter(runs: &[Run]) -> Result<String> {
    let model = |role: Role| runs.iter().flat_map(|run| &run.results.models).find(|found| found.model.role == role);
    let teacher = model(Role::Teacher).map(|found| &found.model);
    let subject = model(Role::Student).map(|found| &found.model).or(teacher);
    settings::to_yaml(&FrontMatter {
        library_name: "transformers",
        pipeline_tag: "text-generation",
        tags: ["consistency-llm", "jacobi-decoding", "cllm"],
        base_model: teacher.filter(|_| model(Role::Student).is_some()).and_then(hub_id),
        model_index: vec![ModelIndex {
            name: subject.map_or_else(|| "model".to_owned(), name),
            results: runs.iter().filter_map(entry).collect(),
        }],
    })
}

/// `owner/name` of a model in the Hugging Face cache, whose folder is `models--owner--name/snapshots/…`; none of another folder.
fn hub_id(model: &ModelEntry) -> Option<String> {
    let mut parts = Path::new(&model.path).iter().filter_map(|part| part.to_str());
    let (owner, name) = parts.find_map(|part| part.strip_prefix("models--")?.split_once("--"))?;
    Some(format!("{owner}/{name}"))
}

/// Its name on the Hub, or the last part of its folder that says something.
fn name(model: &ModelEntry) -> String {
    let folders = || Path::new(&model.path).iter().rev().filter_map(|part| part.to_str());
    let of_hub = hub_id(model).and_then(|id| Some(id.split_once('/')?.1.to_owned()));
    of_hub.or_else(|| folders().find(|part| tells(part)).map(str::to_owned)).unwrap_or_else(|| "model".to_owned())
}

/// Whether the name of a folder says which model it holds.
fn tells(folder: &str) -> bool {
    let numbered = |kind: &str| {
        let number = folder.strip_prefix(kind).map(|rest| rest.trim_start_matches(['-', '_']));
        number.is_some_and(|number| number.chars().all(|digit| digit.is_ascii_digit()))
    };
    let places =
        ["/", ".", "..", "final", "best", "latest", "last", "student", "teacher", "model", "models", "rounds", "runs"];
    !places.contains(&folder) && !["round", "step", "epoch", "checkpoint"].into_iter().any(numbered)
}

/// The Hub's id of a benchmark's data set.
fn data_set(benchmark: Task) -> Option<&'static str> {
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

/// The strategies whose figures head the card, as people read them.
pub(super) fn decoding(runs: &[Run]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for (_, found) in runs.iter().filter_map(|run| best(&run.results)) {
        let name = match found.name.as_str() {
            "ar" => "autoregressive decoding",
            "jacobi" => "Jacobi decoding",
            "rolling" => "Jacobi decoding with a rolling window (`rolling`)",
            "multiblock" => "Jacobi decoding of several blocks (`multiblock`)",
            "lookahead" => "lookahead decoding",
            other => other,
        };
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names.join(" and ")
}

/// The command that measures a run again, with every setting that is not as it is by default.
pub(super) fn command(settings: &RunSettings) -> String {
    let (given, usual) = (serde_json::to_value(settings), serde_json::to_value(RunSettings::default()));
    let (Ok(Value::Object(given)), Ok(usual)) = (given, usual) else { return String::new() };
    let changed = given.iter().filter(|(key, value)| usual[key.as_str()] != **value);
    let word = |(key, value): (&String, &Value)| {
        let word = format!("{key}={}", value.as_str().map_or_else(|| value.to_string(), str::to_owned));
        let plain = |c: char| c.is_ascii_alphanumeric() || "=_-./:".contains(c);
        if word.chars().all(plain) { word } else { format!("'{}'", word.replace('\'', r"'\''")) }
    };
    std::iter::once("cllm-eval run".to_owned()).chain(changed.map(word)).collect::<Vec<_>>().join(" \\\n  ")
}

fn entry(run: &Run) -> Option<Entry> {
    let results = &run.results;
    let (_, found) = best(results)?;
    let metric = |what: &str, r#type: &'static str, value: Option<f64>| {
        Some(Metric { name: format!("{what} ({})", found.label), r#type, value: value? })
    };
    let percent = found.accuracy.map(|rate| 100.0 * rate);
    let metrics = [
        metric("accuracy, %", "accuracy", percent),
        metric("tokens per forward of answers that ended", "tokens_per_forward", found.tokens_per_forward_finished),
        metric("speed-up over the teacher's autoregressive decoding", "speedup", found.speedup_vs_teacher_ar),
    ];
    let benchmark = results.benchmark.name().to_owned();
    Some(Entry {
        task: Kind { r#type: "text-generation" },
        dataset: Dataset {
            r#type: data_set(results.benchmark).map_or_else(|| benchmark.clone(), str::to_owned),
            name: benchmark,
            split: results.split.clone(),
        },
        metrics: metrics.into_iter().flatten().collect(),
    })
}
