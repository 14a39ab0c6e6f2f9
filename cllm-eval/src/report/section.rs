//! What the templates show of one run.

use cllm_core::progress::count;
use cllm_core::{Result, settings};
use serde::Serialize;
use serde_json::Value;

use super::charts::{Chart, charts};
use super::example::Example;
use super::headline::Headline;
use super::model_card::command;
use super::run::Run;
use crate::records::ModelEntry;
use crate::results::{ModelResults, Results};
use crate::table::{columns, concurrency_columns, describe, difficulties, notes};
use crate::tradeoff::{Aup, Tradeoff};
use crate::words::with_commas;

#[derive(Debug, Serialize)]
pub(super) struct Section {
    title: String,
    headline: Option<Headline>,
    /// One sentence that says what was measured.
    summary: String,
    /// The table of strategies; no rows where no answers were generated.
    heads: Vec<&'static str>,
    rows: Vec<Vec<String>>,
    /// The table of accuracy by difficulty; no rows where that is not known.
    difficulty_heads: Vec<String>,
    difficulty_rows: Vec<Vec<String>>,
    /// The table of continuous batching; empty where it was not measured.
    concurrency_heads: Vec<&'static str>,
    concurrency_rows: Vec<Vec<String>>,
    /// Sentences about perplexity, and student against teacher.
    notes: Vec<String>,
    /// Sentences about the area under accuracy and parallelism.
    aup: Vec<String>,
    charts: Vec<Chart>,
    /// Column heads of `metrics`.
    metric_columns: Vec<String>,
    /// Every number of results.json: its name, and its value for each model and strategy.
    metrics: Vec<(String, Vec<String>)>,
    models: Vec<String>,
    hardware: String,
    toolkit: String,
    sandbox: Option<String>,
    /// The settings of the run as YAML.
    settings: String,
    /// The command that repeats the run.
    command: String,
    example: Option<Example>,
}

impl Section {
    pub(super) fn from_run(run: &Run) -> Result<Self> {
        let results = &run.results;
        let tradeoff = Tradeoff::from_results(std::slice::from_ref(results));
        let sandbox = results.sandbox.as_ref();
        let ((heads, rows), (difficulty_heads, difficulty_rows)) = (columns(results), difficulties(results));
        let (concurrency_heads, concurrency_rows) = concurrency_columns(results);
        Ok(Section {
            title: run.title.clone(),
            headline: Headline::from_run(run),
            summary: describe(results),
            heads,
            rows,
            difficulty_heads,
            difficulty_rows,
            concurrency_heads,
            concurrency_rows,
            notes: notes(results),
            aup: tradeoff.iter().flat_map(|tradeoff| &tradeoff.aup).map(|area| aup_sentence(results, area)).collect(),
            charts: charts(run, tradeoff.as_ref()),
            metric_columns: results.strategies().map(|(role, of)| format!("{role} {}", of.label)).collect(),
            metrics: metrics(results),
            models: results.models.iter().map(model_line).collect(),
            hardware: results.hardware.summary(),
            toolkit: toolkit_line(results),
            sandbox: sandbox.map(|layers| format!("the code in answers ran in a sandbox: {}", layers.join(", "))),
            settings: settings::to_yaml(&results.settings)?,
            command: command(&results.settings),
            example: run.records.as_ref().and_then(|records| Example::choose(records, results)),
        })
    }
}

fn aup_sentence(results: &Results, area: &Aup) -> String {
    let Aup { checkpoint, fingerprint, aup, points } = area;
    let model = results.models.iter().find(|model| model.model.fingerprint == *fingerprint);
    let name = model.map_or_else(|| checkpoint.clone(), |model| model.model.role.to_string());
    let points = count(*points, "point");
    format!("AUP, {name}: {aup:.1} (area under the curve of accuracy against tokens per forward, {points})")
}

fn model_line(ModelResults { model, .. }: &ModelResults) -> String {
    let ModelEntry { role, path, fingerprint, parameters, .. } = model;
    let parameters = with_commas(&parameters.to_string());
    format!("{role}: {path} ({parameters} parameters, fingerprint {fingerprint})")
}

fn toolkit_line(results: &Results) -> String {
    let libtorch = results.toolkit.libtorch.as_deref().unwrap_or("of unknown version");
    format!("cllm {}, libtorch {libtorch}", results.toolkit.version)
}

fn metrics(results: &Results) -> Vec<(String, Vec<String>)> {
    let values: Vec<Value> =
        results.strategies().map(|(_, strategy)| serde_json::to_value(strategy).unwrap_or_default()).collect();
    let Some(Value::Object(first)) = values.first() else { return Vec::new() };
    // Names, and values that charts, notes and other tables already show.
    let omitted = [
        "name",
        "label",
        "strategy",
        "max_tokens_per_forward",
        "concurrency",
        "acceptance",
        "by_difficulty",
        "similarity",
        "metric",
        "alternative",
    ];
    first
        .keys()
        .filter(|key| !omitted.contains(&key.as_str()))
        .filter(|key| values.iter().any(|value| !value[key.as_str()].is_null()))
        .map(|key| (key.clone(), values.iter().map(|value| plain(&value[key])).collect()))
        .collect()
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::Number(number) if number.is_f64() => format!("{:.4}", number.as_f64().unwrap_or_default()),
        Value::Array(items) => items.iter().map(plain).collect::<Vec<_>>().join(" to "),
        other => other.to_string(),
    }
}
