//! The ratio of two speeds that were measured on the same examples.

use crate::records::SpeedRecord;
use crate::statistics::{bootstrap, ratio};

/// Timings of the baseline, each with those of the other side on the same example.
pub(crate) type PairedSpeeds<'r> = [(&'r SpeedRecord, &'r SpeedRecord)];

/// Tokens per second of the baseline and of the other side.
pub(crate) fn tokens_per_second(pairs: &PairedSpeeds<'_>) -> [Option<f64>; 2] {
    let all: Vec<usize> = (0..pairs.len()).collect();
    of_drawn(pairs, &all)
}

/// The 95 % interval of the speed-up by a percentile bootstrap over the examples. `None` for fewer
/// than two examples, which say nothing about others.
pub(crate) fn interval(pairs: &PairedSpeeds<'_>) -> Option<[f64; 2]> {
    let speedup = |drawn: &[usize]| {
        let [baseline, other] = of_drawn(pairs, drawn);
        ratio(other, baseline)
    };
    if pairs.len() < 2 { None } else { bootstrap(pairs.len(), speedup) }
}

fn of_drawn(pairs: &PairedSpeeds<'_>, drawn: &[usize]) -> [Option<f64>; 2] {
    let speed = |of: fn(&(&SpeedRecord, &SpeedRecord)) -> (usize, f64)| {
        let (mut tokens, mut seconds) = (0, 0.0);
        for one in drawn.iter().map(|&index| of(&pairs[index])) {
            tokens += one.0;
            seconds += one.1;
        }
        ratio(tokens as f64, seconds)
    };
    [speed(|pair| (pair.0.tokens, pair.0.seconds)), speed(|pair| (pair.1.tokens, pair.1.seconds))]
}
