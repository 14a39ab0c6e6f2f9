//! Horizontal bars.

use std::fmt::Write;

use super::{escape, opened};

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

const LABEL_WIDTH: f64 = 170.0;
const BAR_WIDTH: f64 = 380.0;
const TEXT_WIDTH: f64 = 190.0;
const ROW: f64 = 30.0;

/// Horizontal bars from 0.
pub fn bars(title: &str, bars: &[Bar]) -> String {
    let reach = |bar: &Bar| bar.interval.map_or(0.0, |[_, high]| high).max(bar.value.unwrap_or(0.0));
    let most = bars.iter().map(reach).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let at = |value: f64| LABEL_WIDTH + BAR_WIDTH * value / most;
    let (width, height) = (LABEL_WIDTH + BAR_WIDTH + TEXT_WIDTH, ROW * bars.len() as f64 + 6.0);
    let mut svg = opened(title, width, height);
    for (index, bar) in bars.iter().enumerate() {
        let top = ROW * index as f64 + 5.0;
        let (middle, base) = (top + 10.0, top + 15.0);
        let _ = write!(
            svg,
            r#"<text class="label" x="{:.1}" y="{base:.1}" text-anchor="end">{}</text>"#,
            LABEL_WIDTH - 8.0,
            escape(&bar.label)
        );
        let end = at(bar.value.unwrap_or(0.0));
        if bar.value.is_some() {
            let length = (end - LABEL_WIDTH).max(1.0);
            let class = bar.class;
            let _ = write!(
                svg,
                r#"<rect class="{class}" x="{LABEL_WIDTH:.1}" y="{top:.1}" width="{length:.1}" height="20" rx="3"/>"#
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
        assert!(svg.contains(r#"width="380.0""#) && svg.contains(r#"width="190.0""#), "{svg}");
        assert_eq!(svg.matches("<rect").count(), 2);
        assert!(svg.contains("&lt;i&gt;") && !svg.contains("<i>"), "{svg}");
    }
}
