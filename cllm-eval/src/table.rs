//! The summary that people read in the terminal.

use comfy_table::{CellAlignment, Table, presets};

use crate::measure::role_name;
use crate::results::{PairedDifference, Results, StrategyResults};

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
    let accuracy = match (found.accuracy, found.ci95) {
        (Some(rate), Some([low, high])) => {
            format!("{:.1} % ({:.1} to {:.1})", 100.0 * rate, 100.0 * low, 100.0 * high)
        }
        _ => "-".to_owned(),
    };
    vec![
        accuracy,
        format!("{} of {}", found.unfinished, found.examples),
        number(found.tokens_per_forward, 2, ""),
        number(found.tokens_per_forward_finished, 2, ""),
        number(found.tokens_per_second, 1, ""),
        number(found.speedup_vs_teacher_ar, 2, "x"),
        number(found.speedup_vs_student_ar, 2, "x"),
        number(found.exact_match_vs_ar.map(|rate| 100.0 * rate), 1, " %"),
    ]
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

/// The summary of a run.
pub fn summary(results: &Results) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED);
    table.set_header(HEADS);
    for model in &results.models {
        for found in &model.strategies {
            let mut row = vec![role_name(model.model.role).to_owned(), found.label()];
            row.extend(cells(found));
            table.add_row(row);
        }
    }
    for index in 2..HEADS.len() {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    let mut text = format!("{table}\n");
    text.push_str(&format!(
        "{} examples batched for accuracy, {} at batch 1 for speed (prefill apart)\n{}\n",
        results.examples,
        results.speed_examples,
        results.hardware.line()
    ));
    for difference in &results.paired {
        text.push_str(&sentence(difference));
        text.push('\n');
    }
    text
}
