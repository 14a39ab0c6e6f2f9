//! The learning rate of each step.

use crate::settings::OptimizerSettings;

/// The learning rate of step `number` (from 1) of `num_steps`: a linear warm-up, then half a cosine
/// down to the minimum.
pub fn learning_rate(settings: &OptimizerSettings, number: usize, num_steps: usize) -> f64 {
    let warmup_steps = (settings.warmup_fraction * num_steps as f64).ceil();
    let number = number as f64;
    if number <= warmup_steps {
        return settings.lr * number / warmup_steps;
    }
    let decayed = ((number - warmup_steps) / (num_steps as f64 - warmup_steps).max(1.0)).min(1.0);
    let cosine = 0.5 * (1.0 + (std::f64::consts::PI * decayed).cos());
    settings.lr * (settings.min_lr_fraction + (1.0 - settings.min_lr_fraction) * cosine)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::Settings;

    #[test]
    fn the_learning_rate_rises_and_then_falls_to_its_minimum() {
        let settings =
            OptimizerSettings { lr: 1.0, warmup_fraction: 0.1, min_lr_fraction: 0.1, ..Settings::plain().optimizer };
        let learning_rates: Vec<f64> = (1..=100).map(|number| learning_rate(&settings, number, 100)).collect();
        assert_eq!((learning_rates[0], learning_rates[9]), (0.1, 1.0));
        assert!(learning_rates[10..].windows(2).all(|pair| pair[1] < pair[0]));
        assert!((learning_rates[99] - 0.1).abs() < 1e-9);
    }
}
