//! Every mark of every chart stands at its value: marks are read back from the SVG by means of the
//! ticks of its axes, and compared with results.json.

use std::path::{Path, PathBuf};

use cllm_eval::report::report;
use cllm_eval::results::{Results, StrategyResults};
use cllm_eval::role::Role;
use roxmltree::{Document, Node};

/// The charts of a page: captions with their SVG.
fn charts(page: &str) -> Vec<(String, String)> {
    let figures = page.split("<figure>").skip(1);
    figures
        .map(|figure| {
            let (caption, rest) = figure.split_once("<figcaption>").unwrap().1.split_once("</figcaption>").unwrap();
            let svg = rest.split_once("</figure>").unwrap().0;
            (caption.replace('\u{a0}', " "), svg[svg.find("<svg").unwrap()..].to_owned())
        })
        .collect()
}

fn number(node: Node<'_, '_>, name: &str) -> f64 {
    node.attribute(name).unwrap().parse().unwrap()
}

/// Converts pixels of one axis into its values.
struct Ruler {
    pixels: [f64; 2],
    values: [f64; 2],
    is_logarithmic: bool,
}

impl Ruler {
    /// Reads an axis from its ticks, whose labels have this anchor.
    fn new(svg: &Document<'_>, anchor: &str, position: &str, shift: f64, is_logarithmic: bool) -> Self {
        let ticks: Vec<(f64, f64)> = with_class(svg, "tick")
            .filter(|node| node.attribute("text-anchor") == Some(anchor))
            .map(|node| (number(node, position) - shift, node.text().unwrap().replace(',', "").parse::<f64>().unwrap()))
            .map(|(pixel, value)| (pixel, if is_logarithmic { value.log2() } else { value }))
            .collect();
        let (first, last) = (ticks[0], ticks[ticks.len() - 1]);
        Ruler { pixels: [first.0, last.0], values: [first.1, last.1], is_logarithmic }
    }

    fn value(&self, pixel: f64) -> f64 {
        let ([p0, p1], [v0, v1]) = (self.pixels, self.values);
        let value = v0 + (pixel - p0) / (p1 - p0) * (v1 - v0);
        if self.is_logarithmic { value.exp2() } else { value }
    }

    /// How much of a value half a pixel is, at a value.
    fn tolerance(&self, value: f64) -> f64 {
        let per_pixel = ((self.values[1] - self.values[0]) / (self.pixels[1] - self.pixels[0])).abs();
        if self.is_logarithmic { 0.5 * per_pixel * value } else { 0.5 * per_pixel }
    }
}

fn with_class<'d>(svg: &'d Document<'d>, class: &str) -> impl Iterator<Item = Node<'d, 'd>> {
    svg.descendants().filter(move |node| node.attribute("class") == Some(class))
}

/// The circles of a chart as values of its axes.
fn points(svg: &Document<'_>, is_logarithmic: bool) -> (Vec<(f64, f64)>, [Ruler; 2]) {
    let rulers = [
        Ruler::new(svg, "middle", "x", 0.0, is_logarithmic),
        // Labels of the vertical axis are centred on their ticks.
        Ruler::new(svg, "end", "y", 4.5, false),
    ];
    let circles = svg.descendants().filter(|node| node.has_tag_name("circle"));
    let points =
        circles.map(|node| (rulers[0].value(number(node, "cx")), rulers[1].value(number(node, "cy")))).collect();
    (points, rulers)
}

fn expect_points(file: &Path, svg: &Document<'_>, is_logarithmic: bool, expected: Vec<(f64, f64)>) {
    let (mut actual, [x, y]) = points(svg, is_logarithmic);
    assert_eq!(actual.len(), expected.len(), "{}", file.display());
    for point in expected {
        let is_near = |other: &(f64, f64)| {
            (other.0 - point.0).abs() < x.tolerance(point.0) && (other.1 - point.1).abs() < y.tolerance(point.1)
        };
        let found = actual.iter().position(is_near);
        actual.remove(found.unwrap_or_else(|| panic!("{}: no mark at {point:?} in {actual:?}", file.display())));
    }
}

fn expect_whiskers(file: &Path, svg: &Document<'_>, expected: &[[f64; 2]]) {
    let (_, [_, y]) = points(svg, false);
    let mut found: Vec<[f64; 2]> = with_class(svg, "whisker")
        .map(|node| {
            let (low, rest) = node.attribute("d").unwrap().split_once(' ').unwrap().1.split_once('V').unwrap();
            [low, rest.split_once('M').unwrap().0].map(|end| y.value(end.parse().unwrap()))
        })
        .collect();
    for ends in expected {
        let is_near = |other: &[f64; 2]| (0..2).all(|end| (other[end] - ends[end]).abs() < y.tolerance(0.0));
        let at = found.iter().position(is_near);
        found.remove(at.unwrap_or_else(|| panic!("{}: no whisker {ends:?} in {found:?}", file.display())));
    }
    assert!(found.is_empty());
}

/// The lengths of the bars of each model have the proportions of the values.
fn expect_bars(file: &Path, svg: &Document<'_>, expected: &[f64]) {
    let bars = svg.descendants().filter(|node| {
        node.has_tag_name("rect") && node.attribute("class").is_some_and(|class| Role::from_name(class).is_some())
    });
    let lengths: Vec<f64> = bars.map(|node| number(node, "width")).collect();
    assert_eq!(lengths.len(), expected.len(), "{}", file.display());
    let longest = expected.iter().zip(&lengths).max_by(|a, b| a.0.total_cmp(b.0)).unwrap();
    for (value, length) in expected.iter().zip(&lengths) {
        let right = value / longest.0 * longest.1;
        assert!((length - right).abs() < 1.0, "{}: {value} is {length} and not {right} long", file.display());
    }
}

fn all<'r>(results: &'r Results, value: impl Fn(&'r StrategyResults) -> Option<f64>) -> Vec<f64> {
    results.strategies().filter_map(|(_, figures)| value(figures)).collect()
}

fn expect_marks_at_values(file: &Path, caption: &str, svg: &str, results: &Results) -> bool {
    let svg = &Document::parse(svg).unwrap();
    let acceptances = || results.strategies().filter_map(|(_, figures)| figures.acceptance.as_ref());
    match caption {
        "Accuracy (95 % interval) against speed" => {
            let of = results.strategies().filter(|(_, figures)| figures.accuracy.is_some());
            let point = |figures: &StrategyResults| {
                (results.speedup(figures).0.or(figures.tokens_per_forward).unwrap(), 100.0 * figures.accuracy.unwrap())
            };
            expect_points(file, svg, false, of.map(|(_, figures)| point(figures)).collect());
            let ends = results.strategies().filter_map(|(_, figures)| figures.ci95);
            expect_whiskers(file, svg, &ends.map(|ends| ends.map(|end| 100.0 * end)).collect::<Vec<_>>());
        }
        "Tokens per second at batch 1, excluding prefill" => {
            expect_bars(file, svg, &all(results, |figures| figures.tokens_per_second));
        }
        "Tokens per forward" => expect_bars(file, svg, &all(results, |figures| figures.tokens_per_forward)),
        caption if caption.ends_with(", by answers decoded at once") => {
            let batches = results.throughputs().into_iter().filter_map(|(_, _, batch)| {
                Some((batch.concurrency as f64, batch.speedup_vs_teacher_ar.or(batch.speedup_vs_student_ar)?))
            });
            expect_points(file, svg, true, batches.collect());
        }
        "Forwards, by the number of tokens that they accepted" => {
            let points = |forwards: &[u64]| {
                let total: u64 = forwards.iter().sum();
                let percent = |counts: &[u64]| 100.0 * counts.iter().sum::<u64>() as f64 / total as f64;
                let (first, rest) = forwards.split_at(forwards.len().min(15));
                let mut points: Vec<_> =
                    first.iter().enumerate().map(|(at, count)| (at as f64 + 1.0, percent(&[*count]))).collect();
                points.extend((!rest.is_empty()).then(|| (16.0, percent(rest))));
                points
            };
            expect_points(file, svg, false, acceptances().flat_map(|of| points(&of.forwards)).collect());
        }
        "Draft tokens accepted, by position in the window" => {
            let positions = |fractions: &[f64]| {
                let points = fractions.iter().enumerate();
                points.map(|(index, fraction)| (index as f64 + 1.0, 100.0 * fraction)).collect::<Vec<_>>()
            };
            expect_points(file, svg, false, acceptances().flat_map(|of| positions(&of.by_position)).collect());
        }
        "Tokens per forward, by position in the answer" => {
            let segments = acceptances().flat_map(|of| &of.over_answer).filter(|segment| segment.forwards > 0);
            let points =
                segments.map(|segment| (segment.start as f64, segment.tokens as f64 / segment.forwards as f64));
            expect_points(file, svg, false, points.collect());
        }
        _ => return false,
    }
    true
}

fn json_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        match path.is_dir() {
            true => json_files(&path, files),
            false if path.extension().is_some_and(|extension| extension == "json") => files.push(path),
            false => {}
        }
    }
}

#[test]
fn every_mark_of_the_committed_results_stands_at_its_value() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/results"));
    let mut files = Vec::new();
    json_files(folder, &mut files);
    let dir = tempfile::tempdir().unwrap();
    let mut num_charts = 0;
    for file in files {
        let Ok(results) = Results::read(&file) else { continue };
        report(std::slice::from_ref(&file), Some(dir.path()), &[]).unwrap();
        let page = std::fs::read_to_string(dir.path().join("report.html")).unwrap();
        for (caption, svg) in charts(&page) {
            num_charts += usize::from(expect_marks_at_values(&file, &caption, &svg, &results));
        }
    }
    assert!(num_charts > 100, "only {num_charts} charts were compared");
}
