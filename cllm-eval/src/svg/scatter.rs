//! Points over two axes, each with its name.

use std::fmt::Write;

use super::axes::{Axis, Frame, HEIGHT, WIDTH};
use super::{LETTER, escape};

/// Lines of labels are so far apart.
const LINE: f64 = 17.0;
/// Radius of a point.
const RADIUS: f64 = 6.0;
/// Points are drawn so far apart across.
const APART: f64 = 14.0;
/// Between a point and its label.
const GAP: f64 = 12.0;

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

/// A part of the picture: left, right, top, bottom.
#[derive(Clone, Copy)]
struct Area([f64; 4]);

impl Area {
    fn meets(self, Area([left, right, top, bottom]): Area) -> bool {
        self.0[0] < right && left < self.0[1] && self.0[2] < bottom && top < self.0[3]
    }
}

/// Where a label stands, and whether it ends there.
#[derive(Clone, Copy)]
struct Place {
    x: f64,
    y: f64,
    end: bool,
}

/// Points with whiskers; nothing without points. Where names are too long to stand at their points, numbers do, and the names under
/// the picture.
pub fn scatter(title: &str, names: [&'static str; 2], dots: &[Dot]) -> String {
    let across = dots.iter().map(|dot| dot.at.0);
    let up = dots
        .iter()
        .flat_map(|dot| [Some(dot.at.1), dot.interval.map(|ends| ends[0]), dot.interval.map(|ends| ends[1])]);
    let frame = Frame::new(Axis::around(names[0], across), Axis::around(names[1], up.flatten()));
    let mut svg = frame.opened(title);
    let short = dots.iter().all(|dot| LETTER * (dot.label.chars().count() as f64) < WIDTH / 2.0);
    let tags: Vec<String> = if short {
        dots.iter().map(|dot| dot.label.clone()).collect()
    } else {
        let height = HEIGHT + 22.0 * dots.len() as f64;
        svg = svg.replacen(&format!("{WIDTH} {HEIGHT}"), &format!("{WIDTH} {height}"), 1);
        (1..=dots.len()).map(|number| number.to_string()).collect()
    };
    let centres = centres(&frame, dots);
    for (dot, &(x, y)) in dots.iter().zip(&centres) {
        if let Some([low, high]) = dot.interval {
            let (low, high) = (frame.at(dot.at.0, low).1, frame.at(dot.at.0, high).1);
            let _ = write!(
                svg,
                r#"<path class="whisker" d="M{x:.1} {low:.1}V{high:.1}M{0:.1} {low:.1}h8M{0:.1} {high:.1}h8"/>"#,
                x - 4.0
            );
        }
        let (class, label) = (dot.class, escape(&dot.label));
        let _ = write!(
            svg,
            r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="{RADIUS}"><title>{label}</title></circle>"#
        );
    }
    for ((tag, place), &(from, to)) in tags.iter().zip(places(&frame, dots, &tags, &centres)).zip(&centres) {
        let Place { x, y, end } = place;
        let anchor = if end { "end" } else { "start" };
        if (y - 5.0 - to).abs() > LINE / 2.0 || (x - from).abs() > GAP + 1.0 {
            let gap = if end { 2.0 } else { -2.0 };
            let _ = write!(svg, r#"<path class="leader" d="M{from:.1} {to:.1}L{:.1} {:.1}"/>"#, x + gap, y - 5.0);
        }
        let _ =
            write!(svg, r#"<text class="label" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{}</text>"#, escape(tag));
    }
    for (index, dot) in dots.iter().enumerate().filter(|_| !short) {
        let (number, y, label) = (index + 1, HEIGHT + 14.0 + 22.0 * index as f64, escape(&dot.label));
        let _ = write!(svg, r#"<text class="label" x="4" y="{y:.1}">{number}: {label}</text>"#);
    }
    svg.push_str("</svg>");
    svg
}

/// Where each point is drawn: at its place, or beside points before it that are at about the same x.
fn centres(frame: &Frame, dots: &[Dot]) -> Vec<(f64, f64)> {
    let mut drawn: Vec<(f64, f64)> = Vec::new();
    for dot in dots {
        let (x, y) = frame.at(dot.at.0, dot.at.1);
        let shifts = (0..=2 * dots.len() as u32).flat_map(|step| [f64::from(step), -f64::from(step)]);
        let mut places = shifts.map(|step| x + step * APART / 2.0);
        // Whiskers need less room than points of one height.
        let clear = |at: f64, (other, height): (f64, f64)| {
            (other - at).abs() >= if (height - y).abs() < APART { APART } else { APART / 2.0 }
        };
        let free = |&at: &f64| frame.width().contains(&at) && drawn.iter().all(|&other| clear(at, other));
        drawn.push((places.find(free).unwrap_or(x), y));
    }
    drawn
}

/// Where the label of each point stands: right or left of it, moved up or down and away as far as points, whiskers and labels placed
/// before it make it.
fn places(frame: &Frame, dots: &[Dot], tags: &[String], centres: &[(f64, f64)]) -> Vec<Place> {
    let mut taken: Vec<Area> = Vec::new();
    for (dot, &(x, y)) in dots.iter().zip(centres) {
        taken.push(Area([x - RADIUS, x + RADIUS, y - RADIUS, y + RADIUS]));
        if let Some([low, high]) = dot.interval {
            taken.push(Area([x - 5.0, x + 5.0, frame.at(dot.at.0, high).1 - 2.0, frame.at(dot.at.0, low).1 + 2.0]));
        }
    }
    let mut place = |(tag, &(x, y)): (&String, &(f64, f64))| {
        let width = LETTER * tag.chars().count() as f64;
        let area = |place: &Place| {
            let left = if place.end { place.x - width } else { place.x };
            Area([left - 4.0, left + width + 4.0, place.y + 3.0 - LINE, place.y + 3.0])
        };
        let lines = (0..40).flat_map(|step| [f64::from(step), -f64::from(step)]);
        let around = lines.flat_map(|line| {
            let away = [0.0, 1.0, 2.0, 4.0, 6.0];
            away.into_iter().flat_map(move |far| [(line, far, false), (line, far, true)])
        });
        let at = |(line, far, end): (f64, f64, bool)| {
            let gap = GAP + far * APART;
            Place { x: if end { x - gap } else { x + gap }, y: y + 5.0 + line * LINE / 2.0, end }
        };
        let inside = |place: &Place| {
            let Area([left, right, ..]) = area(place);
            frame.width().contains(&left) && frame.width().contains(&right) && frame.height().contains(&place.y)
        };
        let free = |place: &Place| inside(place) && taken.iter().all(|&other| !area(place).meets(other));
        let mut places = around.map(at);
        let nearest = at((0.0, 0.0, x > WIDTH / 2.0));
        let found = places.find(free).unwrap_or(nearest);
        taken.push(area(&found));
        found
    };
    tags.iter().zip(centres).map(&mut place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dot(label: &str, at: (f64, f64)) -> Dot {
        Dot { label: label.to_owned(), class: "student", at, interval: Some([at.1 - 1.0, at.1 + 1.0]) }
    }

    #[test]
    fn points_at_one_place_and_their_labels_stand_apart() {
        let mut dots: Vec<Dot> = (0..4).map(|index| dot(&format!("<point {index}>"), (2.0, 50.0))).collect();
        dots.push(dot("<another>", (2.05, 50.5)));
        let across = dots.iter().map(|dot| dot.at.0).chain([1.0, 4.0]);
        let frame = Frame::new(Axis::around("x", across), Axis::around("y", [49.0, 52.0].into_iter()));
        let centres = centres(&frame, &dots);
        for (index, (x, _)) in centres.iter().enumerate() {
            let before = if index < 4 { &centres[..index] } else { &[] };
            assert!(before.iter().all(|(other, _)| (x - other).abs() > 2.0 * RADIUS), "{centres:?}");
        }
        let tags: Vec<String> = dots.iter().map(|dot| dot.label.clone()).collect();
        let area = |(dot, place): (&Dot, &Place)| {
            let width = LETTER * dot.label.chars().count() as f64;
            let left = if place.end { place.x - width } else { place.x };
            Area([left, left + width, place.y - 12.0, place.y])
        };
        let areas: Vec<Area> = dots.iter().zip(&places(&frame, &dots, &tags, &centres)).map(area).collect();
        for (index, one) in areas.iter().enumerate() {
            assert!(areas[..index].iter().all(|&other| !one.meets(other)), "label {index} lies on another");
            for (dot, &(x, _)) in dots.iter().zip(&centres) {
                let ends = dot.interval.unwrap().map(|end| frame.at(dot.at.0, end).1);
                assert!(!one.meets(Area([x - 4.0, x + 4.0, ends[1], ends[0]])), "label {index} lies on a whisker");
            }
        }
        let svg = scatter("t", ["x", "y"], &dots);
        assert_eq!((svg.matches("<circle").count(), svg.matches("NaN").count()), (5, 0));
        assert!(svg.contains("&lt;point 0&gt;") && !svg.contains("<point"), "{svg}");
    }

    #[test]
    fn long_names_stand_under_the_picture() {
        let long = "student lookahead window=5 ngram=4 candidates=5";
        let svg = scatter("t", ["x", "y"], &[dot(long, (2.0, 50.0)), dot("short", (3.0, 50.0))]);
        assert!(svg.contains(&format!(">1: {long}<")) && svg.contains(">2<") && svg.contains(">2: short<"), "{svg}");
    }

    #[test]
    fn a_chart_without_points_is_an_empty_frame() {
        let svg = scatter("t", ["x", "y"], &[]);
        assert!(!svg.contains("NaN") && !svg.contains("inf") && svg.ends_with("</svg>"), "{svg}");
    }
}
