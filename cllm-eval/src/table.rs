//! The summary that people read in the terminal.

use crate::spider_difficulty::Difficulty;
use cllm_core::task::Task;
use comfy_table::{CellAlignment, Table, presets};

use crate::results::{Accuracy, ModelResults, PairedDifference, Results, StrategyResults};
use crate::run::perplexity::Perplexity;
use crate::similarity::Similarity;

/// Heads of the columns; the first two name the row.
pub const HEADS: [&str; 10] = [
    "model",
    "strategy",
    "accuracy (95 %)",
    "unfinished",
    "tokens/forward",
    "finished only",
    "tokens/s",
    "vs teacher AR",
    "vs student AR",
    "equal to AR",
];

/// The cells of a row after its name.
pub fn cells(found: &StrategyResults) -> Vec<String> {
    // Where nothing is right or wrong, likeness stands in its place.
    let score = found.similarity.as_ref().map_or_else(|| accuracy(found.accuracy, found.ci95), likeness);
    vec![
        score,
        format!("{} of {}", found.unfinished, found.examples),
        number(found.tokens_per_forward, 2, ""),
        number(found.tokens_per_forward_finished, 2, ""),
        number(found.tokens_per_second, 1, ""),
        number(found.speedup_vs_teacher_ar, 2, "x"),
        number(found.speedup_vs_student_ar, 2, "x"),
        number(found.exact_match_vs_ar.map(|rate| 100.0 * rate), 1, " %"),
    ]
}

fn likeness(found: &Similarity) -> String {
    let share = |share: Option<f64>, unit: &str| number(share.map(|share| 100.0 * share), 1, unit);
    format!("BLEU {}, prefix {}", share(found.bleu, ""), share(found.exact_prefix, " %"))
}

/// An accuracy with its 95 % interval, or `-` where there is none.
pub fn accuracy(rate: Option<f64>, ci95: Option<[f64; 2]>) -> String {
    match (rate, ci95) {
        (Some(rate), Some([low, high])) => {
            format!("{:.1} % ({:.1} to {:.1})", 100.0 * rate, 100.0 * low, 100.0 * high)
        }
        _ => "-".to_owned(),
    }
}

/// A perplexity with its 95 % interval.
pub fn perplexity(found: &Perplexity) -> String {
    let interval = found.ci95.map_or_else(String::new, |[low, high]| format!(" (95 %: {low:.3} to {high:.3})"));
    format!("perplexity {:.3}{interval}", found.value)
}

/// A figure, or `-` where there is none.
pub fn number(value: Option<f64>, digits: usize, unit: &str) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}{unit}"))
}

/// A paired difference in a sentence.
pub fn sentence(difference: &PairedDifference) -> String {
    let points = |value: f64| format!("{:+.1}", 100.0 * value);
    let interval =
        difference.ci95.map_or_else(String::new, |[low, high]| format!(" (95 %: {} to {})", points(low), points(high)));
    format!(
        "accuracy of student {} less teacher {}: {} points{interval} on {} examples",
        difference.student,
        difference.teacher,
        difference.difference.map_or_else(|| "-".to_owned(), points),
        difference.examples
    )
}

/// Accuracy by difficulty in a line, where there is one.
fn difficulties(model: &str, found: &StrategyResults) -> Option<String> {
    let classes = found.by_difficulty.as_ref()?;
    let class = |(class, of): (&Difficulty, &Accuracy)| {
        let rate = number(of.accuracy.map(|rate| 100.0 * rate), 1, " %");
        format!("{} {rate} of {}", format!("{class:?}").to_lowercase(), of.scored)
    };
    Some(format!("{model} {} by difficulty: {}", found.label, classes.iter().map(class).collect::<Vec<_>>().join(", ")))
}

/// A table, whose first `names` columns name the row.
pub fn drawn(heads: &[&str], names: usize, rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(heads);
    table.add_rows(rows);
    for index in names..heads.len() {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    format!("{table}\n")
}

/// What is said of a run beside its table, a line each: perplexity, accuracy by difficulty, the student against the teacher.
pub fn notes(results: &Results) -> Vec<String> {
    let perplexities = results.models.iter().filter_map(|model| {
        let found = model.perplexity.as_ref()?;
        let Perplexity { nll, tokens, windows, .. } = found;
        let (role, value) = (model.model.role.name(), perplexity(found));
        Some(format!("{role}: {value}, {nll:.4} nats a token, {tokens} tokens in {windows} windows"))
    });
    let difficulties = results
        .models
        .iter()
        .flat_map(|model| model.strategies.iter().filter_map(|found| difficulties(model.model.role.name(), found)));
    perplexities.chain(difficulties).chain(results.paired.iter().map(sentence)).collect()
}

/// What was measured on what, in a sentence.
pub fn measured(results: &Results) -> String {
    if results.benchmark == Task::Perplexity {
        let texts = if results.examples == 1 { "text" } else { "texts" };
        return format!("{} {texts}; nothing is generated.", results.examples);
    }
    let speed = match results.speed_examples {
        0 => "speed was not measured".to_owned(),
        count => format!("speed at batch 1 on {count} of them, prefill apart"),
    };
    format!("{} examples, {}, answered in batches for accuracy; {speed}.", results.examples, results.choice())
}

/// The summary of a run.
pub fn summary(results: &Results) -> String {
    let rows: Vec<Vec<String>> = results.models.iter().flat_map(rows).collect();
    let table = if rows.is_empty() { String::new() } else { drawn(&HEADS, 2, rows) };
    let notes: String = notes(results).into_iter().map(|note| note + "\n").collect();
    format!("{table}{}\n{}\n{notes}", measured(results), results.hardware.summary())
}

/// The rows of a model's strategies.
pub fn rows(model: &ModelResults) -> impl Iterator<Item = Vec<String>> {
    model.strategies.iter().map(|found| {
        let name = [model.model.role.name().to_owned(), found.label.clone()];
        name.into_iter().chain(cells(found)).collect()
    })
}
