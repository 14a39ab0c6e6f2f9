//! The head of a report: which models it is about, when and where they were measured, and how several
//! runs differ.

use cllm_core::progress::count;
use serde::Serialize;
use serde_json::Value;

use super::model_card::{Kind, kind, model_name};
use super::run::Run;
use crate::records::ModelEntry;
use crate::results::Results;
use crate::role::Role;

#[derive(Debug, Serialize)]
pub(super) struct Heading {
    /// The names of the models.
    title: String,
    /// Date, commit, machine and versions, as far as all runs share them.
    facts: Vec<String>,
    /// What differs between several runs: a name, and its value for each run.
    differences: Vec<(String, Vec<String>)>,
    /// The titles of the runs, as the heads of the differences.
    runs: Vec<String>,
}

impl Heading {
    pub(super) fn new(runs: &[Run]) -> Self {
        let facts = runs.iter().map(|run| facts(&run.results)).collect::<Vec<_>>();
        let shared = facts.first().cloned().unwrap_or_default();
        let is_shared = |fact: &(&'static str, String)| facts.iter().all(|other| other.contains(fact));
        Heading {
            title: title(runs),
            facts: shared.into_iter().filter(is_shared).map(|(_, text)| text).collect(),
            differences: differences(runs),
            runs: runs.iter().map(|run| run.title.clone()).collect(),
        }
    }
}

fn title(runs: &[Run]) -> String {
    let names = |role: Role| {
        let mut names: Vec<String> = Vec::new();
        for model in runs.iter().filter_map(|run| run.results.model(role)) {
            let name = model_name(&model.model);
            if !names.contains(&name) {
                names.push(name);
            }
        }
        names
    };
    match (&names(Role::Student)[..], &names(Role::Teacher)[..]) {
        ([student], [teacher]) if student == teacher => format!("{student}: student and teacher"),
        ([student], [teacher]) => match kind(runs) {
            Kind::Student => format!("{student}, a student of {teacher}"),
            Kind::DraftModel => format!("{student}, a draft model for {teacher}"),
            Kind::DraftAdapters => format!("{student}, draft adapters for {teacher}"),
        },
        ([name], []) | ([], [name]) => name.clone(),
        _ => count(runs.len(), "evaluation run"),
    }
}

fn facts(results: &Results) -> Vec<(&'static str, String)> {
    let date = results.started_on.map(|date| ("started on", date.to_string()));
    let libtorch = results.toolkit.libtorch.as_deref().unwrap_or("of unknown version");
    let commit = results.commit.as_ref().map_or_else(String::new, |commit| format!(" (commit {commit})"));
    let toolkit = format!("cllm {}{commit}, libtorch {libtorch}", results.toolkit.version);
    date.into_iter().chain([("hardware", results.hardware.summary()), ("toolkit", toolkit)]).collect()
}

/// Settings, models and facts that are not the same in all runs.
fn differences(runs: &[Run]) -> Vec<(String, Vec<String>)> {
    let columns: Vec<Vec<(String, String)>> = runs.iter().map(|run| described(&run.results)).collect();
    let mut keys: Vec<&String> = Vec::new();
    for (key, _) in columns.iter().flatten() {
        if !keys.contains(&key) {
            keys.push(key);
        }
    }
    let value = |column: &[(String, String)], key: &str| {
        column.iter().find(|(other, _)| other == key).map_or_else(|| "-".to_owned(), |(_, value)| value.clone())
    };
    let rows = keys.into_iter().map(|key| (key.clone(), columns.iter().map(|column| value(column, key)).collect()));
    rows.filter(|(_, values): &(String, Vec<String>)| values.windows(2).any(|pair| pair[0] != pair[1])).collect()
}

fn described(results: &Results) -> Vec<(String, String)> {
    let models = results.models.iter().map(|model| {
        let ModelEntry { role, path, .. } = &model.model;
        (role.to_string(), path.clone())
    });
    let facts = facts(results).into_iter().map(|(name, text)| (name.to_owned(), text));
    let settings = serde_json::to_value(&results.settings).unwrap_or_default();
    // Models and strategies are named otherwise, and the folder says nothing about the measurement.
    let is_shown = |key: &str| !["teacher", "student", "output", "strategies"].contains(&key);
    let strategies: Vec<String> = results.settings.strategies.iter().map(ToString::to_string).collect();
    let settings: Vec<(String, String)> = settings
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, _)| is_shown(key))
        .map(|(key, value)| (key.clone(), plain(value)))
        .collect();
    let strategies = ("strategies".to_owned(), strategies.join(", "));
    models.chain(facts).chain([strategies]).chain(settings).collect()
}

fn plain(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
