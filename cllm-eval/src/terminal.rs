//! Tables and lines for a terminal of 80 columns. A report has all columns; a terminal those that
//! decide.

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

use crate::results::{Results, StrategyResults};
use crate::role::Role;
use crate::table::{
    CONCURRENCY_NOTE, describe, difficulties, format_number, format_percent, format_speed, format_whole, notes,
    paired_notes, score,
};
use crate::words::break_at_words;

/// Number of columns that every text fits into.
const WIDTH: u16 = 80;

/// Formats a table. The first `num_names` columns name the row, and their cells are wrapped where
/// the table would be too wide; the others are aligned to the right.
pub fn table(heads: &[&str], num_names: usize, rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY);
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table.set_width(WIDTH);
    table.set_header(heads.to_vec());
    table.add_rows(rows);
    for index in num_names..heads.len() {
        if let Some(column) = table.column_mut(index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    format!("{table}\n")
}

/// Breaks a line at words; what follows is indented.
pub fn wrap(line: &str) -> String {
    const INDENT: &str = "  ";
    let lines = break_at_words(line, usize::from(WIDTH) - INDENT.len());
    lines.join(&format!("\n{INDENT}")) + "\n"
}

/// The summary of a run.
pub fn summary(results: &Results) -> String {
    let mut text = strategies(results);
    let batches = concurrency(results);
    if !batches.is_empty() {
        text += &format!("{batches}{}", wrap(CONCURRENCY_NOTE));
    }
    let lines = [describe(results), baseline(results).unwrap_or_default(), results.hardware.summary()];
    text += &lines.iter().filter(|line| !line.is_empty()).map(|line| wrap(line)).collect::<String>();
    text + &details(results)
}

/// Accuracy by difficulty, and the notes.
pub fn details(results: &Results) -> String {
    let (heads, rows) = difficulties(results);
    let heads: Vec<&str> = heads.iter().map(String::as_str).collect();
    let by_difficulty = if rows.is_empty() { String::new() } else { table(&heads, 2, rows) };
    by_difficulty + &notes(results).into_iter().chain(paired_notes(results)).map(|note| wrap(&note)).collect::<String>()
}

/// Says what speed-ups are over.
fn baseline(results: &Results) -> Option<String> {
    let (model, figures) = results.baseline()?;
    let speed = format_speed(Some(figures.tokens_per_second?));
    Some(format!("Speed-ups are over autoregressive decoding of the {} ({speed} tokens/s).", model.role))
}

/// A row for each model and strategy; empty where nothing was decoded.
pub fn strategies(results: &Results) -> String {
    let row = |(role, figures): (Role, &StrategyResults)| {
        let mut row = vec![role.to_string(), figures.label.clone()];
        row.extend(strategy_cells(results, figures));
        row
    };
    let rows: Vec<Vec<String>> = results.strategies().map(row).collect();
    let heads = ["model", "strategy", "accuracy", "tokens per\nforward", "tokens/s", "speed-up"];
    if rows.is_empty() { String::new() } else { table(&heads, 2, rows) }
}

fn strategy_cells(results: &Results, figures: &StrategyResults) -> Vec<String> {
    let (ratio, ci95) = results.speedup(figures);
    let accuracy = match &figures.similarity {
        Some(_) => score(figures).replace(", ", "\n"),
        None => stacked(format_percent(figures.accuracy), figures.ci95, |end| format!("{:.1}", 100.0 * end)),
    };
    let unfinished = match figures.unfinished {
        0 => String::new(),
        number => format!("\n{} unfinished", format_whole(number)),
    };
    vec![
        accuracy + &unfinished,
        format_number(figures.tokens_per_forward, 2, ""),
        format_speed(figures.tokens_per_second),
        stacked(format_number(ratio, 2, "x"), ci95, |end| format!("{end:.2}")),
    ]
}

/// A figure with its 95 % interval below it.
pub fn stacked(figure: String, ci95: Option<[f64; 2]>, format: impl Fn(f64) -> String) -> String {
    match ci95 {
        Some([low, high]) => format!("{figure}\n{} to {}", format(low), format(high)),
        None => figure,
    }
}

/// A row for each model, strategy and number of rows; empty where this was not measured.
fn concurrency(results: &Results) -> String {
    let rows: Vec<Vec<String>> = results
        .throughputs()
        .into_iter()
        .map(|(role, figures, batch)| {
            vec![
                role.to_string(),
                figures.label.clone(),
                batch.concurrency.to_string(),
                format_speed(batch.tokens_per_second),
                format_speed(batch.tokens_per_second_per_user),
                format_number(batch.speedup_vs_teacher_ar.or(batch.speedup_vs_student_ar), 2, "x"),
            ]
        })
        .collect();
    let heads = ["model", "strategy", "rows", "tokens/s", "tokens/s\nper user", "speed-up"];
    if rows.is_empty() { String::new() } else { table(&heads, 2, rows) }
}

#[cfg(test)]
mod tests {
    use unicode_width::UnicodeWidthStr;

    use super::*;

    #[test]
    fn lines_break_at_words_and_tables_fit() {
        let line = format!("student: {}", "some words and ".repeat(12));
        let wrapped = wrap(line.trim());
        assert!(wrapped.lines().count() == 3 && wrapped.lines().all(|line| line.width() <= 80), "{wrapped}");
        assert_eq!(wrapped.split_whitespace().collect::<Vec<_>>(), line.split_whitespace().collect::<Vec<_>>());
        let row = ["a".repeat(60), "a long name of a strategy with words".to_owned(), "1.00x".to_owned()];
        let text = table(&["model", "strategy", "speed-up"], 2, [row.to_vec()]);
        assert!(text.lines().all(|line| line.width() <= 80), "{text}");
    }
}
