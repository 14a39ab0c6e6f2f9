//! Makes the text of a model safe to show.

/// Replaces control characters, which a terminal would obey instead of showing them, with visible
/// ones. Keeps line feeds, and turns tabs into spaces.
pub fn to_printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\n' => shown.push('\n'),
            '\t' => shown.push_str("    "),
            '\r' => {}
            // The block of control pictures starts at U+2400.
            '\u{0}'..='\u{1f}' => shown.extend(char::from_u32(0x2400 + character as u32)),
            '\u{7f}' => shown.push('\u{2421}'),
            // The C1 controls, and the characters that change the direction of the text.
            '\u{80}'..='\u{9f}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {
                shown.push('\u{fffd}')
            }
            other => shown.push(other),
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::to_printable;

    #[test]
    fn a_terminal_gets_no_control_characters() {
        let nasty = "a\x1b[2J\x1b]0;title\x07b\x08\x7f\u{9b}31m\u{202e}c\r\n\td";
        let shown = to_printable(nasty);
        assert_eq!(shown, "a␛[2J␛]0;title␇b␈␡\u{fffd}31m\u{fffd}c\n    d");
        assert!(shown.chars().all(|character| character == '\n' || !character.is_control()));
        assert_eq!(to_printable("Größe 数"), "Größe 数");
    }
}
