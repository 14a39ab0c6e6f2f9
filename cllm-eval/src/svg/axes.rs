//! Two axes and their grid, on which line charts and scatter plots are drawn.

use std::fmt::Write;
use std::ops::RangeInclusive;

use super::{escape, open};
use crate::words::with_commas;

pub(super) const WIDTH: f64 = 460.0;
pub(super) const HEIGHT: f64 = 330.0;
/// Height of a line of the legend below the axes.
pub(super) const LEGEND_LINE: f64 = 22.0;
/// Distance of the first baseline of the legend from the axes.
pub(super) const LEGEND_GAP: f64 = 24.0;
const LEFT: f64 = 68.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 14.0;
const BOTTOM: f64 = 52.0;
/// Approximate number of ticks of an axis.
const NUM_TICKS: f64 = 6.0;

/// Number of doublings up to which each has a tick.
const NUM_DOUBLINGS: f64 = 8.0;

/// How an axis maps values to its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    Linear,
    /// Linear, from the smallest value to the largest; the ticks are between these. Counts from 1 have a
    /// tick there.
    Between,
    /// Linear, with the tick 0.
    FromZero,
    /// Each doubling has the same length. Values must be positive.
    Logarithmic,
}

/// A named axis with its ticks, which are logarithms on a logarithmic scale.
pub struct Axis {
    name: &'static str,
    scale: Scale,
    /// The ends of the axis.
    low: f64,
    high: f64,
    first_tick: f64,
    last_tick: f64,
    step: f64,
}

impl Axis {
    /// Creates an axis with round ticks for all `values`, which must be finite. If all values are
    /// whole numbers, such as positions, so are the ticks; on a logarithmic scale, they are powers of
    /// two.
    pub fn new(name: &'static str, scale: Scale, values: impl Iterator<Item = f64>) -> Self {
        let zero = (scale == Scale::FromZero).then_some(0.0);
        let values = values.map(|value| scale.transform(value)).chain(zero);
        let (low, high, whole) = values.fold((f64::INFINITY, f64::NEG_INFINITY, true), |(low, high, whole), value| {
            (low.min(value), high.max(value), whole && value.fract() == 0.0)
        });
        let (low, high, whole) = if low <= high { (low, high, whole) } else { (0.0, 1.0, false) };
        let range = if high > low { high - low } else { high.abs().max(1.0) / 2.0 };
        let (whole, num_ticks) = if scale == Scale::Logarithmic { (true, NUM_DOUBLINGS) } else { (whole, NUM_TICKS) };
        let step = round_step((range / num_ticks).max(if whole { 1.0 } else { 0.0 }));
        let (first_tick, last_tick) = ((low / step).floor() * step, (high / step).ceil() * step);
        let last_tick = if last_tick > first_tick { last_tick } else { first_tick + step };
        if scale == Scale::Between && high > low {
            let (first_tick, last_tick) = ((low / step).ceil() * step, (high / step).floor() * step);
            return Axis { name, scale, low, high, first_tick, last_tick, step };
        }
        Axis { name, scale, low: first_tick, high: last_tick, first_tick, last_tick, step }
    }

    /// Maps the ends of the axis to 0 and 1.
    fn fraction(&self, value: f64) -> f64 {
        (self.scale.transform(value) - self.low) / (self.high - self.low)
    }

    /// The values at the ticks.
    fn ticks(&self) -> impl Iterator<Item = f64> {
        let num_steps = ((self.last_tick - self.first_tick) / self.step).round() as usize;
        // Counts begin at 1, which is no multiple of a larger step.
        let one = (self.scale == Scale::Between && self.low == 1.0 && self.step > 1.0).then_some(1.0);
        one.into_iter()
            .chain((0..=num_steps).map(|index| self.scale.invert(self.first_tick + index as f64 * self.step)))
    }

    fn tick_label(&self, tick: f64) -> String {
        let digits = (-self.step.log10().floor()).clamp(0.0, 6.0) as usize;
        with_commas(&format!("{tick:.digits$}"))
    }
}

impl Scale {
    fn transform(self, value: f64) -> f64 {
        if self == Scale::Logarithmic { value.log2() } else { value }
    }

    fn invert(self, value: f64) -> f64 {
        if self == Scale::Logarithmic { value.exp2() } else { value }
    }
}

/// The smallest of 1, 2 and 5 times a power of ten that is at least `min`.
fn round_step(min: f64) -> f64 {
    let power = 10f64.powf(min.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|digit| digit * power).find(|&step| step >= min).unwrap_or(10.0 * power)
}

/// The plot area between two axes.
pub(super) struct Frame {
    x: Axis,
    y: Axis,
}

impl Frame {
    pub(super) fn new(x: Axis, y: Axis) -> Self {
        Frame { x, y }
    }

    /// Converts a point from the units of the axes to pixels.
    pub(super) fn to_pixels(&self, x: f64, y: f64) -> (f64, f64) {
        let (width, height) = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM);
        (LEFT + width * self.x.fraction(x), HEIGHT - BOTTOM - height * self.y.fraction(y))
    }

    /// The horizontal range of points and labels, in pixels from the left.
    pub(super) fn label_columns(&self) -> RangeInclusive<f64> {
        LEFT - 6.0..=WIDTH
    }

    /// The vertical range of the labels' baselines, in pixels from the top.
    pub(super) fn label_baselines(&self) -> RangeInclusive<f64> {
        TOP + 8.0..=HEIGHT - BOTTOM - 4.0
    }

    /// Opens a chart with its grid and axes drawn, and room for `num_legend_lines` below; the
    /// caller adds the rest.
    pub(super) fn open(&self, title: &str, num_legend_lines: usize) -> String {
        let legend = LEGEND_LINE * num_legend_lines as f64 + if num_legend_lines > 0 { LEGEND_GAP - 14.0 } else { 0.0 };
        let mut svg = open(title, WIDTH, HEIGHT + legend);
        let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        for tick in self.x.ticks() {
            let (x, _) = self.to_pixels(tick, 1.0);
            let label = self.x.tick_label(tick);
            let _ = write!(
                svg,
                r#"<path class="grid" d="M{x:.1} {TOP}V{bottom}"/><text class="tick" x="{x:.1}" y="{:.1}" text-anchor="middle">{label}</text>"#,
                bottom + 20.0
            );
        }
        for tick in self.y.ticks() {
            let (_, y) = self.to_pixels(1.0, tick);
            let label = self.y.tick_label(tick);
            let _ = write!(
                svg,
                r#"<path class="grid" d="M{LEFT} {y:.1}H{right}"/><text class="tick" x="{:.1}" y="{:.1}" text-anchor="end">{label}</text>"#,
                LEFT - 8.0,
                y + 4.5
            );
        }
        let (middle_x, middle_y) = ((LEFT + right) / 2.0, (TOP + bottom) / 2.0);
        let _ = write!(
            svg,
            r#"<text class="axis" x="{middle_x:.1}" y="{:.1}" text-anchor="middle">{}</text><text class="axis" transform="translate(16 {middle_y:.1}) rotate(-90)" text-anchor="middle">{}</text>"#,
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
    fn ticks_are_round_and_enclose_all_values() {
        for (values, first, last, step) in [
            (vec![0.3, 97.0], 0.0, 100.0, 20.0),
            (vec![1.0, 4.16], 1.0, 5.0, 1.0),
            (vec![53.1, 57.7], 53.0, 58.0, 1.0),
            (vec![2.5], 2.5, 3.0, 0.5),
            (vec![2.0], 2.0, 3.0, 1.0),
            (vec![1.0, 2.0, 3.0], 1.0, 3.0, 1.0),
            (vec![], 0.0, 1.0, 0.2),
        ] {
            let axis = Axis::new("x", Scale::Linear, values.iter().copied());
            let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
            assert!(
                near(axis.first_tick, first) && near(axis.last_tick, last) && near(axis.step, step),
                "{values:?}: {} {} {}",
                axis.first_tick,
                axis.last_tick,
                axis.step
            );
            assert!(values.iter().all(|&value| (0.0..=1.0).contains(&axis.fraction(value))));
        }
    }

    #[test]
    fn an_axis_may_end_at_its_last_value() {
        let axis = Axis::new("x", Scale::Between, [1.0, 16.0].into_iter());
        assert_eq!(axis.ticks().collect::<Vec<_>>(), [1.0, 5.0, 10.0, 15.0]);
        let from_0 = Axis::new("x", Scale::Between, [0.0, 16.0].into_iter());
        assert_eq!(from_0.ticks().collect::<Vec<_>>(), [0.0, 5.0, 10.0, 15.0]);
        assert_eq!([1.0, 8.5, 16.0].map(|value| axis.fraction(value)), [0.0, 0.5, 1.0]);
        let one = Axis::new("x", Scale::Between, [8.0].into_iter());
        assert_eq!((one.ticks().count(), one.fraction(8.0)), (2, 0.0));
    }

    #[test]
    fn doublings_have_the_same_length_on_a_logarithmic_scale() {
        let axis = Axis::new("x", Scale::Logarithmic, [1.0, 3.0, 16.0].into_iter());
        assert_eq!(axis.ticks().collect::<Vec<_>>(), [1.0, 2.0, 4.0, 8.0, 16.0]);
        assert_eq!([1.0, 2.0, 4.0, 16.0].map(|rows| axis.fraction(rows)), [0.0, 0.25, 0.5, 1.0]);
        let wide = Axis::new("x", Scale::Logarithmic, [1.0, 512.0].into_iter());
        assert_eq!(wide.ticks().take(3).collect::<Vec<_>>(), [1.0, 4.0, 16.0]);
        assert_eq!([16.0, 1024.0].map(|tick| axis.tick_label(tick)), ["16", "1,024"]);
        let one = Axis::new("x", Scale::Logarithmic, [8.0].into_iter());
        assert_eq!(one.ticks().collect::<Vec<_>>(), [8.0, 16.0]);
    }
}
