//! Lines that break at words, and numbers with commas.

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

/// A number of digits alone, or with decimals, with a comma at every thousand.
pub(crate) fn with_commas(number: &str) -> String {
    let (whole, decimals) = number.split_at(number.find('.').unwrap_or(number.len()));
    let groups = whole.as_bytes().rchunks(3).rev().map(String::from_utf8_lossy);
    groups.collect::<Vec<_>>().join(",") + decimals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_have_a_comma() {
        let numbers = ["0", "12", "123", "1234", "1234567", "1234.5678"];
        assert_eq!(numbers.map(with_commas), ["0", "12", "123", "1,234", "1,234,567", "1,234.5678"]);
    }
}
