//! The charts of a run, in the order in which the report shows them.
//!
//! To add a chart, write a function that makes a [`Chart`] with a primitive of [`crate::svg`], and
//! call it in [`charts`].

use serde::Serialize;

use super::run::Run;
use crate::acceptance::Acceptance;
use crate::records::{Records, SpeedRecord};
use crate::results::{Results, StrategyResults, Throughput};
use crate::role::Role;
use crate::svg::{Bar, Scale, ScatterPoint, Series, bars, lines, scatter};
use crate::table::format_number;
use crate::tradeoff::Tradeoff;

/// Number of bars of a histogram; the last one also counts everything above it.
const MAX_HISTOGRAM_BARS: usize = 12;
/// Number of answers, ordered by length, whose speeds are averaged into one point.
const ANSWERS_PER_POINT: usize = 10;

#[derive(Debug, Serialize)]
pub(super) struct Chart {
    title: String,
    svg: String,
}

impl Chart {
    /// `draw` gets the title, which the SVG needs for screen readers.
    fn new(title: impl Into<String>, draw: impl FnOnce(&str) -> String) -> Self {
        let title = title.into();
        Chart { svg: draw(&title), title }
    }
}

/// Every chart that the run has the measurements for.
pub(super) fn charts(run: &Run, tradeoff: Option<&Tradeoff>) -> Vec<Chart> {
    let entries: Vec<Entry<'_>> = run.results.strategies().map(|(role, results)| Entry { role, results }).collect();
    let accepted: Vec<(&Entry<'_>, &Acceptance)> = entries
        .iter()
        .filter_map(|entry| Some((entry, entry.results.acceptance.as_ref()?)))
        .filter(|(_, acceptance)| !acceptance.forwards.is_empty())
        .collect();
    let mut charts = Vec::new();
    charts.extend(tradeoff.map(|tradeoff| accuracy_against_speed(tradeoff, over(&run.results))));
    charts.extend(tokens_per_second(&entries));
    charts.extend(speedup_against_concurrency(&run.results));
    charts.push(tokens_per_forward(&entries));
    charts.extend(accepted.iter().map(|&(entry, acceptance)| accepted_per_forward(entry, acceptance)));
    charts.extend(accepted_by_window_position(&accepted));
    charts.extend(tokens_per_forward_over_answer(&accepted));
    charts.extend(run.records.as_ref().and_then(tokens_per_second_by_length));
    charts
}

/// A model and a strategy of the run.
struct Entry<'r> {
    role: Role,
    results: &'r StrategyResults,
}

impl Entry<'_> {
    fn name(&self) -> String {
        format!("{} {}", self.role, self.results.label)
    }

    /// The CSS class that colours it.
    fn class(&self) -> &'static str {
        self.role.name()
    }
}

/// Names the speed-up and its baseline.
fn over(results: &Results) -> &'static str {
    if results.model(Role::Teacher).is_some() {
        "speed-up over the teacher's AR"
    } else {
        "speed-up over the model's own AR"
    }
}

/// The x axis is the speed-up if every point was timed, and tokens per forward if not.
fn accuracy_against_speed(tradeoff: &Tradeoff, over: &'static str) -> Chart {
    let timed = tradeoff.points.iter().all(|point| point.speedup.is_some());
    let x_name = if timed { over } else { "tokens per forward" };
    let points: Vec<ScatterPoint> = tradeoff
        .points
        .iter()
        .map(|point| ScatterPoint {
            label: format!("{} {}", point.role, point.strategy),
            class: point.role.name(),
            x: point.speedup.filter(|_| timed).unwrap_or(point.tokens_per_forward),
            y: 100.0 * point.accuracy,
            interval: point.ci95.map(|ends| ends.map(|end| 100.0 * end)),
        })
        .collect();
    Chart::new("Accuracy (95 % interval) against speed", |title| scatter(title, [x_name, "accuracy, %"], &points))
}

fn tokens_per_second(entries: &[Entry<'_>]) -> Option<Chart> {
    let measured = entries.iter().any(|entry| entry.results.tokens_per_second.is_some());
    measured.then(|| {
        let title = "Tokens per second at batch 1, excluding prefill";
        bar_per_entry(title, entries, |results| results.tokens_per_second, 1)
    })
}

/// Over the teacher's autoregressive decoding with as many rows, or over that of the only model.
fn speedup_against_concurrency(results: &Results) -> Option<Chart> {
    let mut series = Vec::new();
    for model in &results.models {
        for (dash, figures) in model.strategies.iter().enumerate() {
            let batches = figures.concurrency.iter().flatten();
            let speedup = |batch: &Throughput| batch.speedup_vs_teacher_ar.or(batch.speedup_vs_student_ar);
            series.push(Series {
                label: format!("{} {}", model.model.role, figures.label),
                class: model.model.role.name(),
                dash,
                points: batches.filter_map(|batch| Some((batch.concurrency as f64, speedup(batch)?))).collect(),
            });
        }
    }
    series.retain(|line| !line.points.is_empty());
    (!series.is_empty()).then(|| {
        Chart::new("Speed-up with as many rows, excluding prefill", |title| {
            let axes = [("rows (answers decoded at once)", Scale::Logarithmic), (over(results), Scale::FromZero)];
            lines(title, axes, &series)
        })
    })
}

fn tokens_per_forward(entries: &[Entry<'_>]) -> Chart {
    bar_per_entry("Tokens per forward", entries, |results| results.tokens_per_forward, 2)
}

fn bar_per_entry(
    title: &str,
    entries: &[Entry<'_>],
    value: fn(&StrategyResults) -> Option<f64>,
    digits: usize,
) -> Chart {
    let rows: Vec<Bar> = entries
        .iter()
        .map(|entry| Bar {
            label: entry.name(),
            class: entry.class(),
            value: value(entry.results),
            interval: None,
            text: format_number(value(entry.results), digits, ""),
        })
        .collect();
    Chart::new(title, |title| bars(title, &rows))
}

/// How many of the forwards accepted 1, 2, 3 ... tokens.
fn accepted_per_forward(entry: &Entry<'_>, acceptance: &Acceptance) -> Chart {
    let num_bars = MAX_HISTOGRAM_BARS.min(acceptance.forwards.len());
    let total = acceptance.forwards.iter().sum::<u64>().max(1) as f64;
    let rows: Vec<Bar> = (0..num_bars)
        .map(|index| {
            let is_last = index + 1 == num_bars;
            let counts = if is_last { &acceptance.forwards[index..] } else { &acceptance.forwards[index..=index] };
            let percent = 100.0 * counts.iter().sum::<u64>() as f64 / total;
            let or_more = if is_last && counts.len() > 1 { " or more" } else { "" };
            Bar {
                label: format!("{}{or_more}", index + 1),
                class: entry.class(),
                value: Some(percent),
                interval: None,
                text: format!("{percent:.1} %"),
            }
        })
        .collect();
    Chart::new(format!("Tokens accepted per forward: {}", entry.name()), |title| bars(title, &rows))
}

fn accepted_by_window_position(accepted: &[(&Entry<'_>, &Acceptance)]) -> Option<Chart> {
    let series = line_per_entry(accepted, |acceptance| {
        let fractions = acceptance.by_position.iter().enumerate();
        fractions.map(|(index, &fraction)| (index as f64 + 1.0, 100.0 * fraction)).collect()
    });
    (!series.is_empty()).then(|| {
        Chart::new("Draft tokens accepted, by position in the window", |title| {
            let axes = [("position in the window", Scale::Linear), ("forwards that accepted it, %", Scale::FromZero)];
            lines(title, axes, &series)
        })
    })
}

fn tokens_per_forward_over_answer(accepted: &[(&Entry<'_>, &Acceptance)]) -> Option<Chart> {
    let series = line_per_entry(accepted, |acceptance| {
        let reached = acceptance.over_answer.iter().filter(|stretch| stretch.forwards > 0);
        reached.map(|stretch| (stretch.start as f64, stretch.tokens as f64 / stretch.forwards as f64)).collect()
    });
    (!series.is_empty()).then(|| {
        Chart::new("Tokens per forward, by position in the answer", |title| {
            let axes = [("position in the answer (tokens)", Scale::Linear), ("tokens per forward", Scale::FromZero)];
            lines(title, axes, &series)
        })
    })
}

/// Strategies of one model share its colour and differ in their dashes.
fn line_per_entry(
    accepted: &[(&Entry<'_>, &Acceptance)],
    points: impl Fn(&Acceptance) -> Vec<(f64, f64)>,
) -> Vec<Series> {
    let same_role = |index: usize, role: Role| accepted[..index].iter().filter(|(entry, _)| entry.role == role).count();
    accepted
        .iter()
        .enumerate()
        .map(|(index, &(entry, acceptance))| Series {
            label: entry.name(),
            class: entry.class(),
            dash: same_role(index, entry.role),
            points: points(acceptance),
        })
        .collect()
}

fn tokens_per_second_by_length(records: &Records) -> Option<Chart> {
    let header = &records.header;
    let mut series = Vec::new();
    for model in &header.models {
        for (dash, strategy) in header.settings.strategies_of(model.role).enumerate() {
            let label = format!("{} {strategy}", model.role);
            let timed = records.speeds_of(model.role, strategy).collect();
            series.push(Series { label, class: model.role.name(), dash, points: speed_by_length(timed) });
        }
    }
    series.iter().any(|line| !line.points.is_empty()).then(|| {
        Chart::new("Tokens per second at batch 1, by answer length", |title| {
            lines(title, [("answer length (tokens)", Scale::Linear), ("tokens/s", Scale::FromZero)], &series)
        })
    })
}

/// Mean length and tokens per second of groups of answers that are similarly long.
fn speed_by_length(mut timed: Vec<&SpeedRecord>) -> Vec<(f64, f64)> {
    timed.sort_by_key(|speed| speed.tokens);
    timed
        .chunks(ANSWERS_PER_POINT)
        .filter_map(|group| {
            let tokens = group.iter().map(|speed| speed.tokens).sum::<usize>() as f64;
            let seconds: f64 = group.iter().map(|speed| speed.seconds).sum();
            (seconds > 0.0).then(|| (tokens / group.len() as f64, tokens / seconds))
        })
        .collect()
}
