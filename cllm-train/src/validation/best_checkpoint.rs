//! Which checkpoint of a run is the best, and whether another is still to be expected.

use serde::{Deserialize, Serialize};

use crate::settings::ValidationSettings;
use crate::validation::generation_probe::Found;

/// What the probes of a run amount to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Selection {
    /// Step of the last probe.
    pub probed: Option<usize>,
    /// Of the model that the run starts from.
    pub start: Option<Found>,
    /// The last of those after it.
    pub last: Option<Found>,
    /// Step of the best, and its tokens per forward in finished answers.
    pub best: Option<(usize, f64)>,
    /// Probes since the best, or since the start.
    pub without_best: usize,
}

impl Selection {
    /// Takes what the answers of the probe after `step`, if it had some, amount to; whether that is the best so far: it has most
    /// tokens per forward in finished answers of all whose accuracy is not too far below that of the start.
    pub fn take(&mut self, step: usize, found: Option<Found>, settings: &ValidationSettings) -> bool {
        self.probed = Some(step);
        let Some(found) = found else { return false };
        if step == 0 {
            self.start = Some(found);
            return false;
        }
        self.last = Some(found);
        let rate = found.tokens_per_forward_finished.filter(|_| self.is_accurate(&found, settings.max_accuracy_drop));
        match rate.filter(|&rate| self.best.is_none_or(|(_, best)| rate > best)) {
            Some(rate) => (self.best, self.without_best) = (Some((step, rate)), 0),
            None => self.without_best += 1,
        }
        self.without_best == 0
    }

    /// Whether so many probes in a row brought no new best that the run ends.
    pub fn is_over(&self, settings: &ValidationSettings) -> bool {
        settings.patience.is_some_and(|patience| self.without_best >= patience)
    }

    fn is_accurate(&self, found: &Found, max_drop: f64) -> bool {
        let start = self.start.and_then(|start| start.accuracy);
        // Shares of a few answers are no round numbers: one that is just at the bound is within it.
        start.zip(found.accuracy).is_none_or(|(start, accuracy)| accuracy >= start - max_drop - 1e-9)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(rate: Option<f64>, accuracy: Option<f64>) -> Option<Found> {
        Some(Found { tokens_per_forward: 9.0, tokens_per_forward_finished: rate, unfinished: 0, accuracy })
    }

    #[test]
    fn only_what_is_as_accurate_as_allowed_can_be_the_best() {
        let settings = ValidationSettings { max_accuracy_drop: 0.1, ..ValidationSettings::default() };
        let mut selection = Selection::default();
        assert!(!selection.take(0, found(Some(1.0), Some(0.8)), &settings), "the start is no checkpoint");
        assert!(selection.take(1, found(Some(2.0), Some(0.7)), &settings), "just at the bound");
        assert!(!selection.take(2, found(Some(3.0), Some(0.69)), &settings), "faster, but below it");
        assert!(!selection.take(3, found(None, Some(0.8)), &settings), "no answer ended");
        assert!(!selection.take(4, found(Some(2.0), Some(0.8)), &settings), "no faster");
        assert_eq!((selection.best, selection.without_best), (Some((1, 2.0)), 3));
        assert!(selection.take(5, found(Some(2.5), Some(0.75)), &settings));
        assert_eq!((selection.best, selection.without_best), (Some((5, 2.5)), 0));
        // Nothing to score: there is no bound.
        let mut selection = Selection { start: found(Some(1.0), None), ..Selection::default() };
        assert!(selection.take(1, found(Some(2.0), None), &settings));
    }

    #[test]
    fn a_run_is_over_after_so_many_probes_without_a_new_best() {
        let settings = ValidationSettings { patience: Some(2), ..ValidationSettings::default() };
        let mut selection = Selection::default();
        let over: Vec<bool> = [1.5, 2.0, 1.9, 2.0]
            .into_iter()
            .enumerate()
            .map(|(step, rate)| {
                selection.take(step + 1, found(Some(rate), None), &settings);
                selection.is_over(&settings)
            })
            .collect();
        assert_eq!(over, [false, false, false, true]);
        assert!(!selection.is_over(&ValidationSettings { patience: None, ..settings }));
    }
}
