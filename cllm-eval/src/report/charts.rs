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

/// Largest number of accepted tokens in the chart of forwards; it also counts everything above it.
const MAX_ACCEPTED: usize = 16;
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
    let entries = entries(&run.results);
    let accepted: Vec<(&Entry<'_>, &Acceptance)> = entries
        .iter()
        .filter_map(|entry| Some((entry, entry.results.acceptance.as_ref()?)))
        .filter(|(_, acceptance)| !acceptance.forwards.is_empty())
        .collect();
    let mut charts = Vec::new();
    charts.extend(tradeoff.map(|tradeoff| accuracy_against_speed(tradeoff, over(&run.results))));
    charts.extend(tokens_per_second(&entries));
    charts.extend(tokens_per_second_in_batches(&run.results, &entries));
    charts.extend(speedup_against_concurrency(&run.results, &entries));
    charts.push(tokens_per_forward(&entries));
    charts.extend(accepted_per_forward(&accepted));
    charts.extend(accepted_by_window_position(&accepted));
    charts.extend(tokens_per_forward_over_answer(&accepted));
    charts.extend(run.records.as_ref().and_then(|records| tokens_per_second_by_length(records, &entries)));
    charts
}

/// The chart of accuracy against speed, for a file of its own.
pub(super) fn tradeoff_svg(run: &Run) -> Option<String> {
    let tradeoff = Tradeoff::from_results(std::slice::from_ref(&run.results))?;
    Some(accuracy_against_speed(&tradeoff, over(&run.results)).svg)
}

/// A model and a strategy of the run.
struct Entry<'r> {
    role: Role,
    results: &'r StrategyResults,
    /// Number of the strategy, which has the same line style for both models in all charts.
    style: usize,
}

fn entries(results: &Results) -> Vec<Entry<'_>> {
    let mut labels: Vec<&str> = Vec::new();
    let mut entries = Vec::new();
    for (role, figures) in results.strategies() {
        let known = labels.iter().position(|label| *label == figures.label);
        let style = known.unwrap_or_else(|| {
            labels.push(&figures.label);
            labels.len() - 1
        });
        entries.push(Entry { role, results: figures, style });
    }
    entries
}

impl Entry<'_> {
    fn name(&self) -> String {
        format!("{} {}", self.role, self.results.label)
    }

    /// The CSS class that colours it.
    fn class(&self) -> &'static str {
        self.role.name()
    }

    /// A line of the model's colour and the strategy's style.
    fn line(&self, points: Vec<(f64, f64)>) -> Series {
        Series { label: self.name(), class: self.class(), dash: self.style, points }
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

/// Speeds of the batches in which accuracy was measured.
fn tokens_per_second_in_batches(results: &Results, entries: &[Entry<'_>]) -> Option<Chart> {
    let measured = entries.iter().any(|entry| entry.results.batched_tokens_per_second.is_some());
    measured.then(|| {
        let title = format!("Tokens per second in batches of up to {}, including prefill", results.settings.batch_size);
        bar_per_entry(&title, entries, |results| results.batched_tokens_per_second, 1)
    })
}

/// Over autoregressive decoding of the baseline with as many rows.
fn speedup_against_concurrency(results: &Results, entries: &[Entry<'_>]) -> Option<Chart> {
    let line = |entry: &Entry<'_>| {
        let batches = entry.results.concurrency.iter().flatten();
        let speedup = |batch: &Throughput| batch.speedup_vs_teacher_ar.or(batch.speedup_vs_student_ar);
        entry.line(batches.filter_map(|batch| Some((batch.concurrency as f64, speedup(batch)?))).collect())
    };
    let series: Vec<Series> = entries.iter().map(line).filter(|line| !line.points.is_empty()).collect();
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

/// How many of the forwards accepted 1, 2, 3 ... tokens, for all models and strategies on one scale.
fn accepted_per_forward(accepted: &[(&Entry<'_>, &Acceptance)]) -> Option<Chart> {
    let max_tokens = accepted.iter().map(|(_, acceptance)| acceptance.forwards.len()).max()?;
    let points = |acceptance: &Acceptance| {
        let total = acceptance.forwards.iter().sum::<u64>().max(1) as f64;
        let percent = |tokens: usize| {
            let last = if tokens == MAX_ACCEPTED { usize::MAX } else { tokens };
            let counted =
                acceptance.forwards.iter().enumerate().filter(|(index, _)| (tokens..=last).contains(&(index + 1)));
            100.0 * counted.map(|(_, count)| count).sum::<u64>() as f64 / total
        };
        (1..=acceptance.forwards.len().min(MAX_ACCEPTED)).map(|tokens| (tokens as f64, percent(tokens))).collect()
    };
    let x_name = if max_tokens > MAX_ACCEPTED { "tokens accepted (16: or more)" } else { "tokens accepted" };
    let series = line_per_entry(accepted, points);
    Some(Chart::new("Forwards, by the number of tokens that they accepted", |title| {
        lines(title, [(x_name, Scale::Linear), ("forwards, %", Scale::FromZero)], &series)
    }))
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

fn line_per_entry(
    accepted: &[(&Entry<'_>, &Acceptance)],
    points: impl Fn(&Acceptance) -> Vec<(f64, f64)>,
) -> Vec<Series> {
    accepted.iter().map(|&(entry, acceptance)| entry.line(points(acceptance))).collect()
}

fn tokens_per_second_by_length(records: &Records, entries: &[Entry<'_>]) -> Option<Chart> {
    let line = |entry: &Entry<'_>| {
        entry.line(speed_by_length(records.speeds_of(entry.role, entry.results.strategy).collect()))
    };
    let series: Vec<Series> = entries.iter().map(line).filter(|line| !line.points.is_empty()).collect();
    (!series.is_empty()).then(|| {
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
