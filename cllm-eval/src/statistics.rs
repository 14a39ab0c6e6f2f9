//! Intervals of what was counted.

/// Standard normal quantile of a two-sided 95 % interval.
const Z: f64 = 1.959_963_984_540_054;

/// Wilson's score interval of `right` of `total` (1927): it holds for few examples and for rates near 0 and 1.
pub fn wilson(right: usize, total: usize) -> Option<[f64; 2]> {
    if total == 0 {
        return None;
    }
    let n = total as f64;
    let rate = right as f64 / n;
    let scale = 1.0 + Z * Z / n;
    let centre = (rate + Z * Z / (2.0 * n)) / scale;
    let half = Z / scale * (rate * (1.0 - rate) / n + Z * Z / (4.0 * n * n)).sqrt();
    Some([(centre - half).max(0.0), (centre + half).min(1.0)])
}

/// Bonett and Price's interval (2012) of a difference of paired rates, from the counts of pairs in which only the
/// first, or only the second, was right.
pub fn paired(only_first: usize, only_second: usize, pairs: usize) -> Option<[f64; 2]> {
    if pairs == 0 {
        return None;
    }
    let n = pairs as f64 + 2.0;
    let (first, second) = ((only_first as f64 + 1.0) / n, (only_second as f64 + 1.0) / n);
    let difference = first - second;
    let half = Z * ((first + second - difference * difference) / n).sqrt();
    Some([(difference - half).max(-1.0), (difference + half).min(1.0)])
}

/// `a / b`, where both are known and `b` is not 0.
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
    fn a_paired_interval_is_about_the_difference_and_never_empty() {
        let [low, high] = paired(0, 0, 100).unwrap();
        assert!(low < 0.0 && high > 0.0 && (low + high).abs() < 1e-12);
        let [low, high] = paired(40, 10, 100).unwrap();
        assert!(low > 0.1 && low < 0.3 && high > 0.3 && high < 0.5, "{low} {high}");
    }

    #[test]
    fn a_ratio_needs_both() {
        assert_eq!(ratio(6.0, 3.0), Some(2.0));
        assert_eq!(ratio(6.0, 0.0), None);
        assert_eq!(ratio(None, 1.0), None);
    }
}
