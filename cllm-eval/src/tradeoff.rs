//! `tradeoff`: accuracy against parallelism over checkpoints and strategies, with the Pareto front
//! and one number for the curve of each checkpoint (AUP).

use std::path::PathBuf;

use cllm_core::progress::count;
use cllm_core::task::Task;
use cllm_core::{Error, Result, progress};
use serde::Serialize;
use serde_json::json;

use crate::config::RunSettings;
use crate::records::{ModelEntry, SCHEMA_VERSION};
use crate::results::{ModelResults, Results, StrategyResults};
use crate::role::Role;
use crate::statistics::ratio;
use crate::table::{format_count, format_number, format_percent, format_speed};
use crate::terminal::{self, stacked, wrap};

/// How strongly AUP penalizes a loss of accuracy.
const ALPHA: f64 = 3.0;
/// A point that is more than this many percentage points of accuracy below the first of its curve
/// does not count in AUP.
const MAX_LOST_POINTS: f64 = 5.0;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tradeoff {
    pub schema_version: u32,
    pub benchmark: Task,
    pub split: String,
    /// What the runs answered, as reports call it.
    #[serde(skip)]
    pub title: String,
    /// Number of examples.
    pub examples: usize,
    /// What every speed-up is measured against. `None` if nothing was decoded autoregressively.
    pub baseline: Option<Baseline>,
    /// By checkpoint in the order given, then from few to many tokens per forward.
    pub points: Vec<Point>,
    /// One for each checkpoint, in the order of the points.
    pub aup: Vec<Aup>,
}

/// Autoregressive decoding of the first results' teacher, or of their only model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Baseline {
    /// Folder of the model.
    pub checkpoint: String,
    pub fingerprint: String,
    pub tokens_per_second: Option<f64>,
}

/// A checkpoint with a strategy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// Folder of the model.
    pub checkpoint: String,
    /// Hash of its configuration and weights, which tells checkpoints apart.
    pub fingerprint: String,
    /// Its role in its run.
    pub role: Role,
    /// The strategy with its settings, such as `rolling n=16`.
    pub strategy: String,
    /// Size of the strategy's window; 1 for `ar`.
    pub max_tokens_per_forward: usize,
    pub accuracy: f64,
    /// 95 % interval of the accuracy.
    pub ci95: Option<[f64; 2]>,
    pub tokens_per_forward: f64,
    /// At batch 1, excluding prefill.
    pub tokens_per_second: Option<f64>,
    /// Over the baseline: of the same run, or else of the first if both ran on the same machine.
    pub speedup: Option<f64>,
    /// Whether no other point is better in accuracy or tokens per forward and at least as good in
    /// both.
    pub on_front: bool,
}

/// The area under the curve of a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Aup {
    /// Folder of the model.
    pub checkpoint: String,
    /// Hash of its configuration and weights.
    pub fingerprint: String,
    /// See [`aup`]. It grows with parallelism as long as accuracy is kept.
    pub aup: f64,
    /// Number of points that count.
    pub points: usize,
}

/// Reads results (files, or the folders that hold them) and puts their points side by side.
///
/// # Errors
/// When a file is not a results file, the files measured different things, or no answer was scored.
pub fn read(paths: &[PathBuf]) -> Result<Tradeoff> {
    let results: Vec<Results> = paths.iter().map(|path| Results::read(path)).collect::<Result<_>>()?;
    for (path, other) in paths.iter().zip(&results).skip(1) {
        expect_comparable(&results[0], other).map_err(|difference| {
            Error::file(path, format!("{difference}: only results of the same examples and settings can be compared"))
        })?;
    }
    let (points, repeated) = distinct_points(&results);
    if !repeated.is_empty() {
        progress::log(format!("shown as in the first results that have them: {}", repeated.join(", ")));
    }
    results.first().and_then(|first| Tradeoff::new(first, points)).ok_or_else(|| match paths {
        [path] => Error::usage("holds no scored answer: nothing to compare").in_file(path),
        _ => {
            let names: Vec<String> = paths.iter().map(|path| path.display().to_string()).collect();
            Error::usage(format!("none of {} holds a scored answer: nothing to compare", names.join(", ")))
        }
    })
}

/// # Errors
/// Describes the first difference.
fn expect_comparable(first: &Results, other: &Results) -> std::result::Result<(), String> {
    let expect_same = |name: &str, actual: String, expected: String| match actual == expected {
        true => Ok(()),
        false => Err(format!("has {name}={actual}, the first results have {expected}")),
    };
    expect_same("benchmark", other.benchmark.name().into(), first.benchmark.name().into())?;
    expect_same("split", other.split.clone(), first.split.clone())?;
    expect_same("examples", other.examples.to_string(), first.examples.to_string())?;
    let (actual, expected) = (&other.settings, &first.settings);
    expect_same("keep_distinct", actual.keep_distinct.to_string(), expected.keep_distinct.to_string())?;
    expect_same("max_new_tokens", actual.max_new_tokens.to_string(), expected.max_new_tokens.to_string())?;
    let limit = |settings: &RunSettings| json!(settings.max_thinking_tokens).to_string();
    expect_same("max_thinking_tokens", limit(actual), limit(expected))?;
    expect_same("temperature", actual.temperature.to_string(), expected.temperature.to_string())
}

impl Tradeoff {
    /// Formats a table of the points and the area under the curve for each checkpoint.
    pub fn text(&self) -> String {
        const HEADS: [&str; 6] =
            ["strategy", "accuracy", "tokens per\nforward", "tokens/s", "speed-up", "Pareto\nfront"];
        let row = |point: &Point| {
            vec![
                point.strategy.clone(),
                stacked(format_percent(Some(point.accuracy)), point.ci95, |end| format!("{:.1}", 100.0 * end)),
                format_number(Some(point.tokens_per_forward), 2, ""),
                format_speed(point.tokens_per_second),
                format_number(point.speedup, 2, "x"),
                if point.on_front { "*" } else { "" }.to_owned(),
            ]
        };
        let mut text = format!("{} of {}\n", format_count(self.examples, "example"), self.title);
        text += &self.baseline.as_ref().map_or_else(String::new, Baseline::text);
        let curves = self.points.chunk_by(|a, b| a.fingerprint == b.fingerprint);
        for (curve, Aup { checkpoint, aup, points, .. }) in curves.zip(&self.aup) {
            text += &format!("\n{} ({})\n", checkpoint, curve[0].role);
            text += &terminal::table(&HEADS, 1, curve.iter().map(row));
            text += &format!("AUP {aup:.1}, over {}\n", count(*points, "point"));
        }
        text
    }

    /// Puts the points of comparable results side by side. A checkpoint and strategy that several
    /// results contain counts once, as in the first of them. `None` if nothing was scored.
    pub fn from_results(results: &[Results]) -> Option<Self> {
        Tradeoff::new(results.first()?, distinct_points(results).0)
    }

    /// `points` are those of all results, `first` is the first of these. `None` without points.
    fn new(first: &Results, mut points: Vec<Point>) -> Option<Self> {
        sort_by_checkpoint(&mut points);
        mark_front(&mut points);
        let best = points.iter().map(|point| point.accuracy).reduce(f64::max)?;
        let curves = points.chunk_by(|a, b| a.fingerprint == b.fingerprint);
        Some(Tradeoff {
            schema_version: SCHEMA_VERSION,
            benchmark: first.benchmark,
            split: first.split.clone(),
            title: first.settings.title(first.benchmark, &first.split),
            examples: first.examples,
            baseline: first.baseline().map(|(model, figures)| Baseline::new(model, figures)),
            aup: curves.map(|curve| Aup::new(curve, best)).collect(),
            points,
        })
    }
}

/// The points of all results, and the names of those that several have.
fn distinct_points(results: &[Results]) -> (Vec<Point>, Vec<String>) {
    let (mut points, mut repeated): (Vec<Point>, Vec<String>) = (Vec::new(), Vec::new());
    for point in results.iter().flat_map(|of_run| scored_points(of_run, &results[0])) {
        let is_same = |other: &Point| other.fingerprint == point.fingerprint && other.strategy == point.strategy;
        if points.iter().any(is_same) {
            repeated.push(format!("{} {}", point.checkpoint, point.strategy));
        } else {
            points.push(point);
        }
    }
    (points, repeated)
}

fn scored_points<'r>(results: &'r Results, first: &'r Results) -> impl Iterator<Item = Point> + 'r {
    let strategies =
        results.models.iter().flat_map(|model| model.strategies.iter().map(move |figures| (model, figures)));
    strategies.filter_map(move |(model, figures)| Point::new(model, figures, speedup(results, figures, first)))
}

/// The speed-up of a strategy of `results` over the baseline of the first results.
fn speedup(results: &Results, figures: &StrategyResults, first: &Results) -> Option<f64> {
    let (model, baseline) = first.baseline()?;
    let has_baseline = results.baseline().is_some_and(|(own, _)| own.fingerprint == model.fingerprint);
    let same_machine = (&results.hardware, &results.toolkit) == (&first.hardware, &first.toolkit);
    match (has_baseline, same_machine) {
        (true, _) => results.speedup(figures).0,
        (false, true) => ratio(figures.tokens_per_second, baseline.tokens_per_second),
        (false, false) => None,
    }
}

/// Keeps checkpoints in the order of their first points, and sorts the points of each from few to
/// many tokens per forward.
fn sort_by_checkpoint(points: &mut [Point]) {
    let mut checkpoints: Vec<String> = Vec::new();
    for point in points.iter() {
        if !checkpoints.contains(&point.fingerprint) {
            checkpoints.push(point.fingerprint.clone());
        }
    }
    let order = |point: &Point| checkpoints.iter().position(|fingerprint| *fingerprint == point.fingerprint);
    points.sort_by(|a, b| {
        let parallelism = a.tokens_per_forward.total_cmp(&b.tokens_per_forward);
        order(a).cmp(&order(b)).then(parallelism).then(b.accuracy.total_cmp(&a.accuracy))
    });
}

fn mark_front(points: &mut [Point]) {
    let pairs: Vec<(f64, f64)> = points.iter().map(|point| (point.accuracy, point.tokens_per_forward)).collect();
    for (point, &(accuracy, parallelism)) in points.iter_mut().zip(&pairs) {
        let is_better = |&(other_accuracy, other_parallelism): &(f64, f64)| {
            other_accuracy >= accuracy
                && other_parallelism >= parallelism
                && (other_accuracy > accuracy || other_parallelism > parallelism)
        };
        point.on_front = !pairs.iter().any(is_better);
    }
}

impl Point {
    /// `None` if no answer was scored.
    fn new(model: &ModelResults, figures: &StrategyResults, speedup: Option<f64>) -> Option<Self> {
        Some(Point {
            checkpoint: model.model.path.clone(),
            fingerprint: model.model.fingerprint.clone(),
            role: model.model.role,
            strategy: figures.label.clone(),
            max_tokens_per_forward: figures.max_tokens_per_forward,
            accuracy: figures.accuracy?,
            ci95: figures.ci95,
            tokens_per_forward: figures.tokens_per_forward?,
            tokens_per_second: figures.tokens_per_second,
            speedup,
            on_front: false,
        })
    }
}

impl Baseline {
    fn new(model: &ModelEntry, figures: &StrategyResults) -> Self {
        Baseline {
            checkpoint: model.path.clone(),
            fingerprint: model.fingerprint.clone(),
            tokens_per_second: figures.tokens_per_second,
        }
    }

    fn text(&self) -> String {
        let speed = self
            .tokens_per_second
            .map_or_else(String::new, |_| format!(" ({} tokens/s)", format_speed(self.tokens_per_second)));
        wrap(&format!("speed-ups are over autoregressive decoding of {}{speed}", self.checkpoint))
    }
}

impl Aup {
    /// Computes the area for the points of one checkpoint. `best` is the best accuracy among all
    /// points compared.
    fn new(curve: &[Point], best: f64) -> Self {
        let pairs: Vec<(f64, f64)> =
            curve.iter().map(|point| (point.tokens_per_forward, 100.0 * point.accuracy)).collect();
        let (aup, points) = aup(&pairs, 100.0 * best);
        let Point { checkpoint, fingerprint, .. } = &curve[0];
        Aup { checkpoint: checkpoint.clone(), fingerprint: fingerprint.clone(), aup, points }
    }
}

/// Returns the accuracy under parallelism and the number of points that count. It is the area under
/// the curve of accuracy (in percent) over tokens per forward, weighted by quality.
///
/// `curve` contains pairs `(ρ, y)` from few tokens per forward to many; `y_max` is the best
/// accuracy among all points compared. With `W(y) = min(exp(-3 (1 - y / y_max)), 1)` over the
/// points with `y >= y_1 - 5`,
///
/// `AUP = ρ_1 y_1 + Σ_{i >= 2} (ρ_i - ρ_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2`.
///
/// The definition is that of d3LLM (arXiv 2601.07568), as computed by `aup_utils.py` of the
/// leaderboard of hao-ai-lab. That program refuses a curve whose last point lost more than 5
/// points; here, as in the definition, such points do not count.
pub fn aup(curve: &[(f64, f64)], y_max: f64) -> (f64, usize) {
    let Some(&(first_rho, first_y)) = curve.first() else { return (0.0, 0) };
    let weighted = |y: f64| if y > 0.0 { y * (-ALPHA * (1.0 - y / y_max)).exp().min(1.0) } else { 0.0 };
    let kept: Vec<(f64, f64)> = curve.iter().copied().filter(|&(_, y)| y >= first_y - MAX_LOST_POINTS).collect();
    let area = |pair: &[(f64, f64)]| (pair[1].0 - pair[0].0) * (weighted(pair[1].1) + weighted(pair[0].1)) / 2.0;
    (first_rho * first_y + kept.windows(2).map(area).sum::<f64>(), kept.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aup_agrees_with_a_computation_by_hand() {
        // The last point lost more than 5 points, so it does not count.
        // W(80) = 1, W(78) = exp(-3 · 2/80) = 0.927743.
        let curve = [(1.0, 80.0), (2.0, 80.0), (4.0, 78.0), (5.0, 70.0)];
        let by_hand = 1.0 * 80.0 + 1.0 * 80.0 + 2.0 * (80.0 + 78.0 * 0.927_743_486) / 2.0;
        let (area, points) = aup(&curve, 80.0);
        assert!((area - by_hand).abs() < 1e-4 && points == 3, "{area} {by_hand}");
        // If another model has 90 %, W(80) = exp(-1/3) = 0.716531, W(78) = exp(-0.4) = 0.670320;
        // the first rectangle has no weight.
        let by_hand = 80.0 + 80.0 * 0.716_531_311 + (80.0 * 0.716_531_311 + 78.0 * 0.670_320_046);
        assert!((aup(&curve, 90.0).0 - by_hand).abs() < 1e-4);
        assert_eq!(aup(&curve[..1], 80.0), (80.0, 1));
        assert_eq!(aup(&[(1.0, 0.0), (2.0, 0.0)], 0.0), (0.0, 2));
    }
}
