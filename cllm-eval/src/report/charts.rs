//! The charts of a run.

use serde::Serialize;

use super::Run;
use crate::acceptance::Acceptance;
use crate::records::Records;
use crate::results::StrategyResults;
use crate::role::Role;
use crate::svg::{Bar, Dot, Series, bars, lines, scatter};
use crate::table::format_number;
use crate::tradeoff::Tradeoff;

/// Bars of the histogram; longer runs of tokens count in its last.
const HISTOGRAM_BARS: usize = 12;
/// Answers of neighbouring lengths that stand for a point.
const LENGTH_GROUP: usize = 10;

#[derive(Debug, Serialize)]
pub(super) struct Chart {
    title: String,
    svg: String,
}

impl Chart {
    fn new(title: impl Into<String>, draw: impl FnOnce(&str) -> String) -> Self {
        let title = title.into();
        Chart { svg: draw(&title), title }
    }
}

type Found<'r> = (Role, &'r StrategyResults);

/// Every chart that the run has figures for.
pub(super) fn charts(run: &Run, tradeoff: Option<&Tradeoff>) -> Vec<Chart> {
    let models = run.results.models.iter();
    let found: Vec<Found<'_>> =
        models.flat_map(|model| model.strategies.iter().map(move |strategy| (model.model.role, strategy))).collect();
    let mut charts = Vec::new();
    charts.extend(tradeoff.map(speed_and_accuracy));
    if found.iter().any(|(_, strategy)| strategy.tokens_per_second.is_some()) {
        let rate = |strategy: &StrategyResults| strategy.tokens_per_second;
        charts.push(bars_of("Tokens per second at batch 1, without prefill", &found, rate, 1));
    }
    charts.push(bars_of("Tokens per forward", &found, |strategy| strategy.tokens_per_forward, 2));
    charts.extend(acceptance(&found));
    charts.extend(run.records.as_ref().and_then(by_length));
    charts
}

fn name(role: Role, label: &str) -> String {
    format!("{} {label}", role.name())
}

/// Speed-up where it was measured, tokens per forward where not, against accuracy.
fn speed_and_accuracy(tradeoff: &Tradeoff) -> Chart {
    let timed = tradeoff.points.iter().all(|point| point.speedup.is_some());
    let axis = if timed { "speed-up over the teacher's AR" } else { "tokens per forward" };
    let dots: Vec<Dot> = tradeoff
        .points
        .iter()
        .map(|point| Dot {
            label: name(point.role, &point.strategy),
            class: point.role.name(),
            at: (point.speedup.filter(|_| timed).unwrap_or(point.tokens_per_forward), 100.0 * point.accuracy),
            interval: point.ci95.map(|ends| ends.map(|end| 100.0 * end)),
        })
        .collect();
    Chart::new("Speed against accuracy, with its 95 % interval", |title| scatter(title, [axis, "accuracy, %"], &dots))
}

fn bars_of(title: &str, found: &[Found<'_>], figure: fn(&StrategyResults) -> Option<f64>, digits: usize) -> Chart {
    let rows: Vec<Bar> = found
        .iter()
        .map(|&(role, strategy)| Bar {
            label: name(role, &strategy.label),
            class: role.name(),
            value: figure(strategy),
            interval: None,
            text: format_number(figure(strategy), digits, ""),
        })
        .collect();
    Chart::new(title, |title| bars(title, &rows))
}

/// What the forwards made final: how many tokens, which guesses, and over the course of the answers.
fn acceptance(found: &[Found<'_>]) -> Vec<Chart> {
    let with: Vec<(Role, &str, &Acceptance)> = found
        .iter()
        .filter_map(|&(role, strategy)| Some((role, strategy.label.as_str(), strategy.acceptance.as_ref()?)))
        .filter(|(.., acceptance)| !acceptance.forwards.is_empty())
        .collect();
    if with.is_empty() {
        return Vec::new();
    }
    let series = |points: &dyn Fn(&Acceptance) -> Vec<(f64, f64)>| -> Vec<Series> {
        let numbered = with.iter().enumerate();
        let earlier = |index: usize, role: Role| with[..index].iter().filter(|(other, ..)| *other == role).count();
        numbered
            .map(|(index, &(role, label, acceptance))| Series {
                label: name(role, label),
                class: role.name(),
                dash: earlier(index, role),
                points: points(acceptance),
            })
            .collect()
    };
    let positions = series(&|acceptance| {
        acceptance.by_position.iter().enumerate().map(|(guess, &share)| (guess as f64 + 1.0, 100.0 * share)).collect()
    });
    let course = series(&|acceptance| {
        let reached = acceptance.over_answer.iter().filter(|stretch| stretch.forwards > 0);
        reached.map(|stretch| (stretch.start as f64, stretch.tokens as f64 / stretch.forwards as f64)).collect()
    });
    let mut charts: Vec<Chart> =
        with.iter().map(|&(role, label, acceptance)| histogram(role, label, acceptance)).collect();
    charts.push(Chart::new("Share of the forwards in which a guess was right, by its place in the window", |title| {
        lines(title, ["place of the guess", "right, %"], true, &positions)
    }));
    charts.push(Chart::new("Tokens per forward over the course of the answers", |title| {
        lines(title, ["tokens of the answer before", "tokens per forward"], true, &course)
    }));
    charts
}

fn histogram(role: Role, label: &str, acceptance: &Acceptance) -> Chart {
    let most = HISTOGRAM_BARS.min(acceptance.forwards.len());
    let total = acceptance.forwards.iter().sum::<u64>().max(1) as f64;
    let rows: Vec<Bar> = (0..most)
        .map(|index| {
            let last = index + 1 == most;
            let counts = if last { &acceptance.forwards[index..] } else { &acceptance.forwards[index..=index] };
            let share = 100.0 * counts.iter().sum::<u64>() as f64 / total;
            let more = if last && counts.len() > 1 { " or more" } else { "" };
            Bar {
                label: format!("{}{more}", index + 1),
                class: role.name(),
                value: Some(share),
                interval: None,
                text: format!("{share:.1} %"),
            }
        })
        .collect();
    Chart::new(format!("Tokens made final by a forward: {}", name(role, label)), |title| bars(title, &rows))
}

/// Tokens per second of the timed answers, those of neighbouring lengths together.
fn by_length(records: &Records) -> Option<Chart> {
    let header = &records.header;
    let mut series = Vec::new();
    for model in &header.models {
        for (dash, strategy) in header.settings.strategies_of(model.role).enumerate() {
            let mine = records.speeds.iter().filter(|speed| (speed.role, speed.strategy) == (model.role, strategy));
            let mut timed: Vec<(usize, f64)> = mine.map(|speed| (speed.tokens, speed.seconds)).collect();
            timed.sort_by_key(|&(tokens, _)| tokens);
            let point = |group: &[(usize, f64)]| {
                let (tokens, seconds): (usize, f64) =
                    group.iter().fold((0, 0.0), |(tokens, seconds), one| (tokens + one.0, seconds + one.1));
                (seconds > 0.0).then(|| (tokens as f64 / group.len() as f64, tokens as f64 / seconds))
            };
            let points: Vec<(f64, f64)> = timed.chunks(LENGTH_GROUP).filter_map(point).collect();
            series.push(Series {
                label: name(model.role, &strategy.to_string()),
                class: model.role.name(),
                dash,
                points,
            });
        }
    }
    series.iter().any(|one| !one.points.is_empty()).then(|| {
        Chart::new("Tokens per second at batch 1, by the length of the answer", |title| {
            lines(title, ["tokens of the answer", "tokens/s"], true, &series)
        })
    })
}
