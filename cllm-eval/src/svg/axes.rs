//! The frame of a chart with two axes.

use std::fmt::Write;
use std::ops::RangeInclusive;

use super::{escape, opened};

pub(super) const WIDTH: f64 = 460.0;
pub(super) const HEIGHT: f64 = 330.0;
const LEFT: f64 = 68.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 52.0;
/// About so many marks an axis has.
const MARKS: f64 = 6.0;

/// What an axis shows.
pub struct Axis {
    /// Its name, with the unit.
    pub name: &'static str,
    /// First and last mark, and the step between marks.
    first: f64,
    last: f64,
    step: f64,
}

impl Axis {
    /// Marks at round numbers around all of `values`, which are finite; a single value has one on either side. Among whole numbers, such
    /// as places, there are no marks.
    pub fn around(name: &'static str, values: impl Iterator<Item = f64>) -> Self {
        let (low, high, whole) = values.fold((f64::INFINITY, f64::NEG_INFINITY, true), |(low, high, whole), value| {
            (low.min(value), high.max(value), whole && value.fract() == 0.0)
        });
        let (low, high, whole) = if low <= high { (low, high, whole) } else { (0.0, 1.0, false) };
        let spread = if high > low { high - low } else { high.abs().max(1.0) / 2.0 };
        let step = round_step((spread / MARKS).max(if whole { 1.0 } else { 0.0 }));
        let (first, last) = ((low / step).floor() * step, (high / step).ceil() * step);
        Axis { name, first, last: if last > first { last } else { first + step }, step }
    }

    fn share(&self, value: f64) -> f64 {
        (value - self.first) / (self.last - self.first)
    }

    fn marks(&self) -> impl Iterator<Item = f64> {
        (0..=((self.last - self.first) / self.step).round() as usize).map(|mark| self.first + mark as f64 * self.step)
    }

    fn text(&self, mark: f64) -> String {
        let digits = (-self.step.log10().floor()).clamp(0.0, 6.0) as usize;
        format!("{mark:.digits$}")
    }
}

/// 1, 2 or 5 times a power of ten, at least `least`.
fn round_step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|digit| digit * power).find(|&step| step >= least).unwrap_or(10.0 * power)
}

/// The part of the picture in which points lie.
pub(super) struct Frame {
    x: Axis,
    y: Axis,
}

impl Frame {
    pub(super) fn new(x: Axis, y: Axis) -> Self {
        Frame { x, y }
    }

    pub(super) fn at(&self, x: f64, y: f64) -> (f64, f64) {
        let across = LEFT + (WIDTH - LEFT - RIGHT) * self.x.share(x);
        (across, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * self.y.share(y))
    }

    /// Places between which points and labels may stand, across.
    pub(super) fn width(&self) -> RangeInclusive<f64> {
        LEFT - 6.0..=WIDTH
    }

    /// Places between which labels may stand, from the top.
    pub(super) fn height(&self) -> RangeInclusive<f64> {
        TOP + 8.0..=HEIGHT - BOTTOM - 4.0
    }

    /// The picture up to where its points come.
    pub(super) fn opened(&self, title: &str) -> String {
        let mut svg = opened(title, WIDTH, HEIGHT);
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for mark in self.x.marks() {
            let (x, _) = self.at(mark, self.y.first);
            let text = self.x.text(mark);
            let _ = write!(
                svg,
                r#"<path class="grid" d="M{x:.1} {TOP}V{bottom}"/><text class="mark" x="{x:.1}" y="{:.1}" text-anchor="middle">{text}</text>"#,
                bottom + 20.0
            );
        }
        for mark in self.y.marks() {
            let (_, y) = self.at(self.x.first, mark);
            let text = self.y.text(mark);
            let _ = write!(
                svg,
                r#"<path class="grid" d="M{LEFT} {y:.1}H{right}"/><text class="mark" x="{:.1}" y="{:.1}" text-anchor="end">{text}</text>"#,
                LEFT - 8.0,
                y + 4.5
            );
        }
        let (middle, centre) = ((LEFT + right) / 2.0, (TOP + bottom) / 2.0);
        let _ = write!(
            svg,
            r#"<text class="axis" x="{middle:.1}" y="{:.1}" text-anchor="middle">{}</text><text class="axis" transform="translate(16 {centre:.1}) rotate(-90)" text-anchor="middle">{}</text>"#,
            HEIGHT - 8.0,
            escape(self.x.name),
            escape(self.y.name)
        );
        svg
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_round_and_hold_all_values() {
        for (values, first, last, step) in [
            (vec![0.3, 97.0], 0.0, 100.0, 20.0),
            (vec![1.0, 4.16], 1.0, 5.0, 1.0),
            (vec![53.1, 57.7], 53.0, 58.0, 1.0),
            (vec![2.5], 2.5, 3.0, 0.5),
            (vec![2.0], 2.0, 3.0, 1.0),
            (vec![1.0, 2.0, 3.0], 1.0, 3.0, 1.0),
            (vec![], 0.0, 1.0, 0.2),
        ] {
            let axis = Axis::around("x", values.iter().copied());
            let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
            assert!(
                near(axis.first, first) && near(axis.last, last) && near(axis.step, step),
                "{values:?}: {} {} {}",
                axis.first,
                axis.last,
                axis.step
            );
            assert!(values.iter().all(|&value| (0.0..=1.0).contains(&axis.share(value))));
        }
    }
}
