//! Horizontal bars.

use std::fmt::Write;

use super::axes::WIDTH;
use super::{LETTER, escape, opened};

/// One bar.
pub struct Bar {
    /// Its name.
    pub label: String,
    /// Class that colours it.
    pub class: &'static str,
    /// Its length; nothing is drawn where there is none.
    pub value: Option<f64>,
    /// Whisker from and to.
    pub interval: Option<[f64; 2]>,
    /// The value as people read it.
    pub text: String,
}

const ROW: f64 = 30.0;
/// Room for a name above its bar.
const NAME: f64 = 20.0;

/// Horizontal bars from 0.
pub fn bars(title: &str, bars: &[Bar]) -> String {
    let reach = |bar: &Bar| bar.interval.map_or(0.0, |[_, high]| high).max(bar.value.unwrap_or(0.0));
    let most = bars.iter().map(reach).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let longest = |text: fn(&Bar) -> &str| {
        bars.iter().map(|bar| text(bar).chars().count()).max().unwrap_or(0) as f64 * LETTER + 12.0
    };
    // Names that would leave no room for bars stand above them.
    let (left, right) = (longest(|bar| &bar.label), longest(|bar| &bar.text));
    let above = left > WIDTH / 2.0;
    let (left, row) = if above { (0.0, ROW + NAME) } else { (left, ROW) };
    let room = (WIDTH - left - right).max(0.0);
    let at = |value: f64| left + room * value / most;
    let mut svg = opened(title, left + room + right, row * bars.len() as f64 + 6.0);
    for (index, bar) in bars.iter().enumerate() {
        let top = row * index as f64 + 5.0 + if above { NAME } else { 0.0 };
        let (middle, base) = (top + 10.0, top + 15.0);
        let (x, y, anchor) = if above { (0.0, base - NAME, "start") } else { (left - 8.0, base, "end") };
        let label = escape(&bar.label);
        let _ = write!(svg, r#"<text class="label" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{label}</text>"#);
        let end = at(bar.value.unwrap_or(0.0));
        if bar.value.is_some() {
            let length = (end - left).max(1.0);
            let class = bar.class;
            let _ = write!(
                svg,
                r#"<rect class="{class}" x="{left:.1}" y="{top:.1}" width="{length:.1}" height="20" rx="3"/>"#
            );
        }
        if let Some([low, high]) = bar.interval {
            let (low, high) = (at(low), at(high));
            let _ = write!(
                svg,
                r#"<path class="whisker" d="M{low:.1} {middle:.1}H{high:.1}M{low:.1} {:.1}v10M{high:.1} {:.1}v10"/>"#,
                middle - 5.0,
                middle - 5.0
            );
        }
        let after = bar.interval.map_or(end, |[_, high]| at(high).max(end)) + 8.0;
        let _ = write!(svg, r#"<text class="value" x="{after:.1}" y="{base:.1}">{}</text>"#, escape(&bar.text));
    }
    svg.push_str("</svg>");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_values_and_labels_are_escaped() {
        let bar = |label: &str, value| Bar {
            label: label.to_owned(),
            class: "teacher",
            value,
            interval: None,
            text: String::new(),
        };
        let svg = bars("a < b", &[bar("<i>", Some(2.0)), bar("half", Some(1.0)), bar("none", None)]);
        let width = |rect: &str| rect.split_once(r#"" width=""#).unwrap().1.split('"').next().unwrap().parse::<f64>();
        let widths: Vec<f64> = svg.split("<rect").skip(1).map(|rect| width(rect).unwrap()).collect();
        assert!((widths[0] - 2.0 * widths[1]).abs() < 0.2, "{svg}");
        assert_eq!(svg.matches("<rect").count(), 2);
        assert!(svg.contains("&lt;i&gt;") && !svg.contains("<i>"), "{svg}");
    }
}
