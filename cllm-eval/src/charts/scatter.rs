//! Points over two axes, each with its name.

use std::fmt::Write;

use super::axes::{Axis, Frame, WIDTH};
use super::escape;

/// Lines of labels are so far apart.
const LINE: f64 = 15.0;
/// About the width of a letter of a label.
const LETTER: f64 = 6.6;

/// One point.
pub struct Dot {
    /// Its name.
    pub label: String,
    /// Class that colours it.
    pub class: &'static str,
    /// Where it is.
    pub at: (f64, f64),
    /// Its whisker along y, from and to.
    pub interval: Option<[f64; 2]>,
}

/// Points with whiskers; nothing without points.
pub fn scatter(title: &str, names: [&'static str; 2], dots: &[Dot]) -> String {
    let across = dots.iter().map(|dot| dot.at.0);
    let up = dots
        .iter()
        .flat_map(|dot| [Some(dot.at.1), dot.interval.map(|ends| ends[0]), dot.interval.map(|ends| ends[1])]);
    let frame = Frame::new(Axis::around(names[0], across), Axis::around(names[1], up.flatten()));
    let mut svg = frame.opened(title);
    for dot in dots {
        let (x, y) = frame.at(dot.at.0, dot.at.1);
        if let Some([low, high]) = dot.interval {
            let (low, high) = (frame.at(dot.at.0, low).1, frame.at(dot.at.0, high).1);
            let _ = write!(
                svg,
                r#"<path class="whisker" d="M{x:.1} {low:.1}V{high:.1}M{0:.1} {low:.1}h8M{0:.1} {high:.1}h8"/>"#,
                x - 4.0
            );
        }
        let (class, label) = (dot.class, escape(&dot.label));
        let _ = write!(svg, r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="6"><title>{label}</title></circle>"#);
    }
    for (dot, (x, y, end)) in dots.iter().zip(places(&frame, dots)) {
        let (from, to) = frame.at(dot.at.0, dot.at.1);
        let anchor = if end { "end" } else { "start" };
        if (y - to).abs() > LINE {
            let _ = write!(svg, r#"<path class="leader" d="M{from:.1} {to:.1}L{x:.1} {:.1}"/>"#, y - 4.0);
        }
        let _ = write!(
            svg,
            r#"<text class="label" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#,
            escape(&dot.label)
        );
    }
    svg.push_str("</svg>");
    svg
}

/// Where the label of each point stands, and whether it ends there: beside its point, moved up or down as far as labels placed before
/// it make it.
fn places(frame: &Frame, dots: &[Dot]) -> Vec<(f64, f64, bool)> {
    let mut taken: Vec<(f64, f64, f64)> = Vec::new();
    dots.iter()
        .map(|dot| {
            let (x, y) = frame.at(dot.at.0, dot.at.1);
            let width = LETTER * dot.label.chars().count() as f64;
            let end = x + 12.0 + width > WIDTH;
            let at = if end { x - 12.0 } else { x + 12.0 };
            let (left, right) = if end { (at - width, at) } else { (at, at + width) };
            let free = |line: f64| {
                frame.height().contains(&line)
                    && taken.iter().all(|&(from, to, other)| right < from || left > to || (line - other).abs() >= LINE)
            };
            let steps = (0..40).flat_map(|step| [f64::from(step), -f64::from(step)]);
            let line = steps.map(|step| y + 4.5 + step * LINE / 2.0).find(|&line| free(line)).unwrap_or(y + 4.5);
            taken.push((left, right, line));
            (at, line, end)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dot(label: &str, at: (f64, f64)) -> Dot {
        Dot { label: label.to_owned(), class: "student", at, interval: Some([at.1 - 1.0, at.1 + 1.0]) }
    }

    #[test]
    fn labels_of_points_at_one_place_stand_apart() {
        let dots: Vec<Dot> = (0..4).map(|index| dot(&format!("<point {index}>"), (2.0, 50.0))).collect();
        let frame = Frame::new(Axis::around("x", [2.0].into_iter()), Axis::around("y", [49.0, 51.0].into_iter()));
        let mut lines: Vec<f64> = places(&frame, &dots).into_iter().map(|(_, line, _)| line).collect();
        lines.sort_by(f64::total_cmp);
        assert!(lines.windows(2).all(|pair| pair[1] - pair[0] >= LINE), "{lines:?}");
        let svg = scatter("t", ["x", "y"], &dots);
        assert_eq!((svg.matches("<circle").count(), svg.matches("NaN").count()), (4, 0));
        assert!(svg.contains("&lt;point 0&gt;") && !svg.contains("<point"), "{svg}");
    }

    #[test]
    fn a_chart_without_points_is_an_empty_frame() {
        let svg = scatter("t", ["x", "y"], &[]);
        assert!(!svg.contains("NaN") && !svg.contains("inf") && svg.ends_with("</svg>"), "{svg}");
    }
}
