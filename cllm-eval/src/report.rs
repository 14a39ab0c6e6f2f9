//! `report`: draws `report.md` and one self-contained `report.html` from results and their samples.

use std::path::{Path, PathBuf};

use cllm_core::decode::Strategy;
use cllm_core::task::Verdict;
use cllm_core::{Error, Result, atomic_file, settings};
use minijinja::value::Serde;
use minijinja::{Environment, context};
use serde::Serialize;
use serde_json::Value;

use crate::charts::{Bar, bars};
use crate::measure::role_name;
use crate::records::{AnswerRecord, Records, Role, SAMPLES, expect_version};
use crate::results::{ModelResults, RESULTS, Results, StrategyResults, label};
use crate::table::{HEADS, cells, number, sentence};

/// Colours of neighbouring forwards in the page's style.
const FORWARD_COLOURS: usize = 5;
/// Bars of the histogram; longer runs of tokens count in its last.
const HISTOGRAM_BARS: usize = 12;

/// What the templates draw of one run.
#[derive(Debug, Serialize)]
struct Section {
    title: String,
    summary: String,
    heads: Vec<&'static str>,
    rows: Vec<Vec<String>>,
    paired: Vec<String>,
    charts: Vec<Chart>,
    columns: Vec<String>,
    figures: Vec<(String, Vec<String>)>,
    models: Vec<String>,
    hardware: String,
    toolkit: String,
    sandbox: Option<String>,
    settings: String,
    example: Option<Example>,
}

#[derive(Debug, Serialize)]
struct Chart {
    title: String,
    svg: String,
}

#[derive(Debug, Serialize)]
struct Example {
    id: String,
    prompt: String,
    reference: Option<String>,
    answers: Vec<ExampleAnswer>,
}

#[derive(Debug, Serialize)]
struct ExampleAnswer {
    name: String,
    verdict: Verdict,
    tokens: usize,
    forwards: usize,
    text: String,
    pieces: Vec<Piece>,
}

#[derive(Debug, Serialize)]
struct Piece {
    text: String,
    colour: usize,
    forward: usize,
    tokens: u32,
}

/// Draws the reports of some runs into `output`, or beside the first of them, and says what was written.
///
/// # Errors
/// When a file is missing or is no results file.
pub fn report(results: &[PathBuf], output: Option<&Path>) -> Result<Vec<PathBuf>> {
    let files: Vec<PathBuf> =
        results.iter().map(|path| if path.is_dir() { path.join(RESULTS) } else { path.clone() }).collect();
    let sections: Vec<Section> = files.iter().map(|path| section(path)).collect::<Result<_>>()?;
    let folder = match output {
        Some(folder) => folder.to_owned(),
        None => files.first().and_then(|file| file.parent()).unwrap_or(Path::new(".")).to_owned(),
    };
    let mut environment = Environment::new();
    environment.add_filter("one_line", |text: &str| text.replace(['\n', '\r'], " ").replace('|', "\\|"));
    environment.add_filter("block", |text: &str| format!("    {}", text.replace('\n', "\n    ")));
    let mut written = Vec::new();
    // The ending of a name decides whether minijinja escapes what it is given.
    for (name, template) in [
        ("report.md", include_str!("../templates/report.md")),
        ("report.html", include_str!("../templates/report.html")),
    ] {
        let text = environment
            .render_named_str(name, template, context! { sections => minijinja::Value::from(Serde(&sections)) })
            .map_err(|error| Error::file(folder.join(name), format!("cannot be drawn: {error:#}")))?;
        atomic_file::write(&folder.join(name), text.as_bytes())?;
        written.push(folder.join(name));
    }
    Ok(written)
}

fn section(path: &Path) -> Result<Section> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let bad = |error| Error::file(path, format!("is not a results.json of cllm-eval: {error}"));
    let document: Value = serde_json::from_str(&text).map_err(bad)?;
    expect_version(path, &document)?;
    let results: Results = serde_json::from_value(document).map_err(bad)?;
    let samples = path.with_file_name(SAMPLES);
    let records = if samples.exists() { Some(Records::read(&samples)?) } else { None };
    let found: Vec<(Role, &StrategyResults)> = results
        .models
        .iter()
        .flat_map(|model| model.strategies.iter().map(move |strategy| (model.model.role, strategy)))
        .collect();
    let named = |role: Role, strategy: &StrategyResults| format!("{} {}", role_name(role), strategy.label.clone());
    let rows = found.iter().map(|(role, strategy)| {
        let mut row = vec![role_name(*role).to_owned(), strategy.label.clone()];
        row.extend(cells(strategy));
        row
    });
    let speed = match results.speed_examples {
        0 => "speed was not measured".to_owned(),
        count => format!("speed at batch 1 on the first {count}, prefill apart"),
    };
    Ok(Section {
        title: format!("{} / {}", results.benchmark.name(), results.split),
        summary: format!(
            "{} examples, {}, answered in batches for accuracy; {speed}.",
            results.examples,
            results.choice()
        ),
        heads: HEADS.to_vec(),
        rows: rows.collect(),
        paired: results.paired.iter().map(sentence).collect(),
        charts: charts(&found, records.as_ref()),
        columns: found.iter().map(|(role, strategy)| named(*role, strategy)).collect(),
        figures: figures(&found),
        models: results
            .models
            .iter()
            .map(|ModelResults { model, .. }| {
                let name = role_name(model.role);
                format!("{name}: {} ({} parameters, fingerprint {})", model.path, model.parameters, model.fingerprint)
            })
            .collect(),
        hardware: results.hardware.line(),
        toolkit: format!(
            "cllm {}, libtorch {}",
            results.toolkit.version,
            results.toolkit.libtorch.as_deref().unwrap_or("of unknown version")
        ),
        sandbox: results
            .sandbox
            .as_ref()
            .map(|layers| format!("the code of answers ran held by {}", layers.join(", "))),
        settings: settings::to_yaml(&results.settings)?,
        example: records.as_ref().and_then(example),
    })
}

fn class(role: Role) -> &'static str {
    role_name(role)
}

fn charts(found: &[(Role, &StrategyResults)], records: Option<&Records>) -> Vec<Chart> {
    type Figure = fn(&StrategyResults) -> Option<f64>;
    let plain = |title: &str, figure: Figure, digits: usize, unit: &str| {
        let rows: Vec<Bar> = found
            .iter()
            .map(|&(role, strategy)| Bar {
                label: format!("{} {}", role_name(role), strategy.label.clone()),
                class: class(role),
                value: figure(strategy),
                interval: None,
                text: number(figure(strategy), digits, unit),
            })
            .collect();
        Chart { title: title.to_owned(), svg: bars(title, &rows) }
    };
    let mut charts = Vec::new();
    if found.iter().any(|(_, strategy)| strategy.tokens_per_second.is_some()) {
        charts.push(plain("Tokens per second at batch 1, without prefill", |s| s.tokens_per_second, 1, ""));
    }
    charts.push(plain("Tokens per forward", |s| s.tokens_per_forward, 2, ""));
    let title = "Accuracy with its 95 % interval, in %";
    let rows: Vec<Bar> = found
        .iter()
        .map(|&(role, strategy)| Bar {
            label: format!("{} {}", role_name(role), strategy.label.clone()),
            class: class(role),
            value: strategy.accuracy.map(|rate| 100.0 * rate),
            interval: strategy.ci95.map(|ends| ends.map(|end| 100.0 * end)),
            text: number(strategy.accuracy.map(|rate| 100.0 * rate), 1, " %"),
        })
        .collect();
    charts.push(Chart { title: title.to_owned(), svg: bars(title, &rows) });
    charts.extend(records.into_iter().flat_map(histograms));
    charts
}

/// How many tokens each forward made final, where it can be more than one.
fn histograms(records: &Records) -> Vec<Chart> {
    let header = &records.header;
    let several = |strategy: &&Strategy| **strategy != Strategy::Ar;
    let mut charts = Vec::new();
    for model in &header.models {
        for &strategy in header.settings.strategies.iter().filter(several) {
            let most = HISTOGRAM_BARS.min(strategy.window());
            let mut counts = vec![0u64; most];
            let mine = |answer: &&AnswerRecord| answer.role == model.role && answer.strategy == strategy;
            for &accepted in records.answers.iter().filter(mine).flat_map(|answer| &answer.accepted) {
                counts[(accepted as usize).clamp(1, most) - 1] += 1;
            }
            let total = counts.iter().sum::<u64>().max(1) as f64;
            let rows: Vec<Bar> = counts
                .iter()
                .enumerate()
                .map(|(index, &count)| {
                    let share = 100.0 * count as f64 / total;
                    let more = if index + 1 == most && most < strategy.window() { " or more" } else { "" };
                    Bar {
                        label: format!("{}{more}", index + 1),
                        class: class(model.role),
                        value: Some(share),
                        interval: None,
                        text: format!("{share:.1} %"),
                    }
                })
                .collect();
            let title = format!("Tokens made final by a forward: {} {}", role_name(model.role), label(strategy));
            charts.push(Chart { svg: bars(&title, &rows), title });
        }
    }
    charts
}

/// Every figure, a row each, with a column for each model and strategy.
fn figures(found: &[(Role, &StrategyResults)]) -> Vec<(String, Vec<String>)> {
    let values: Vec<Value> =
        found.iter().map(|(_, strategy)| serde_json::to_value(strategy).unwrap_or_default()).collect();
    let Some(Value::Object(first)) = values.first() else { return Vec::new() };
    first
        .keys()
        .filter(|key| !matches!(key.as_str(), "name" | "label" | "n" | "acceptance"))
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

/// The first example whose forwards' texts were kept, as every model and strategy answered it.
fn example(records: &Records) -> Option<Example> {
    let with_pieces = || records.answers.iter().filter(|answer| answer.pieces.is_some());
    let index = with_pieces().map(|answer| answer.index).min()?;
    let chosen: Vec<&AnswerRecord> = with_pieces().filter(|answer| answer.index == index).collect();
    let first = chosen.first()?;
    Some(Example {
        id: first.id.clone(),
        prompt: first.prompt.clone(),
        reference: first.reference.clone(),
        answers: chosen.iter().map(|answer| example_answer(answer)).collect(),
    })
}

fn example_answer(answer: &AnswerRecord) -> ExampleAnswer {
    let pieces = answer.pieces.iter().flatten().zip(&answer.accepted).enumerate();
    ExampleAnswer {
        name: format!("{} {}", role_name(answer.role), label(answer.strategy)),
        verdict: answer.verdict,
        tokens: answer.response_ids.len(),
        forwards: answer.forwards,
        text: answer.text.clone(),
        pieces: pieces
            .map(|(index, (text, &tokens))| Piece {
                text: text.clone(),
                colour: index % FORWARD_COLOURS,
                forward: index + 1,
                tokens,
            })
            .collect(),
    }
}
