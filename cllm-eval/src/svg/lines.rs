//! Lines over two axes, with a legend below.

use std::fmt::Write;

use super::axes::{Axis, Frame, HEIGHT, LEGEND_LINE, Scale};
use super::escape;

/// Number of dash patterns in the page's style.
const NUM_DASHES: usize = 4;

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
    let mut svg = frame.open(title, series.len());
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
        let (x, y) = (68.0, HEIGHT + 14.0 + LEGEND_LINE * index as f64);
        let _ = write!(
            svg,
            r#"<path class="line {class} dash{dash}" d="M{x} {:.1}h34"/><text class="label" x="{:.1}" y="{:.1}">{}</text>"#,
            y - 4.5,
            x + 42.0,
            y,
            escape(&line.label)
        );
    }
    svg.push_str("</svg>");
    svg
}

/// A value with two decimals, or none if it is whole.
fn rounded(value: f64) -> String {
    if value.fract() == 0.0 { value.to_string() } else { format!("{value:.2}") }
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
        assert!(svg.contains("a &amp; b") && svg.contains(">none<") && !svg.contains("NaN"), "{svg}");
    }
}
