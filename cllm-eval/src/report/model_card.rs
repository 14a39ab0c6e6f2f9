//! The head of a model card: what the Hugging Face Hub reads (its model card metadata, `model-index`).

use std::path::Path;

use cllm_core::{Result, settings};
use serde::Serialize;

use super::Run;
use super::card::best;
use crate::records::{ModelEntry, Role};

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
        base_model: teacher.filter(|_| model(Role::Student).is_some()).map(|found| found.path.clone()),
        model_index: vec![ModelIndex {
            name: subject.map_or_else(|| "model".to_owned(), name),
            results: runs.iter().filter_map(entry).collect(),
        }],
    })
}

/// The last part of its folder that says something.
fn name(model: &ModelEntry) -> String {
    let parts = Path::new(&model.path).iter().rev().map(|part| part.to_string_lossy().into_owned());
    let telling = parts.into_iter().find(|part| !["final", "best", "latest", "/"].contains(&part.as_str()));
    telling.unwrap_or_else(|| model.path.clone())
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
        dataset: Dataset { name: benchmark.clone(), r#type: benchmark, split: results.split.clone() },
        metrics: metrics.into_iter().flatten().collect(),
    })
}
