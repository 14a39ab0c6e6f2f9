//! Lines over two axes, with a legend under them.

use std::fmt::Write;

use super::axes::{Axis, Frame, HEIGHT, WIDTH};
use super::escape;

/// One line.
pub struct Series {
    /// Its name.
    pub label: String,
    /// Class that colours it.
    pub class: &'static str,
    /// Which dashes tell it from others of its colour, from 0.
    pub dash: usize,
    /// Its points, from left to right.
    pub points: Vec<(f64, f64)>,
}

/// Lines through points; `whole` says that y begins at 0.
pub fn lines(title: &str, names: [&'static str; 2], whole: bool, series: &[Series]) -> String {
    let points = || series.iter().flat_map(|one| one.points.iter().copied());
    let zero = whole.then_some(0.0);
    let frame = Frame::new(
        Axis::around(names[0], points().map(|point| point.0)),
        Axis::around(names[1], points().map(|point| point.1).chain(zero)),
    );
    let rows = series.len() as f64;
    let mut svg =
        frame.opened(title).replacen(&format!("{WIDTH} {HEIGHT}"), &format!("{WIDTH} {}", HEIGHT + 22.0 * rows), 1);
    for (index, one) in series.iter().enumerate() {
        let (class, dash) = (one.class, one.dash % 4);
        let mut path = String::new();
        for (number, &(x, y)) in one.points.iter().enumerate() {
            let (x, y) = frame.at(x, y);
            let _ = write!(path, "{}{x:.1} {y:.1}", if number == 0 { 'M' } else { 'L' });
            let _ = write!(svg, r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="3"/>"#);
        }
        if !path.is_empty() {
            let _ = write!(svg, r#"<path class="line {class} dash{dash}" d="{path}"/>"#);
        }
        let (x, y) = (68.0, HEIGHT + 14.0 + 22.0 * index as f64);
        let _ = write!(
            svg,
            r#"<path class="line {class} dash{dash}" d="M{x} {:.1}h34"/><text class="label" x="{:.1}" y="{:.1}">{}</text>"#,
            y - 4.5,
            x + 42.0,
            y,
            escape(&one.label)
        );
    }
    svg.push_str("</svg>");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_has_its_line_and_its_name() {
        let one = |label: &str, points: Vec<(f64, f64)>| Series {
            label: label.to_owned(),
            class: "student",
            dash: 0,
            points,
        };
        let svg = lines(
            "t",
            ["x", "y"],
            true,
            &[one("a & b", vec![(0.0, 1.0), (1.0, 2.0)]), one("one", vec![(0.5, 1.5)]), one("none", vec![])],
        );
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.contains("a &amp; b") && svg.contains(">none<") && !svg.contains("NaN"), "{svg}");
    }
}
