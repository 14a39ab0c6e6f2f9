//! A scatter plot whose points carry their labels. Points stand at their values, even where they
//! overlap; labels that would overlap are moved apart.

use std::fmt::Write;

use super::axes::{Axis, Frame, HEIGHT, LEGEND_GAP, LEGEND_LINE, Scale, WIDTH};
use super::{CHAR_WIDTH, escape};

/// Height of a label.
const LABEL_LINE: f64 = 17.0;
/// Radius of a point.
const RADIUS: f64 = 6.0;
/// Horizontal step of a label that moves away from its point.
const LABEL_STEP: f64 = 14.0;
/// Number of points from which labels are numbers, because names would not fit.
const MIN_NUMBERED: usize = 8;
/// Distance between a point and its label.
const LABEL_DISTANCE: f64 = 12.0;
/// How far a label may move up or down, in half lines.
const MAX_HALF_LINES: u32 = 40;

/// One point.
pub struct ScatterPoint {
    pub label: String,
    /// CSS class that colours it.
    pub class: &'static str,
    pub x: f64,
    pub y: f64,
    /// Ends of the whisker along y.
    pub interval: Option<[f64; 2]>,
}

/// A rectangle in pixels.
#[derive(Clone, Copy)]
struct Rect {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Rect {
    fn overlaps(self, other: Rect) -> bool {
        self.left < other.right && other.left < self.right && self.top < other.bottom && other.top < self.bottom
    }
}

/// Where a label is drawn.
#[derive(Clone, Copy)]
struct LabelPosition {
    x: f64,
    /// The baseline.
    y: f64,
    /// Whether the text ends at `x`, because it is left of its point, rather than starting there.
    ends_at_x: bool,
}

impl LabelPosition {
    fn bounds(self, text: &str) -> Rect {
        let width = CHAR_WIDTH * text.chars().count() as f64;
        let left = if self.ends_at_x { self.x - width } else { self.x };
        Rect { left, right: left + width, top: self.y + 3.0 - LABEL_LINE, bottom: self.y + 3.0 }
    }
}

/// Draws points with whiskers and labels. Where labels are too long or too many for the room beside
/// their points, the points are numbered and listed in a legend below.
pub fn scatter(title: &str, axis_names: [&'static str; 2], points: &[ScatterPoint]) -> String {
    let ys = points.iter().flat_map(|point| point.interval.into_iter().flatten().chain([point.y]));
    let frame = Frame::new(
        Axis::new(axis_names[0], Scale::Linear, points.iter().map(|point| point.x)),
        Axis::new(axis_names[1], Scale::Linear, ys),
    );
    let centres: Vec<(f64, f64)> = points.iter().map(|point| frame.to_pixels(point.x, point.y)).collect();
    let is_short = |point: &ScatterPoint| CHAR_WIDTH * (point.label.chars().count() as f64) < WIDTH / 2.0;
    let mut labels: Vec<String> = points.iter().map(|point| point.label.clone()).collect();
    let mut placed = place_labels(&frame, points, &labels, &centres);
    let numbered = points.len() >= MIN_NUMBERED || !points.iter().all(is_short) || !placed.all_fit;
    if numbered {
        labels = (1..=points.len()).map(|number| number.to_string()).collect();
        placed = place_labels(&frame, points, &labels, &centres);
    }
    let mut svg = frame.open(title, if numbered { points.len() } else { 0 });
    for (point, &centre) in points.iter().zip(&centres) {
        draw_point(&mut svg, &frame, point, centre);
    }
    for ((label, position), &centre) in labels.iter().zip(placed.positions).zip(&centres) {
        draw_label(&mut svg, label, position, centre);
    }
    for (index, point) in points.iter().enumerate().filter(|_| numbered) {
        let (number, y, label) = (index + 1, HEIGHT + LEGEND_GAP + LEGEND_LINE * index as f64, escape(&point.label));
        let _ = write!(
            svg,
            r#"<rect class="key {}" x="4" y="{:.1}" width="12" height="12" rx="6"/><text class="label" x="24" y="{y:.1}">{number}: {label}</text>"#,
            point.class,
            y - 11.0
        );
    }
    svg.push_str("</svg>");
    svg
}

fn draw_point(svg: &mut String, frame: &Frame, point: &ScatterPoint, (x, y): (f64, f64)) {
    if let Some(ends) = point.interval {
        let [low, high] = ends.map(|end| frame.to_pixels(point.x, end).1);
        let _ = write!(
            svg,
            r#"<path class="whisker" d="M{x:.1} {low:.1}V{high:.1}M{0:.1} {low:.1}h8M{0:.1} {high:.1}h8"/>"#,
            x - 4.0
        );
    }
    let (class, label) = (point.class, escape(&point.label));
    let _ =
        write!(svg, r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="{RADIUS}"><title>{label}</title></circle>"#);
}

/// Writes a label, and a line to its point if it had to move away from it.
fn draw_label(svg: &mut String, text: &str, position: LabelPosition, (point_x, point_y): (f64, f64)) {
    let LabelPosition { x, y, ends_at_x } = position;
    let anchor = if ends_at_x { "end" } else { "start" };
    if (y - 5.0 - point_y).abs() > LABEL_LINE / 2.0 || (x - point_x).abs() > LABEL_DISTANCE + 1.0 {
        let (end_x, end_y) = leader_end(position);
        let _ = write!(svg, r#"<path class="leader" d="M{point_x:.1} {point_y:.1}L{end_x:.1} {end_y:.1}"/>"#);
    }
    let text = escape(text);
    let _ = write!(svg, r#"<text class="label" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#);
}

/// Where the line from a point to its label ends.
fn leader_end(LabelPosition { x, y, ends_at_x }: LabelPosition) -> (f64, f64) {
    (if ends_at_x { x + 2.0 } else { x - 2.0 }, y - 5.0)
}

/// Whether the line from a point to the end of its label runs over another point. Points that overlap
/// their own do not count.
fn leader_covers((end_x, end_y): (f64, f64), (x, y): (f64, f64), (other_x, other_y): (f64, f64)) -> bool {
    let ((run, rise), (right, down)) = ((end_x - x, end_y - y), (other_x - x, other_y - y));
    let along = ((right * run + down * rise) / (run * run + rise * rise).max(1e-9)).clamp(0.0, 1.0);
    right.hypot(down) > 2.0 * RADIUS && (right - along * run).hypot(down - along * rise) < RADIUS
}

/// The positions of all labels.
struct PlacedLabels {
    positions: Vec<LabelPosition>,
    /// Whether there was room for each.
    all_fit: bool,
}

/// Chooses positions for the labels: beside their points, then moved up or down and away until they
/// overlap neither points and whiskers nor earlier labels, and the line to the point runs over no other
/// point.
fn place_labels(frame: &Frame, points: &[ScatterPoint], labels: &[String], centres: &[(f64, f64)]) -> PlacedLabels {
    let mut occupied = marks(frame, points, centres);
    let (mut positions, mut all_fit) = (Vec::with_capacity(labels.len()), true);
    for (label, &(x, y)) in labels.iter().zip(centres) {
        let padded = |position: LabelPosition| {
            let bounds = position.bounds(label);
            Rect { left: bounds.left - 4.0, right: bounds.right + 4.0, ..bounds }
        };
        let is_free = |&position: &LabelPosition| {
            let bounds = padded(position);
            frame.label_columns().contains(&bounds.left)
                && frame.label_columns().contains(&bounds.right)
                && frame.label_baselines().contains(&position.y)
                && occupied.iter().all(|&other| !bounds.overlaps(other))
                && !centres.iter().any(|&other| leader_covers(leader_end(position), (x, y), other))
        };
        let free = candidates(x, y).find(is_free);
        all_fit &= free.is_some();
        let position = free.unwrap_or_else(|| beside(x, y, x > WIDTH / 2.0));
        occupied.push(padded(position));
        positions.push(position);
    }
    PlacedLabels { positions, all_fit }
}

/// The areas that points and whiskers cover.
fn marks(frame: &Frame, points: &[ScatterPoint], centres: &[(f64, f64)]) -> Vec<Rect> {
    let mut occupied = Vec::new();
    for (point, &(x, y)) in points.iter().zip(centres) {
        occupied.push(Rect { left: x - RADIUS, right: x + RADIUS, top: y - RADIUS, bottom: y + RADIUS });
        if let Some(ends) = point.interval {
            let [low, high] = ends.map(|end| frame.to_pixels(point.x, end).1);
            occupied.push(Rect { left: x - 5.0, right: x + 5.0, top: high - 2.0, bottom: low + 2.0 });
        }
    }
    occupied
}

fn beside(x: f64, y: f64, ends_at_x: bool) -> LabelPosition {
    let x = if ends_at_x { x - LABEL_DISTANCE } else { x + LABEL_DISTANCE };
    LabelPosition { x, y: y + 5.0, ends_at_x }
}

/// Possible positions for the label of the point at `x`, `y`, nearest lines first.
fn candidates(x: f64, y: f64) -> impl Iterator<Item = LabelPosition> {
    let half_lines = (0..MAX_HALF_LINES).flat_map(|step| [f64::from(step), -f64::from(step)]);
    half_lines.flat_map(move |half_line| {
        [0.0, 1.0, 2.0, 4.0, 6.0].into_iter().flat_map(move |away| {
            [false, true].map(|ends_at_x| {
                let away = away * LABEL_STEP;
                let beside = beside(if ends_at_x { x - away } else { x + away }, y, ends_at_x);
                LabelPosition { y: beside.y + half_line * LABEL_LINE / 2.0, ..beside }
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(label: &str, x: f64, y: f64) -> ScatterPoint {
        ScatterPoint { label: label.to_owned(), class: "student", x, y, interval: Some([y - 1.0, y + 1.0]) }
    }

    #[test]
    fn equal_points_stay_at_their_values_and_their_labels_are_moved_apart() {
        let mut points: Vec<ScatterPoint> = (0..4).map(|index| point(&format!("<point {index}>"), 2.0, 50.0)).collect();
        points.push(point("<another>", 2.05, 50.5));
        let axis = |name, values: Vec<f64>| Axis::new(name, Scale::Linear, values.into_iter());
        let frame = Frame::new(axis("x", vec![1.0, 4.0]), axis("y", vec![49.0, 52.0]));
        let centres: Vec<(f64, f64)> = points.iter().map(|point| frame.to_pixels(point.x, point.y)).collect();
        let labels: Vec<String> = points.iter().map(|point| point.label.clone()).collect();
        let bounds = |(label, position): (&String, LabelPosition)| {
            let bounds = position.bounds(label);
            Rect { top: position.y - 12.0, bottom: position.y, ..bounds }
        };
        let PlacedLabels { positions, all_fit } = place_labels(&frame, &points, &labels, &centres);
        assert!(all_fit);
        let bounds: Vec<Rect> = labels.iter().zip(positions).map(bounds).collect();
        for (index, label) in bounds.iter().enumerate() {
            assert!(bounds[..index].iter().all(|&other| !label.overlaps(other)), "label {index} covers another");
            for (point, &(x, _)) in points.iter().zip(&centres) {
                let [low, high] = point.interval.unwrap().map(|end| frame.to_pixels(point.x, end).1);
                let whisker = Rect { left: x - 4.0, right: x + 4.0, top: high, bottom: low };
                assert!(!label.overlaps(whisker), "label {index} covers a whisker");
            }
        }
        let svg = scatter("t", ["x", "y"], &points);
        let circles: Vec<&str> = svg.split("<circle").skip(1).map(|rest| rest.split(" r=").next().unwrap()).collect();
        assert!(circles.len() == 5 && circles[..4].iter().all(|&circle| circle == circles[0]), "{circles:?}");
        assert!(svg.contains("&lt;point 0&gt;") && !svg.contains("<point") && !svg.contains("NaN"), "{svg}");
    }

    #[test]
    fn no_line_to_a_label_runs_over_another_point() {
        let points: Vec<ScatterPoint> = (0..12).map(|at| point("", 2.0 + 0.2 * f64::from(at), 50.0)).collect();
        let axis = |name, values: Vec<f64>| Axis::new(name, Scale::Linear, values.into_iter());
        let frame = Frame::new(axis("x", vec![1.0, 6.0]), axis("y", vec![40.0, 60.0]));
        let centres: Vec<(f64, f64)> = points.iter().map(|point| frame.to_pixels(point.x, point.y)).collect();
        let labels: Vec<String> = (1..=12).map(|number: u32| number.to_string()).collect();
        let positions = place_labels(&frame, &points, &labels, &centres).positions;
        for (position, &(x, y)) in positions.into_iter().zip(&centres) {
            let (end_x, end_y) = leader_end(position);
            for along in (0..=40).map(|step| f64::from(step) / 40.0) {
                let (at_x, at_y) = (x + along * (end_x - x), y + along * (end_y - y));
                let others = centres.iter().filter(|other| (other.0 - x).abs() > 2.0 * RADIUS);
                assert!(others.clone().all(|other| (other.0 - at_x).hypot(other.1 - at_y) > RADIUS - 0.5), "{x}");
            }
        }
    }

    #[test]
    fn long_labels_are_numbered_in_a_legend() {
        let long = "student lookahead window=5 ngram=4 candidates=5";
        let svg = scatter("t", ["x", "y"], &[point(long, 2.0, 50.0), point("short", 3.0, 50.0)]);
        assert!(svg.contains(&format!(">1: {long}<")) && svg.contains(">2<") && svg.contains(">2: short<"), "{svg}");
        // Tall whiskers leave no room for names between them.
        let tall = |at: u8| ScatterPoint {
            interval: Some([0.0, 100.0]),
            ..point("teacher rolling n=16", f64::from(at), 50.0)
        };
        let svg = scatter("t", ["x", "y"], &[1, 2, 3, 4, 5, 6].map(tall));
        assert!(svg.contains(">6: teacher rolling n=16<"), "{svg}");
    }

    #[test]
    fn a_chart_without_points_is_an_empty_frame() {
        let svg = scatter("t", ["x", "y"], &[]);
        assert!(!svg.contains("NaN") && !svg.contains("inf") && svg.ends_with("</svg>"), "{svg}");
    }
}
