//! `tradeoff`: accuracy against parallelism over checkpoints and strategies, the Pareto front, and one figure for each
//! checkpoint's curve.

use std::path::PathBuf;

use cllm_core::task::Task;
use cllm_core::{Error, Result, progress};
use serde::Serialize;

use crate::records::SCHEMA_VERSION;
use crate::results::Results;
use crate::role::Role;
use crate::table::{self, number};

/// How hard a loss of accuracy weighs in AUP.
const ALPHA: f64 = 3.0;
/// Points of accuracy below the curve's first point from which on a point has no part in AUP.
const MOST_POINTS_LOST: f64 = 5.0;

/// What checkpoints and strategies of one benchmark give against each other.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tradeoff {
    /// Version of this document.
    pub schema_version: u32,
    /// What was answered.
    pub benchmark: Task,
    /// Which split.
    pub split: String,
    /// How many examples.
    pub examples: usize,
    /// By checkpoint as they were given, and in it from few tokens per forward to many.
    pub points: Vec<Point>,
    /// Of every checkpoint, in the order of the points.
    pub aup: Vec<Aup>,
}

/// A checkpoint and a strategy.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// The model's folder.
    pub checkpoint: String,
    /// Of its config and weights: what tells checkpoints apart.
    pub fingerprint: String,
    /// What it was in its run.
    pub role: Role,
    /// The strategy with its settings, as people read it.
    pub strategy: String,
    pub max_tokens_per_forward: usize,
    /// Share of right answers.
    pub accuracy: f64,
    /// Its 95 % interval.
    pub ci95: Option<[f64; 2]>,
    /// Tokens per forward.
    pub tokens_per_forward: f64,
    /// Tokens per second at batch 1.
    pub tokens_per_second: Option<f64>,
    /// These over the autoregressive ones of the run's teacher, or of the model itself in a run without a teacher.
    pub speedup: Option<f64>,
    /// Whether no other point is better in accuracy or tokens per forward without being worse in the other.
    pub on_front: bool,
}

/// The area under a checkpoint's curve.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Aup {
    /// The model's folder.
    pub checkpoint: String,
    /// Of its config and weights.
    pub fingerprint: String,
    /// See [`aup`]; it grows with parallelism as long as accuracy is kept.
    pub aup: f64,
    /// Points that it is over.
    pub points: usize,
}

/// Reads results (files, or the folders that hold them) and puts their points beside each other.
///
/// # Errors
/// When one is no results file, or they measured different things; when no answer was scored.
pub fn read(paths: &[PathBuf]) -> Result<Tradeoff> {
    let results: Vec<Results> = paths.iter().map(|path| Results::read(path)).collect::<Result<_>>()?;
    for (path, other) in paths.iter().zip(&results).skip(1) {
        expect_alike(&results[0], other).map_err(|difference| {
            Error::file(path, format!("{difference}: points of one figure need the same examples and settings"))
        })?;
    }
    Tradeoff::of(&results).ok_or_else(|| Error::usage("no answer of these results was scored: nothing to compare"))
}

/// What must be the same for points to stand in one figure; the difference in words.
fn expect_alike(first: &Results, other: &Results) -> std::result::Result<(), String> {
    let differs = |what: &str, here: String, there: String| match here == there {
        true => Ok(()),
        false => Err(format!("has {what} {here}, the first results have {there}")),
    };
    differs("benchmark", other.benchmark.name().into(), first.benchmark.name().into())?;
    differs("split", other.split.clone(), first.split.clone())?;
    differs("a number of examples of", other.examples.to_string(), first.examples.to_string())?;
    let (here, there) = (&other.settings, &first.settings);
    differs("max_new_tokens", here.max_new_tokens.to_string(), there.max_new_tokens.to_string())?;
    differs("temperature", here.temperature.to_string(), there.temperature.to_string())
}

impl Tradeoff {
    /// As people read it in the terminal.
    pub fn text(&self) -> String {
        let heads =
            ["checkpoint", "", "strategy", "accuracy (95 %)", "tokens/forward", "tokens/s", "speed-up", "Pareto front"];
        let rows = self.points.iter().map(|point| {
            vec![
                point.checkpoint.clone(),
                point.role.name().to_owned(),
                point.strategy.clone(),
                table::accuracy(Some(point.accuracy), point.ci95),
                number(Some(point.tokens_per_forward), 2, ""),
                number(point.tokens_per_second, 1, ""),
                number(point.speedup, 2, "x"),
                if point.on_front { "*" } else { "" }.to_owned(),
            ]
        });
        let mut text = table::drawn(&heads, 3, rows);
        text += &format!("{} examples of {} / {}\n", self.examples, self.benchmark.name(), self.split);
        for Aup { checkpoint, aup, points, .. } in &self.aup {
            text += &format!("AUP of {checkpoint}: {aup:.1}, over {points} points\n");
        }
        text
    }

    /// Puts the points of results beside each other that measured the same; none where nothing was scored. A checkpoint and
    /// strategy that several results hold counts once, as in the first of them.
    pub fn of(results: &[Results]) -> Option<Self> {
        let first = results.first()?;
        let mut points: Vec<Point> = Vec::new();
        for point in results.iter().flat_map(points_of) {
            let same = |other: &Point| other.fingerprint == point.fingerprint && other.strategy == point.strategy;
            if points.iter().any(same) {
                progress::log(format!("{} {} was measured before: left out", point.checkpoint, point.strategy));
            } else {
                points.push(point);
            }
        }
        let mut checkpoints: Vec<String> = Vec::new();
        for point in &points {
            if !checkpoints.contains(&point.fingerprint) {
                checkpoints.push(point.fingerprint.clone());
            }
        }
        let place = |point: &Point| checkpoints.iter().position(|fingerprint| *fingerprint == point.fingerprint);
        points.sort_by(|a, b| {
            let parallelism = a.tokens_per_forward.total_cmp(&b.tokens_per_forward);
            place(a).cmp(&place(b)).then(parallelism).then(b.accuracy.total_cmp(&a.accuracy))
        });
        mark_front(&mut points);
        let best = points.iter().map(|point| point.accuracy).reduce(f64::max)?;
        let curves = points.chunk_by(|a, b| a.fingerprint == b.fingerprint).map(|curve| {
            let pairs: Vec<(f64, f64)> =
                curve.iter().map(|point| (point.tokens_per_forward, 100.0 * point.accuracy)).collect();
            let (area, points) = aup(&pairs, 100.0 * best);
            let Point { checkpoint, fingerprint, .. } = &curve[0];
            Aup { checkpoint: checkpoint.clone(), fingerprint: fingerprint.clone(), aup: area, points }
        });
        let aup = curves.collect();
        let (split, examples) = (first.split.clone(), first.examples);
        Some(Tradeoff { schema_version: SCHEMA_VERSION, benchmark: first.benchmark, split, examples, points, aup })
    }
}

/// The scored points of one run.
fn points_of(results: &Results) -> impl Iterator<Item = Point> {
    results.models.iter().flat_map(|model| {
        model.strategies.iter().filter_map(|found| {
            Some(Point {
                checkpoint: model.model.path.clone(),
                fingerprint: model.model.fingerprint.clone(),
                role: model.model.role,
                strategy: found.label.clone(),
                max_tokens_per_forward: found.max_tokens_per_forward,
                accuracy: found.accuracy?,
                ci95: found.ci95,
                tokens_per_forward: found.tokens_per_forward?,
                tokens_per_second: found.tokens_per_second,
                speedup: found.speedup_vs_teacher_ar.or(found.speedup_vs_student_ar),
                on_front: false,
            })
        })
    })
}

fn mark_front(points: &mut [Point]) {
    let figures: Vec<(f64, f64)> = points.iter().map(|point| (point.accuracy, point.tokens_per_forward)).collect();
    for (point, &(accuracy, parallelism)) in points.iter_mut().zip(&figures) {
        let better = |&(other, more): &(f64, f64)| {
            other >= accuracy && more >= parallelism && (other > accuracy || more > parallelism)
        };
        point.on_front = !figures.iter().any(better);
    }
}

/// Accuracy under parallelism, and how many points it is over: the area under the curve of accuracy (in percent) over
/// tokens per forward, weighted by quality.
///
/// `curve` holds pairs `(ρ, y)` from few tokens per forward to many, `y_max` is the best accuracy of all that is compared.
/// With `W(y) = min(exp(-3 (1 - y / y_max)), 1)` over the points with `y >= y_1 - 5`,
///
/// `AUP = ρ_1 y_1 + Σ_{i >= 2} (ρ_i - ρ_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2`.
///
/// The definition is that of d3LLM (arXiv 2601.07568; `aup_utils.py` of the hao-ai-lab's leaderboard computes it). That
/// program refuses a curve whose last point lost more than 5 points; here such points have no part, as in the definition.
pub fn aup(curve: &[(f64, f64)], y_max: f64) -> (f64, usize) {
    let Some(&(first_rho, first_y)) = curve.first() else { return (0.0, 0) };
    let weighted = |y: f64| if y > 0.0 { y * (-ALPHA * (1.0 - y / y_max)).exp().min(1.0) } else { 0.0 };
    let kept: Vec<(f64, f64)> = curve.iter().copied().filter(|&(_, y)| y >= first_y - MOST_POINTS_LOST).collect();
    let area = |pair: &[(f64, f64)]| (pair[1].0 - pair[0].0) * (weighted(pair[1].1) + weighted(pair[0].1)) / 2.0;
    (first_rho * first_y + kept.windows(2).map(area).sum::<f64>(), kept.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aup_is_what_it_is_by_hand() {
        // The last point lost more than 5 points: no part. W(80) = 1, W(78) = exp(-3 · 2/80) = 0.927743.
        let curve = [(1.0, 80.0), (2.0, 80.0), (4.0, 78.0), (5.0, 70.0)];
        let by_hand = 1.0 * 80.0 + 1.0 * 80.0 + 2.0 * (80.0 + 78.0 * 0.927_743_486) / 2.0;
        let (area, points) = aup(&curve, 80.0);
        assert!((area - by_hand).abs() < 1e-4 && points == 3, "{area} {by_hand}");
        // Where another model has 90 %, W(80) = exp(-1/3) = 0.716531, W(78) = exp(-0.4) = 0.670320; the first rectangle has no weight.
        let by_hand = 80.0 + 80.0 * 0.716_531_311 + (80.0 * 0.716_531_311 + 78.0 * 0.670_320_046);
        assert!((aup(&curve, 90.0).0 - by_hand).abs() < 1e-4);
        assert_eq!(aup(&curve[..1], 80.0), (80.0, 1));
        assert_eq!(aup(&[(1.0, 0.0), (2.0, 0.0)], 0.0), (0.0, 2));
    }
}
