//! What the templates draw of one run.

use cllm_core::{Result, settings};
use serde::Serialize;
use serde_json::Value;

use super::Run;
use super::card::Card;
use super::charts::{Chart, charts};
use super::example::Example;
use super::model_card::command;
use crate::results::{ModelResults, StrategyResults};
use crate::role::Role;
use crate::table::{describe, notes, rows};
use crate::tradeoff::Tradeoff;

#[derive(Debug, Serialize)]
pub(super) struct Section {
    title: String,
    card: Option<Card>,
    summary: String,
    rows: Vec<Vec<String>>,
    /// Perplexity, accuracy by difficulty, the student against the teacher, a line each.
    notes: Vec<String>,
    /// Areas under accuracy and parallelism, a line each.
    aup: Vec<String>,
    charts: Vec<Chart>,
    columns: Vec<String>,
    figures: Vec<(String, Vec<String>)>,
    models: Vec<String>,
    hardware: String,
    toolkit: String,
    sandbox: Option<String>,
    settings: String,
    /// The command that measures it again.
    command: String,
    example: Option<Example>,
}

impl Section {
    pub(super) fn of(run: &Run) -> Result<Self> {
        let results = &run.results;
        let models = || results.models.iter();
        let found: Vec<(Role, &StrategyResults)> = models()
            .flat_map(|model| model.strategies.iter().map(move |strategy| (model.model.role, strategy)))
            .collect();
        let tradeoff = Tradeoff::from_results(std::slice::from_ref(results));
        let areas = tradeoff.iter().flat_map(|tradeoff| &tradeoff.aup);
        Ok(Section {
            title: run.title.clone(),
            card: Card::of(run),
            summary: describe(results),
            rows: models().flat_map(rows).collect(),
            notes: notes(results),
            aup: areas
                .map(|area| {
                    format!(
                        "AUP of {}: {:.1}, over {} points (the area under accuracy and parallelism)",
                        area.checkpoint, area.aup, area.points
                    )
                })
                .collect(),
            charts: charts(run, tradeoff.as_ref()),
            columns: found.iter().map(|(role, strategy)| format!("{} {}", role.name(), strategy.label)).collect(),
            figures: figures(&found),
            models: models().map(named).collect(),
            hardware: results.hardware.summary(),
            toolkit: format!(
                "cllm {}, libtorch {}",
                results.toolkit.version,
                results.toolkit.libtorch.as_deref().unwrap_or("of unknown version")
            ),
            sandbox: results
                .sandbox
                .as_ref()
                .map(|layers| format!("code of answers ran in a sandbox: {}", layers.join(", "))),
            settings: settings::to_yaml(&results.settings)?,
            command: command(&results.settings),
            example: run.records.as_ref().and_then(Example::of),
        })
    }
}

fn named(ModelResults { model, .. }: &ModelResults) -> String {
    let role = model.role.name();
    format!("{role}: {} ({} parameters, fingerprint {})", model.path, model.parameters, model.fingerprint)
}

/// Every figure, a row each, with a column for each model and strategy.
fn figures(found: &[(Role, &StrategyResults)]) -> Vec<(String, Vec<String>)> {
    let values: Vec<Value> =
        found.iter().map(|(_, strategy)| serde_json::to_value(strategy).unwrap_or_default()).collect();
    let Some(Value::Object(first)) = values.first() else { return Vec::new() };
    let elsewhere = |key: &str| {
        matches!(
            key,
            "name" | "label" | "strategy" | "max_tokens_per_forward" | "acceptance" | "by_difficulty" | "similarity"
        )
    };
    first
        .keys()
        .filter(|key| !elsewhere(key))
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
