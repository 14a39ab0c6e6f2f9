//! Makes texts of others (models, data, paths) safe to show, and says what a terminal shows.

use std::ffi::OsString;
use std::io::IsTerminal;

/// Whether a stream is a terminal that obeys escape sequences.
pub fn obeys_escapes(stream: &impl IsTerminal) -> bool {
    stream.is_terminal() && !is_dumb(std::env::var_os("TERM"))
}

/// Whether a stream is a terminal that shows colours, and the user has not turned them off.
pub fn shows_colour(stream: &impl IsTerminal) -> bool {
    obeys_escapes(stream) && !forbids_colour(std::env::var_os("NO_COLOR"))
}

/// What the variable TERM says.
fn is_dumb(term: Option<OsString>) -> bool {
    term.is_some_and(|term| term == "dumb")
}

/// What the variable NO_COLOR says (no-color.org).
fn forbids_colour(no_color: Option<OsString>) -> bool {
    no_color.is_some_and(|value| !value.is_empty())
}

/// A text for Markdown, in which it would otherwise be HTML.
pub fn to_markdown(text: &str) -> String {
    to_printable(text).replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

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
    use super::*;

    #[test]
    fn a_terminal_gets_no_control_characters() {
        let nasty = "a\x1b[2J\x1b]0;title\x07b\x08\x7f\u{9b}31m\u{202e}c\r\n\td";
        let shown = to_printable(nasty);
        assert_eq!(shown, "a␛[2J␛]0;title␇b␈␡\u{fffd}31m\u{fffd}c\n    d");
        assert!(shown.chars().all(|character| character == '\n' || !character.is_control()));
        assert_eq!(to_printable("Größe 数"), "Größe 数");
    }

    #[test]
    fn variables_turn_colours_off() {
        assert!(is_dumb(Some("dumb".into())) && !is_dumb(Some("xterm".into())) && !is_dumb(None));
        assert!(forbids_colour(Some("1".into())) && !forbids_colour(Some("".into())) && !forbids_colour(None));
    }

    #[test]
    fn markdown_gets_no_html() {
        assert_eq!(
            to_markdown("<img src=x onerror=\"f()\"> & \x1b[2J"),
            "&lt;img src=x onerror=\"f()\"&gt; &amp; ␛[2J"
        );
    }
}
