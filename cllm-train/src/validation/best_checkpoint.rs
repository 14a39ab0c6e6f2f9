//! Chooses the best checkpoint of a run, and decides whether to wait for a better one.

use serde::{Deserialize, Serialize};

use crate::settings::ValidationSettings;
use crate::validation::metrics::GenerationMetrics;

/// The results of a run's validations so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct BestCheckpointTracker {
    /// Step of the last validation.
    pub last_step: Option<usize>,
    /// Metrics of the initial model's answers.
    pub initial: Option<GenerationMetrics>,
    /// Metrics of the answers in the last validation after that.
    pub last: Option<GenerationMetrics>,
    pub best: Option<BestCheckpoint>,
    /// Number of validations since the best one, or since the start.
    pub num_without_best: usize,
}

/// The best checkpoint so far.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BestCheckpoint {
    pub step: usize,
    pub tokens_per_forward_finished: f64,
}

impl BestCheckpointTracker {
    /// Records the validation after `step`, with its metrics if prompts were answered. Returns
    /// whether it is the best so far: the one with the most tokens per forward in finished answers,
    /// among those whose accuracy is not too far below that of the initial model.
    pub fn record(&mut self, step: usize, metrics: Option<GenerationMetrics>, settings: &ValidationSettings) -> bool {
        self.last_step = Some(step);
        let Some(metrics) = metrics else { return false };
        if step == 0 {
            self.initial = Some(metrics);
            return false;
        }
        self.last = Some(metrics);
        let is_faster = |speed: f64| self.best.is_none_or(|best| speed > best.tokens_per_forward_finished);
        let is_accurate = self.is_accurate(&metrics, settings.max_accuracy_drop);
        match metrics.tokens_per_forward_finished.filter(|&speed| is_accurate && is_faster(speed)) {
            Some(tokens_per_forward_finished) => {
                self.best = Some(BestCheckpoint { step, tokens_per_forward_finished });
                self.num_without_best = 0;
            }
            None => self.num_without_best += 1,
        }
        self.num_without_best == 0
    }

    /// Whether `patience` validations in a row brought no new best checkpoint.
    pub fn should_stop(&self, settings: &ValidationSettings) -> bool {
        settings.patience.is_some_and(|patience| self.num_without_best >= patience)
    }

    fn is_accurate(&self, metrics: &GenerationMetrics, max_drop: f64) -> bool {
        let initial = self.initial.and_then(|initial| initial.accuracy);
        // Fractions of a few answers are not exact in binary, and an accuracy exactly at the bound
        // must pass.
        initial.zip(metrics.accuracy).is_none_or(|(initial, accuracy)| accuracy >= initial - max_drop - 1e-9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(tokens_per_forward_finished: Option<f64>, accuracy: Option<f64>) -> Option<GenerationMetrics> {
        Some(GenerationMetrics { tokens_per_forward: 9.0, tokens_per_forward_finished, unfinished: 0, accuracy })
    }

    fn best(step: usize, tokens_per_forward_finished: f64) -> Option<BestCheckpoint> {
        Some(BestCheckpoint { step, tokens_per_forward_finished })
    }

    #[test]
    fn only_a_checkpoint_that_is_accurate_enough_can_be_the_best() {
        let settings = ValidationSettings { max_accuracy_drop: 0.1, ..ValidationSettings::default() };
        let mut tracker = BestCheckpointTracker::default();
        assert!(!tracker.record(0, metrics(Some(1.0), Some(0.8)), &settings), "the initial model is no checkpoint");
        assert!(tracker.record(1, metrics(Some(2.0), Some(0.7)), &settings), "exactly at the bound");
        assert!(!tracker.record(2, metrics(Some(3.0), Some(0.69)), &settings), "faster, but below the bound");
        assert!(!tracker.record(3, metrics(None, Some(0.8)), &settings), "no answer finished");
        assert!(!tracker.record(4, metrics(Some(2.0), Some(0.8)), &settings), "no faster");
        assert_eq!((tracker.best, tracker.num_without_best), (best(1, 2.0), 3));
        assert!(tracker.record(5, metrics(Some(2.5), Some(0.75)), &settings));
        assert_eq!((tracker.best, tracker.num_without_best), (best(5, 2.5), 0));
        // Without scores there is no bound.
        let mut tracker =
            BestCheckpointTracker { initial: metrics(Some(1.0), None), ..BestCheckpointTracker::default() };
        assert!(tracker.record(1, metrics(Some(2.0), None), &settings));
    }

    #[test]
    fn a_run_stops_when_its_patience_is_used_up() {
        let settings = ValidationSettings { patience: Some(2), ..ValidationSettings::default() };
        let mut tracker = BestCheckpointTracker::default();
        let mut stops = Vec::new();
        for (step, speed) in [1.5, 2.0, 1.9, 2.0].into_iter().enumerate() {
            tracker.record(step + 1, metrics(Some(speed), None), &settings);
            stops.push(tracker.should_stop(&settings));
        }
        assert_eq!(stops, [false, false, false, true]);
        assert!(!tracker.should_stop(&ValidationSettings { patience: None, ..settings }));
    }
}
