//! The perplexity of a model: how well it predicts each token of a text from the tokens before it.

use serde::{Deserialize, Serialize};

use crate::records::WindowRecord;
use crate::statistics::bootstrap;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// `exp(nll)`.
    pub value: f64,
    /// 95 % interval by a bootstrap over the windows. None for a single window.
    pub ci95: Option<[f64; 2]>,
    /// Mean negative log-likelihood per token, in nats.
    pub nll: f64,
    /// Number of tokens scored.
    pub tokens: usize,
    /// Number of windows that these tokens come from.
    pub windows: usize,
}

impl Perplexity {
    /// Computes the perplexity over the windows of a model. `None` without windows.
    pub fn from_windows(windows: &[&WindowRecord]) -> Option<Self> {
        if windows.is_empty() {
            return None;
        }
        let tokens = windows.iter().map(|window| window.tokens).sum();
        let nll = mean_nll(windows.iter().copied());
        let of_drawn = |drawn: &[usize]| Some(mean_nll(drawn.iter().map(|&index| windows[index])).exp());
        let ci95 = if windows.len() > 1 { bootstrap(windows.len(), of_drawn) } else { None };
        Some(Perplexity { value: nll.exp(), ci95, nll, tokens, windows: windows.len() })
    }
}

/// Averages over tokens, not over windows.
fn mean_nll<'w>(windows: impl Iterator<Item = &'w WindowRecord>) -> f64 {
    let (mut nll, mut tokens) = (0.0, 0);
    for window in windows {
        nll += window.nll;
        tokens += window.tokens;
    }
    nll / tokens as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::role::Role;

    fn window(start: usize, tokens: usize, nll: f64) -> WindowRecord {
        WindowRecord { role: Role::Teacher, index: 0, id: "a".into(), start, tokens, nll }
    }

    #[test]
    fn every_token_weighs_the_same_whatever_its_window() {
        // (3 · 1 + 1 · 3) / 4.
        let (long, short) = (window(0, 3, 3.0), window(2, 1, 3.0));
        let perplexity = Perplexity::from_windows(&[&long, &short]).unwrap();
        assert!(
            (perplexity.nll - 1.5).abs() < 1e-12 && (perplexity.value - 1.5f64.exp()).abs() < 1e-12,
            "{perplexity:?}"
        );
        let [low, high] = perplexity.ci95.unwrap();
        assert!((low - 1f64.exp()).abs() < 1e-9 && (high - 3f64.exp()).abs() < 1e-9, "{low} {high}");
    }

    #[test]
    fn a_single_window_has_no_interval_and_no_window_has_no_perplexity() {
        let perplexity = Perplexity::from_windows(&[&window(0, 39, 39.0 * 50f64.ln())]).unwrap();
        assert!((perplexity.value - 50.0).abs() < 1e-9, "{perplexity:?}");
        assert_eq!((perplexity.ci95, perplexity.tokens, perplexity.windows), (None, 39, 1));
        assert_eq!(Perplexity::from_windows(&[]), None);
    }
}
