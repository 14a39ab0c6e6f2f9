//! Breaks an answer into lines, and the lines into the fragments that appear at once.

use cllm_core::printable::to_printable;
use unicode_width::UnicodeWidthChar;

/// Part of a line of an answer, accepted by one forward.
#[derive(Debug, PartialEq)]
pub(super) struct Fragment {
    pub(super) forward: usize,
    pub(super) line: usize,
    /// Number of characters before it in its line.
    pub(super) column: usize,
    /// Width in characters.
    pub(super) width: usize,
    pub(super) text: String,
}

/// Breaks an answer into lines of at most `max_width` characters, preferably at spaces.
pub(super) fn layout(texts: &[String], max_width: usize) -> Vec<Fragment> {
    let mut characters: Vec<(usize, char)> = Vec::new();
    for (forward, text) in texts.iter().enumerate() {
        // XML has no way to write these two characters.
        let text = to_printable(text).replace(['\u{fffe}', '\u{ffff}'], "\u{fffd}");
        characters.extend(text.chars().map(|character| (forward, character)));
    }
    let paragraphs = characters.split(|&(_, character)| character == '\n');
    let lines = paragraphs.flat_map(|paragraph| break_lines(paragraph, max_width));
    let mut fragments = Vec::new();
    for (line, characters) in lines.enumerate() {
        let mut column = 0;
        for run in characters.chunk_by(|a, b| a.0 == b.0) {
            let text: String = run.iter().map(|&(_, character)| character).collect();
            let width = run.iter().map(|&(_, character)| width_of(character)).sum();
            if !text.trim().is_empty() {
                fragments.push(Fragment { forward: run[0].0, line, column, width, text });
            }
            column += width;
        }
    }
    fragments
}

fn break_lines(mut rest: &[(usize, char)], max_width: usize) -> Vec<&[(usize, char)]> {
    let mut lines = Vec::new();
    loop {
        let mut width = 0;
        let fits = |&&(_, character): &&(usize, char)| {
            width += width_of(character);
            width <= max_width
        };
        let end = rest.iter().take_while(fits).count();
        if end == rest.len() {
            lines.push(rest);
            return lines;
        }
        // The space at which a line is broken is not shown.
        let space = rest[..=end].iter().rposition(|&(_, character)| character == ' ').filter(|&space| space > 0);
        lines.push(&rest[..space.unwrap_or(end.max(1))]);
        rest = &rest[space.map_or(end.max(1), |space| space + 1)..];
    }
}

fn width_of(character: char) -> usize {
    character.width().unwrap_or(0)
}
