//! Lines that break at words.

use unicode_width::UnicodeWidthStr;

/// Breaks a text at its spaces into lines of at most `max_width` columns. A longer word has a line of
/// its own.
pub(crate) fn break_at_words(text: &str, max_width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.width() + 1 + word.width() <= max_width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
