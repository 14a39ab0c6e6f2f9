//! Lines over two axes, with a legend below.

use std::fmt::Write;

use super::axes::{Axis, Frame, HEIGHT, LEGEND_GAP, LEGEND_LINE, Scale, WIDTH};
use super::{CHAR_WIDTH, escape};
use crate::words::{break_at_words, with_commas};

/// Number of dash patterns in the page's style, by which the lines of one colour are told apart.
pub const NUM_DASHES: usize = 8;
/// Left edge of a legend's labels, and the number of characters that fit beside it.
const LABEL_X: f64 = 110.0;
const MAX_LABEL_CHARS: usize = ((WIDTH - LABEL_X) / CHAR_WIDTH) as usize;

/// One line.
pub struct Series {
    pub label: String,
    /// CSS class that colours it.
    pub class: &'static str,
    /// Index of the dash pattern that distinguishes it from other lines of its colour.
    pub dash: usize,
    /// From left to right.
    pub points: Vec<(f64, f64)>,
}

/// Draws lines through points. The axes are `[x, y]`, each a name and a scale.
pub fn lines(title: &str, axes: [(&'static str, Scale); 2], series: &[Series]) -> String {
    let points = || series.iter().flat_map(|line| line.points.iter().copied());
    let [(x_name, x_scale), (y_name, y_scale)] = axes;
    let frame = Frame::new(
        Axis::new(x_name, x_scale, points().map(|point| point.0)),
        Axis::new(y_name, y_scale, points().map(|point| point.1)),
    );
    let labels: Vec<Vec<String>> = series.iter().map(|line| break_at_words(&line.label, MAX_LABEL_CHARS)).collect();
    let mut svg = frame.open(title, labels.iter().map(Vec::len).sum());
    let mut legend_line = 0;
    for (index, line) in series.iter().enumerate() {
        let (class, dash) = (line.class, line.dash % NUM_DASHES);
        let mut path = String::new();
        for (number, &(x, y)) in line.points.iter().enumerate() {
            let label = format!("{}: {} at {}", line.label, rounded(y), rounded(x));
            let (x, y) = frame.to_pixels(x, y);
            let _ = write!(path, "{}{x:.1} {y:.1}", if number == 0 { 'M' } else { 'L' });
            let _ = write!(
                svg,
                r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="3"><title>{}</title></circle>"#,
                escape(&label)
            );
        }
        if !path.is_empty() {
            let _ = write!(svg, r#"<path class="line {class} dash{dash}" d="{path}"/>"#);
        }
        let y = |line: usize| HEIGHT + LEGEND_GAP + LEGEND_LINE * line as f64;
        let _ = write!(svg, r#"<path class="line {class} dash{dash}" d="M68 {:.1}h34"/>"#, y(legend_line) - 4.5);
        for text in &labels[index] {
            let _ =
                write!(svg, r#"<text class="label" x="{LABEL_X}" y="{:.1}">{}</text>"#, y(legend_line), escape(text));
            legend_line += 1;
        }
    }
    svg.push_str("</svg>");
    svg
}

/// A value with two decimals, or none if it is whole.
fn rounded(value: f64) -> String {
    with_commas(&if value.fract() == 0.0 { value.to_string() } else { format!("{value:.2}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_has_its_line_and_its_label() {
        let line = |label: &str, points: Vec<(f64, f64)>| Series {
            label: label.to_owned(),
            class: "student",
            dash: 0,
            points,
        };
        let svg = lines(
            "t",
            [("x", Scale::Linear), ("y", Scale::FromZero)],
            &[line("a & b", vec![(0.0, 1.0), (1.0, 2.0)]), line("one", vec![(0.5, 1.5)]), line("none", vec![])],
        );
        assert_eq!(svg.matches("<circle").count(), 3);
        let long = "student lookahead window=5 ngram=4 candidates=5 pool=9";
        let broken = break_at_words(long, MAX_LABEL_CHARS);
        assert!(broken.len() == 2 && broken.iter().all(|line| line.chars().count() <= MAX_LABEL_CHARS), "{broken:?}");
        assert_eq!(broken.join(" "), long);
        assert!(svg.contains("a &amp; b") && svg.contains(">none<") && !svg.contains("NaN"), "{svg}");
    }
}
