//! How often draft tokens were accepted lately.

/// Acceptance rates of draft tokens whose predecessors were all accepted, as exponential averages.
#[derive(Debug, Default)]
pub(in crate::decode) struct AcceptanceHistory {
    /// By the probability that the model gave the draft token.
    by_confidence: [Rate; CONFIDENCES.len() + 1],
    /// By the distance from the last token, of drafts that the last forward made.
    by_depth: Vec<Rate>,
}

/// Bounds of the classes of confidence. A student is confident of most of its drafts, so the classes
/// are narrow near 1.
const CONFIDENCES: [f64; 9] = [0.02, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 0.99, 0.999];

/// What became of a draft token whose predecessors were all accepted.
#[derive(Debug, Clone, Copy)]
pub(in crate::decode) struct Outcome {
    /// Probability that the model gave the token; 0 for a random one.
    pub(in crate::decode) confidence: f64,
    /// Distance from the last token, if the last forward drafted the token and all before it, and as
    /// the likeliest ones; else `None`.
    pub(in crate::decode) depth: Option<usize>,
    pub(in crate::decode) is_accepted: bool,
}

impl AcceptanceHistory {
    pub(in crate::decode) fn observe(&mut self, outcome: Outcome) {
        let Outcome { confidence, depth, is_accepted } = outcome;
        self.by_confidence[class_of(confidence)].observe(is_accepted);
        if let Some(depth) = depth {
            if self.by_depth.len() < depth {
                self.by_depth.resize(depth, Rate::default());
            }
            self.by_depth[depth - 1].observe(is_accepted);
        }
    }

    /// The probability that a draft token is accepted if all before it are. Until many were seen, it
    /// is about the confidence itself.
    pub(in crate::decode) fn rate(&self, confidence: f64) -> f64 {
        self.by_confidence[class_of(confidence)].mean(confidence)
    }

    /// The probabilities that at least 1, 2, ... `max_depth` of the drafts that a forward makes are
    /// accepted by the next, as long as they are at least `min_probability`.
    pub(in crate::decode) fn survival(&self, max_depth: usize, min_probability: f64) -> Vec<f64> {
        let (mut rate, mut survival) = (INITIAL_RATE, 1.0);
        let at_depth = |depth| {
            // Where few were seen, the rate is that of the token before.
            rate = self.by_depth.get(depth).map_or(rate, |at_depth: &Rate| at_depth.mean(rate));
            survival *= rate;
            survival
        };
        (0..max_depth).map(at_depth).take_while(|&probability| probability >= min_probability).collect()
    }
}

fn class_of(confidence: f64) -> usize {
    CONFIDENCES.partition_point(|&bound| bound <= confidence)
}

/// Rate at which the drafts of a model are accepted before any were seen.
const INITIAL_RATE: f64 = 0.7;

/// Number of the last draft tokens that an average is over.
const MEMORY: f64 = 200.0;

/// Number of draft tokens after which an average counts as much as what was assumed before.
const PRIOR_WEIGHT: f64 = 4.0;

/// An acceptance rate. Older draft tokens count exponentially less.
#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    num_accepted: f64,
    num_seen: f64,
}

impl Rate {
    fn observe(&mut self, is_accepted: bool) {
        let kept = 1.0 - 1.0 / MEMORY;
        self.num_accepted = self.num_accepted * kept + f64::from(u8::from(is_accepted));
        self.num_seen = self.num_seen * kept + 1.0;
    }

    fn mean(&self, prior: f64) -> f64 {
        (self.num_accepted + PRIOR_WEIGHT * prior) / (self.num_seen + PRIOR_WEIGHT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_begin_at_the_confidence_and_follow_what_was_accepted_lately() {
        let mut history = AcceptanceHistory::default();
        assert_eq!(history.rate(0.6), 0.6);
        let outcome = |confidence, is_accepted| Outcome { confidence, depth: None, is_accepted };
        (0..400).for_each(|index| history.observe(outcome(0.6, index % 4 == 0)));
        assert!((history.rate(0.65) - 0.25).abs() < 0.02, "{}", history.rate(0.65));
        assert_eq!(history.rate(0.8), 0.8, "another class");
        (0..1000).for_each(|_| history.observe(outcome(0.6, true)));
        assert!(history.rate(0.6) > 0.98, "{}", history.rate(0.6));
    }

    #[test]
    fn survival_is_the_product_of_the_rates_of_all_depths() {
        let mut history = AcceptanceHistory::default();
        let survival = history.survival(3, 0.0);
        assert!((survival[0] - 0.7).abs() < 1e-9 && (survival[2] - 0.343).abs() < 1e-9, "{survival:?}");
        // The first draft token is accepted always and the second every other time.
        for index in 0..2000 {
            let outcome = |depth, is_accepted| Outcome { confidence: 0.9, depth: Some(depth), is_accepted };
            history.observe(outcome(1, true));
            history.observe(outcome(2, index % 2 == 0));
        }
        let survival = history.survival(3, 0.0);
        // Nothing is known of the third, so its rate is that of the second.
        for (survival, expected) in survival.iter().zip([1.0, 0.5, 0.25]) {
            assert!((survival - expected).abs() < 0.02, "{survival:?}");
        }
        assert_eq!(history.survival(3, 0.4).len(), 2);
    }
}
