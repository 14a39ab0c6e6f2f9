//! Horizontal bars.

use std::fmt::Write;

use super::axes::WIDTH;
use super::{CHAR_WIDTH, escape, open};

/// One bar.
pub struct Bar {
    pub label: String,
    /// CSS class that colours it.
    pub class: &'static str,
    /// Length of the bar. `None` draws only the label and `text`.
    pub value: Option<f64>,
    /// Ends of the whisker.
    pub interval: Option<[f64; 2]>,
    /// The value as text, written after the bar.
    pub text: String,
}

const BAR_LINE: f64 = 30.0;
/// Extra height of a bar whose label is above it.
const LABEL_LINE: f64 = 20.0;

/// Draws horizontal bars from 0. Labels are to the left of their bars, or above them if they would
/// leave the bars too little width.
pub fn bars(title: &str, bars: &[Bar]) -> String {
    let end_value = |bar: &Bar| bar.interval.map_or(0.0, |[_, high]| high).max(bar.value.unwrap_or(0.0));
    let max_value = bars.iter().map(end_value).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let text_width = |text: fn(&Bar) -> &str| {
        bars.iter().map(|bar| text(bar).chars().count()).max().unwrap_or(0) as f64 * CHAR_WIDTH + 12.0
    };
    let (label_width, right) = (text_width(|bar| &bar.label), text_width(|bar| &bar.text));
    let above = label_width > WIDTH / 2.0;
    let (left, line) = if above { (0.0, BAR_LINE + LABEL_LINE) } else { (label_width, BAR_LINE) };
    let bar_width = (WIDTH - left - right).max(0.0);
    let to_pixels = |value: f64| left + bar_width * value / max_value;
    let mut svg = open(title, left + bar_width + right, line * bars.len() as f64 + 6.0);
    for (index, bar) in bars.iter().enumerate() {
        let top = line * index as f64 + 5.0 + if above { LABEL_LINE } else { 0.0 };
        let (middle, baseline) = (top + 10.0, top + 15.0);
        let (x, y, anchor) = if above { (0.0, baseline - LABEL_LINE, "start") } else { (left - 8.0, baseline, "end") };
        let label = escape(&bar.label);
        let _ = write!(svg, r#"<text class="label" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{label}</text>"#);
        let end = to_pixels(bar.value.unwrap_or(0.0));
        if bar.value.is_some() {
            let (class, length) = (bar.class, (end - left).max(1.0));
            let _ = write!(
                svg,
                r#"<rect class="{class}" x="{left:.1}" y="{top:.1}" width="{length:.1}" height="20" rx="3"/>"#
            );
        }
        if let Some([low, high]) = bar.interval.map(|ends| ends.map(to_pixels)) {
            let _ = write!(
                svg,
                r#"<path class="whisker" d="M{low:.1} {middle:.1}H{high:.1}M{low:.1} {:.1}v10M{high:.1} {:.1}v10"/>"#,
                middle - 5.0,
                middle - 5.0
            );
        }
        let text_x = bar.interval.map_or(end, |[_, high]| to_pixels(high).max(end)) + 8.0;
        let text = escape(&bar.text);
        let _ = write!(svg, r#"<text class="value" x="{text_x:.1}" y="{baseline:.1}">{text}</text>"#);
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
