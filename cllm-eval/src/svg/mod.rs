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
pub use lines::{NUM_DASHES, Series, lines};
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

/// The colours and fonts of a chart that stands alone, as on the page of a report.
const STANDALONE_STYLE: &str = "\
:root{--paper:#fff;--ink:#1c2330;--soft:#566072;--line:#d9dee7;--teacher:#6b7688;--student:#1f5fc4}\
@media(prefers-color-scheme:dark){:root{--paper:#14171d;--ink:#e6e9ef;--soft:#a3adbd;--line:#353d4a;--teacher:#9aa5b7;--student:#74a7ff}}\
svg{background:var(--paper)}text{fill:var(--ink);font:15px system-ui,sans-serif}\
.tick,.axis{fill:var(--soft);font-size:14px}.grid{stroke:var(--line)}\
.teacher{fill:var(--teacher)}.student{fill:var(--student)}circle{stroke:var(--paper)}\
.whisker,.leader{fill:none;stroke:var(--soft);stroke-width:1.3}.leader{stroke-width:.7}";

/// A chart as a file of its own, with its style.
pub fn standalone(chart: &str) -> String {
    let with_namespace = chart.replacen("<svg ", r#"<svg xmlns="http://www.w3.org/2000/svg" "#, 1);
    with_namespace.replacen("</title>", &format!("</title><style>{STANDALONE_STYLE}</style>"), 1)
}

/// The opening tag of a chart, with its title for screen readers.
fn open(title: &str, width: f64, height: f64) -> String {
    let title = escape(title);
    format!(r#"<svg viewBox="0 0 {width} {height}" role="img" aria-label="{title}"><title>{title}</title>"#)
}
