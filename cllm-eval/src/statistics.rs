//! Confidence intervals of counts, and tests of whether a difference is due to chance.

use cllm_core::fingerprint;
use rand::RngExt;
use rayon::prelude::*;

/// Standard normal quantile of a two-sided 95 % interval.
const Z95: f64 = 1.959_963_984_540_054;

/// A difference is significant if its p value is below this.
pub const SIGNIFICANCE_LEVEL: f64 = 0.05;

/// Number of resamples of a bootstrap.
pub const NUM_RESAMPLES: usize = 10_000;
const BOOTSTRAP_SEED: u64 = 0;

/// Wilson's 95 % score interval (1927) of a fraction. It is valid for few examples and for
/// fractions near 0 and 1.
pub fn wilson(correct: usize, total: usize) -> Option<[f64; 2]> {
    if total == 0 {
        return None;
    }
    let n = total as f64;
    let fraction = correct as f64 / n;
    let scale = 1.0 + Z95 * Z95 / n;
    let centre = (fraction + Z95 * Z95 / (2.0 * n)) / scale;
    let half = Z95 / scale * (fraction * (1.0 - fraction) / n + Z95 * Z95 / (4.0 * n * n)).sqrt();
    Some([(centre - half).max(0.0), (centre + half).min(1.0)])
}

/// Bonett and Price's 95 % interval (2012) of the difference of two paired fractions. The counts
/// are those of the pairs in which only the first, or only the second, is correct.
pub fn paired_difference(only_first: usize, only_second: usize, pairs: usize) -> Option<[f64; 2]> {
    if pairs == 0 {
        return None;
    }
    let n = pairs as f64 + 2.0;
    let (first, second) = ((only_first as f64 + 1.0) / n, (only_second as f64 + 1.0) / n);
    let difference = first - second;
    let half = Z95 * ((first + second - difference * difference) / n).sqrt();
    Some([(difference - half).max(-1.0), (difference + half).min(1.0)])
}

/// The 95 % percentile bootstrap interval (Efron, 1979) of a statistic of some examples: from the
/// 2.5th to the 97.5th percentile over resamples, each of which draws as many examples as there
/// are, with replacement. `statistic` gets the indices of the drawn examples. `None` without
/// examples, or if a statistic is `None`.
pub fn bootstrap(examples: usize, statistic: impl Fn(&[usize]) -> Option<f64> + Sync) -> Option<[f64; 2]> {
    if examples == 0 {
        return None;
    }
    let resample = |number: usize| {
        // Each resample has its own generator, so the interval does not depend on the number of
        // threads.
        let mut rng = fingerprint::derive_rng(BOOTSTRAP_SEED, "bootstrap", number as u64);
        let drawn: Vec<usize> = (0..examples).map(|_| rng.random_range(0..examples)).collect();
        statistic(&drawn)
    };
    let mut statistics = (0..NUM_RESAMPLES).into_par_iter().map(resample).collect::<Option<Vec<f64>>>()?;
    statistics.sort_by(f64::total_cmp);
    Some([statistics[NUM_RESAMPLES / 40], statistics[NUM_RESAMPLES - 1 - NUM_RESAMPLES / 40]])
}

/// The two-sided p value of the exact McNemar test (1947): the probability of counts at least this
/// unequal if, in a pair with exactly one correct answer, either side were equally likely to be the
/// correct one.
pub fn mcnemar(only_first: usize, only_second: usize) -> f64 {
    let (pairs, fewer) = (only_first + only_second, only_first.min(only_second));
    // The first binomial probabilities underflow a float, so each logarithm is computed from the
    // previous one.
    let mut log_term = -(pairs as f64) * std::f64::consts::LN_2;
    let mut tail = log_term.exp();
    for k in 0..fewer {
        log_term += ((pairs - k) as f64 / (k + 1) as f64).ln();
        tail += log_term.exp();
    }
    (2.0 * tail).min(1.0)
}

/// `a / b`; `None` if either is unknown or `b` is not positive.
pub fn ratio(a: impl Into<Option<f64>>, b: impl Into<Option<f64>>) -> Option<f64> {
    match (a.into(), b.into()) {
        (Some(a), Some(b)) if b > 0.0 => Some(a / b),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_agrees_with_known_values() {
        let [low, high] = wilson(8, 10).unwrap();
        assert!((low - 0.4902).abs() < 1e-4 && (high - 0.9433).abs() < 1e-4, "{low} {high}");
        let [low, high] = wilson(0, 20).unwrap();
        assert!(low == 0.0 && (high - 0.1611).abs() < 1e-4, "{high}");
        assert_eq!(wilson(0, 0), None);
    }

    #[test]
    fn a_paired_interval_surrounds_the_difference_and_is_never_empty() {
        let [low, high] = paired_difference(0, 0, 100).unwrap();
        assert!(low < 0.0 && high > 0.0 && (low + high).abs() < 1e-12);
        let [low, high] = paired_difference(40, 10, 100).unwrap();
        assert!(low > 0.1 && low < 0.3 && high > 0.3 && high < 0.5, "{low} {high}");
    }

    #[test]
    fn mcnemar_is_the_binomial_tail() {
        // 2 · (1 + 10) / 2^10, and 2 / 2^5.
        assert!((mcnemar(1, 9) - 22.0 / 1024.0).abs() < 1e-12 && (mcnemar(9, 1) - 22.0 / 1024.0).abs() < 1e-12);
        assert!((mcnemar(0, 5) - 0.0625).abs() < 1e-12);
        assert_eq!((mcnemar(0, 0), mcnemar(5, 5)), (1.0, 1.0));
        // 4,000 pairs, whose first terms are 0 as floats: 2 Φ(-(100 - 1/2) / √1000) = 0.00165.
        assert!((mcnemar(1900, 2100) - 0.00165).abs() < 5e-5, "{}", mcnemar(1900, 2100));
    }

    #[test]
    fn the_bootstrap_interval_of_a_mean_is_that_of_the_normal_distribution() {
        // 100 examples, a quarter of them 1: the mean's standard error is √(0.25 · 0.75 / 100) =
        // 0.0433.
        let mean = |drawn: &[usize]| Some(drawn.iter().filter(|&&at| at % 4 == 0).count() as f64 / drawn.len() as f64);
        let [low, high] = bootstrap(100, mean).unwrap();
        assert!((low - 0.165).abs() < 0.011 && (high - 0.335).abs() < 0.011, "{low} {high}");
        assert_eq!(bootstrap(100, mean), Some([low, high]));
        assert_eq!(bootstrap(0, mean), None);
        assert_eq!(bootstrap(3, |_| None), None);
    }

    #[test]
    fn a_ratio_needs_both_numbers_and_a_divisor_above_0() {
        assert_eq!(ratio(6.0, 3.0), Some(2.0));
        assert_eq!(ratio(6.0, 0.0), None);
        assert_eq!(ratio(None, 1.0), None);
    }
}
