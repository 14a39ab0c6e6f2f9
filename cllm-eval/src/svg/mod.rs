//! SVG primitives: bars, lines and scatter plots, with the axes that they share.
//!
//! A primitive knows numbers and labels but nothing about evaluation; `report/charts.rs` decides
//! which charts a report shows. Colours come from CSS classes of the page, so that charts fit both
//! of its themes.

mod axes;
mod bars;
mod lines;
mod scatter;

pub use axes::Scale;
pub use bars::{Bar, bars};
pub use lines::{Series, lines};
pub use scatter::{ScatterPoint, scatter};

/// Approximate width of a character in the page's 15 px font. Charts are about as wide as a phone,
/// so that their text stays readable there.
const CHAR_WIDTH: f64 = 8.6;

/// Escapes `text` for SVG and HTML.
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

/// The opening tag of a chart, with its title for screen readers.
fn open(title: &str, width: f64, height: f64) -> String {
    let title = escape(title);
    format!(r#"<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}"><title>{title}</title>"#)
}
