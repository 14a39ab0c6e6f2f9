//! Charts of reports, drawn as SVG; colours come from the page's style, so that they fit dark and light.

mod axes;
mod bars;
mod lines;
mod scatter;

pub use bars::{Bar, bars};
pub use lines::{Series, lines};
pub use scatter::{Dot, scatter};

/// About the width of a letter of a label, of the page's 15 px: the pictures are about as wide as a telephone, so that what is written
/// in them can be read there.
const LETTER: f64 = 8.6;

/// `text` for SVG and HTML.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// The opening of a picture that reads its title aloud.
fn opened(title: &str, width: f64, height: f64) -> String {
    let title = escape(title);
    format!(r#"<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}"><title>{title}</title>"#)
}
