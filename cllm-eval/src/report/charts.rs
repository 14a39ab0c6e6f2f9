//! The charts of a run, in the order in which the report shows them.
//!
//! To add a chart, write a function that makes a [`Chart`] with a primitive of [`crate::svg`], and
//! call it in [`charts`].

use cllm_core::decode::Strategy;
use serde::Serialize;

use super::run::Run;
use crate::acceptance::Acceptance;
use crate::records::{Records, SpeedRecord};
use crate::results::{Results, StrategyResults, Throughput};
use crate::role::Role;
use crate::svg::{Bar, NUM_DASHES, Scale, ScatterPoint, Series, bars, lines, scatter};
use crate::table::{format_number, format_speed};
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
    let lined = Lined::new(&run.results, &entries);
    let mut charts = Vec::new();
    charts.extend(tradeoff.map(|tradeoff| accuracy_against_speed(tradeoff, over(&run.results))));
    charts.extend(tokens_per_second(&entries));
    charts.push(tokens_per_forward(&entries));
    charts.extend(speedup_against_concurrency(&run.results, &lined));
    charts.extend(accepted_per_forward(&lined));
    charts.extend(accepted_by_window_position(&lined));
    charts.extend(tokens_per_forward_over_answer(&lined));
    charts.extend(run.records.as_ref().and_then(|records| tokens_per_second_by_length(records, &lined)));
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
}

fn entries(results: &Results) -> Vec<Entry<'_>> {
    results.strategies().map(|(role, figures)| Entry { role, results: figures }).collect()
}

/// What charts draw as lines: the baseline and the fastest strategies, as many as there are line
/// styles.
struct Lined<'r> {
    /// Entries with their line style, which is the same for both models in all charts.
    entries: Vec<(&'r Entry<'r>, usize)>,
    /// Ends a chart's title where strategies have no line.
    note: String,
}

impl<'r> Lined<'r> {
    fn new(results: &Results, entries: &'r [Entry<'r>]) -> Self {
        let mut labels: Vec<&str> = Vec::new();
        for entry in entries {
            if !labels.contains(&entry.results.label.as_str()) {
                labels.push(&entry.results.label);
            }
        }
        let num_labels = labels.len();
        let is_timed = results.strategies().all(|(_, figures)| figures.tokens_per_second.is_some());
        let speed = |label: &str| {
            let of = entries.iter().filter(|entry| entry.results.label == label).map(|entry| entry.results);
            let speeds = of.map(|of| if is_timed { of.tokens_per_second } else { of.tokens_per_forward });
            speeds.flatten().fold(0.0, f64::max)
        };
        let baseline = entries.iter().find(|entry| entry.results.strategy == Strategy::Ar);
        let is_baseline = |label: &str| baseline.is_some_and(|entry| entry.results.label == label);
        let mut kept = labels.clone();
        kept.sort_by(|a, b| is_baseline(b).cmp(&is_baseline(a)).then(speed(b).total_cmp(&speed(a))));
        kept.truncate(NUM_DASHES);
        labels.retain(|label| kept.contains(label));
        let style = |entry: &Entry<'_>| labels.iter().position(|label| *label == entry.results.label);
        let left_out = num_labels > labels.len();
        Lined {
            entries: entries.iter().filter_map(|entry| Some((entry, style(entry)?))).collect(),
            note: match (left_out, baseline) {
                (false, _) => String::new(),
                (true, None) => format!("; the {} fastest of {num_labels} strategies", labels.len()),
                (true, Some(_)) => {
                    format!("; the {} fastest of {} strategies besides the baseline", labels.len() - 1, num_labels - 1)
                }
            },
        }
    }

    /// A chart of a line for each entry that has points.
    fn chart(
        &self,
        title: &str,
        axes: [(&'static str, Scale); 2],
        points: impl Fn(&Entry<'_>) -> Option<Vec<(f64, f64)>>,
    ) -> Option<Chart> {
        let line = |&(entry, style): &(&Entry<'_>, usize)| Some(entry.line(style, points(entry)?));
        let series: Vec<Series> = self.entries.iter().filter_map(line).collect();
        let draw = |title: &str| lines(title, axes, &series);
        (!series.is_empty()).then(|| Chart::new(format!("{title}{}", self.note), draw))
    }
}

impl Entry<'_> {
    fn name(&self) -> String {
        format!("{} {}", self.role, self.results.label)
    }

    /// The CSS class that colours it.
    fn class(&self) -> &'static str {
        self.role.name()
    }

    /// A line of the model's colour.
    fn line(&self, style: usize, points: Vec<(f64, f64)>) -> Series {
        Series { label: self.name(), class: self.class(), dash: style, points }
    }

    fn acceptance(&self) -> Option<&Acceptance> {
        self.results.acceptance.as_ref().filter(|acceptance| !acceptance.forwards.is_empty())
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
        bar_per_entry(title, entries, |results| results.tokens_per_second, format_speed)
    })
}

/// Over autoregressive decoding of the baseline with as many rows.
fn speedup_against_concurrency(results: &Results, lined: &Lined<'_>) -> Option<Chart> {
    let axes = [("answers decoded at once", Scale::Logarithmic), ("speed-up, excluding prefill", Scale::FromZero)];
    let title = format!("{}, by answers decoded at once", over(results).replacen("speed-up", "Speed-up", 1));
    lined.chart(&title, axes, |entry| {
        let batches = entry.results.concurrency.iter().flatten();
        let speedup = |batch: &Throughput| batch.speedup_vs_teacher_ar.or(batch.speedup_vs_student_ar);
        let points: Vec<_> = batches.filter_map(|batch| Some((batch.concurrency as f64, speedup(batch)?))).collect();
        (!points.is_empty()).then_some(points)
    })
}

fn tokens_per_forward(entries: &[Entry<'_>]) -> Chart {
    bar_per_entry(
        "Tokens per forward",
        entries,
        |results| results.tokens_per_forward,
        |value| format_number(value, 2, ""),
    )
}

fn bar_per_entry(
    title: &str,
    entries: &[Entry<'_>],
    value: fn(&StrategyResults) -> Option<f64>,
    format: fn(Option<f64>) -> String,
) -> Chart {
    let rows: Vec<Bar> = entries
        .iter()
        .map(|entry| Bar {
            label: entry.name(),
            class: entry.class(),
            value: value(entry.results),
            interval: None,
            text: format(value(entry.results)),
        })
        .collect();
    Chart::new(title, |title| bars(title, &rows))
}

/// How many of the forwards accepted 1, 2, 3 ... tokens, for all models and strategies on one scale.
fn accepted_per_forward(lined: &Lined<'_>) -> Option<Chart> {
    let lengths = lined.entries.iter().filter_map(|(entry, _)| Some(entry.acceptance()?.forwards.len()));
    let x_name = if lengths.max()? > MAX_ACCEPTED { "tokens accepted (16: or more)" } else { "tokens accepted" };
    let axes = [(x_name, Scale::Between), ("forwards, %", Scale::FromZero)];
    lined.chart("Forwards, by the number of tokens that they accepted", axes, |entry| {
        let forwards = &entry.acceptance()?.forwards;
        let total = forwards.iter().sum::<u64>().max(1) as f64;
        let percent = |tokens: usize| {
            let last = if tokens == MAX_ACCEPTED { usize::MAX } else { tokens };
            let counted = forwards.iter().enumerate().filter(|(index, _)| (tokens..=last).contains(&(index + 1)));
            100.0 * counted.map(|(_, count)| count).sum::<u64>() as f64 / total
        };
        Some((1..=forwards.len().min(MAX_ACCEPTED)).map(|tokens| (tokens as f64, percent(tokens))).collect())
    })
}

fn accepted_by_window_position(lined: &Lined<'_>) -> Option<Chart> {
    let axes = [("position in the window", Scale::Between), ("forwards that accepted it, %", Scale::FromZero)];
    lined.chart("Draft tokens accepted, by position in the window", axes, |entry| {
        let fractions = entry.acceptance()?.by_position.iter().enumerate();
        Some(fractions.map(|(index, &fraction)| (index as f64 + 1.0, 100.0 * fraction)).collect())
    })
}

fn tokens_per_forward_over_answer(lined: &Lined<'_>) -> Option<Chart> {
    let axes = [("position in the answer (tokens)", Scale::Between), ("tokens per forward", Scale::FromZero)];
    lined.chart("Tokens per forward, by position in the answer", axes, |entry| {
        let reached = entry.acceptance()?.over_answer.iter().filter(|stretch| stretch.forwards > 0);
        Some(reached.map(|stretch| (stretch.start as f64, stretch.tokens as f64 / stretch.forwards as f64)).collect())
    })
}

fn tokens_per_second_by_length(records: &Records, lined: &Lined<'_>) -> Option<Chart> {
    let axes = [("answer length (tokens)", Scale::Between), ("tokens/s", Scale::FromZero)];
    lined.chart("Tokens per second at batch 1, by answer length", axes, |entry| {
        let points = speed_by_length(records.speeds_of(entry.role, entry.results.strategy).collect());
        // One point says nothing about length.
        (points.len() > 1).then_some(points)
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
