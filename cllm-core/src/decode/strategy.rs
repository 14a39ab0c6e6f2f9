//! The strategies and their settings.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::tree::MOST_ENTRIES;
use crate::{Error, Result};

/// How tokens are chosen and verified.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Strategy {
    /// One token a forward.
    Ar,
    /// Fixed blocks of n tokens, iterated to their fixed point (Song et al., arXiv 2002.03629; CLLM, 2403.00835).
    Jacobi {
        /// Tokens of a block, at least 2.
        #[serde(default = "default_n")]
        n: usize,
    },
    /// A window that rolls on: what a forward made final leaves it at once, and n - 1 guesses stay in flight, the
    /// predictions of the forward before among them. The last `pool` rejected tails may serve as guesses again.
    Rolling {
        /// Tokens of the window, at least 2.
        #[serde(default = "default_n")]
        n: usize,
        /// Rejected tails that are kept.
        #[serde(default)]
        pool: usize,
    },
    /// Blocks of n tokens of which the next begins before the one in front is done: once the newest has accepted the share
    /// `ratio` (0.85), up to `blocks` (2) at once; `pool` as in `rolling` (Jacobi Forcing, arXiv 2512.14681).
    MultiBlock {
        /// Tokens of a block, at least 2.
        #[serde(default = "default_n")]
        n: usize,
        /// Most blocks at once, at least 2.
        #[serde(default = "default_blocks")]
        blocks: usize,
        /// Share of the newest block's tokens that must be accepted before another begins.
        #[serde(default = "default_ratio")]
        ratio: f64,
        /// Rejected tails that are kept.
        #[serde(default)]
        pool: usize,
    },
    /// Another model guesses, the model's own forward decides: both forward a rolling window of n tokens at once, and where a guess
    /// was wrong the predictions of the other one are guessed next. So the answer is the model's own, token for token. The
    /// evaluation has a student guess for its teacher.
    Drafted {
        /// Tokens of the window, at least 2.
        #[serde(default = "default_n")]
        n: usize,
    },
    /// Lookahead decoding: Jacobi iterations on the next `window` (5) tokens make n-grams of `ngram` (4) tokens; the last
    /// `candidates` (5) that begin with the last known token are guessed, all in one forward of at most
    /// (window + candidates) x (ngram - 1) tokens (Fu et al., arXiv 2402.02057).
    Lookahead {
        /// Tokens of each level of the lookahead window, at least 1.
        #[serde(default = "default_window")]
        window: usize,
        /// Tokens of an n-gram, at least 2.
        #[serde(default = "default_ngram")]
        ngram: usize,
        /// Most n-grams that are guessed at once, at least 1.
        #[serde(default = "default_candidates")]
        candidates: usize,
    },
}

fn default_n() -> usize {
    16
}

fn default_blocks() -> usize {
    2
}

fn default_ratio() -> f64 {
    0.85
}

fn default_window() -> usize {
    5
}

fn default_ngram() -> usize {
    4
}

fn default_candidates() -> usize {
    5
}

/// Most tokens of a window.
const MOST_TOKENS: usize = 1024;
/// Most rejected tails that are kept.
const MOST_TAILS: usize = 1024;

impl Strategy {
    /// A rolling window without a pool.
    pub fn rolling(n: usize) -> Self {
        Strategy::Rolling { n, pool: 0 }
    }

    /// Two blocks at most and no pool.
    pub fn multi_block(n: usize) -> Self {
        Strategy::MultiBlock { n, blocks: default_blocks(), ratio: default_ratio(), pool: 0 }
    }

    /// A window of five tokens, n-grams of four, and five candidates.
    pub fn lookahead() -> Self {
        Strategy::Lookahead { window: default_window(), ngram: default_ngram(), candidates: default_candidates() }
    }

    /// Most tokens that a row forwards at once: 1 for autoregressive decoding.
    pub fn max_window_tokens(self) -> usize {
        match self {
            Strategy::Ar => 1,
            Strategy::Jacobi { n } | Strategy::Rolling { n, .. } | Strategy::Drafted { n } => n,
            Strategy::MultiBlock { n, blocks, .. } => n.saturating_mul(blocks),
            Strategy::Lookahead { window, ngram, candidates } => {
                window.saturating_add(candidates).saturating_mul(ngram.saturating_sub(1))
            }
        }
    }

    /// As settings name it.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Ar => "ar",
            Strategy::Jacobi { .. } => "jacobi",
            Strategy::Rolling { .. } => "rolling",
            Strategy::MultiBlock { .. } => "multiblock",
            Strategy::Drafted { .. } => "drafted",
            Strategy::Lookahead { .. } => "lookahead",
        }
    }

    /// Whether another model guesses.
    pub fn needs_draft_model(self) -> bool {
        matches!(self, Strategy::Drafted { .. })
    }

    /// Checks that it can be done.
    ///
    /// # Errors
    /// [`Error::Usage`] naming what cannot.
    pub fn check(self) -> Result<()> {
        let name = self.name();
        let refuse = |what: String| Err(Error::usage(what));
        match self {
            Strategy::Ar => {}
            Strategy::Jacobi { n }
            | Strategy::Rolling { n, .. }
            | Strategy::Drafted { n }
            | Strategy::MultiBlock { n, .. }
                if !(2..=MOST_TOKENS).contains(&n) =>
            {
                return refuse(format!("n of {name} must be from 2 to {MOST_TOKENS}"));
            }
            Strategy::MultiBlock { blocks, .. } if blocks < 2 => {
                return refuse(format!("blocks of {name} must be at least 2: one at a time is `jacobi`"));
            }
            Strategy::MultiBlock { ratio, .. } if !(ratio > 0.0 && ratio <= 1.0) => {
                return refuse(format!("ratio of {name} must be above 0 and at most 1"));
            }
            Strategy::MultiBlock { n, blocks, .. } if self.max_window_tokens() > MOST_TOKENS => {
                return refuse(format!(
                    "{blocks} blocks of {n} tokens make a window of {}, there may be {MOST_TOKENS}",
                    self.max_window_tokens()
                ));
            }
            Strategy::Lookahead { window, ngram, candidates } if window < 1 || ngram < 2 || candidates < 1 => {
                return refuse(format!(
                    "{name} needs a window and candidates of at least 1 and an ngram of at least 2"
                ));
            }
            Strategy::Lookahead { window, ngram, candidates } if self.max_window_tokens() > MOST_ENTRIES => {
                return refuse(format!(
                    "window {window}, ngram {ngram} and candidates {candidates} of {name} make a tree of (window + \
                     candidates) x (ngram - 1) = {} tokens, there may be {MOST_ENTRIES}",
                    self.max_window_tokens()
                ));
            }
            _ => {}
        }
        match self {
            Strategy::Rolling { pool, .. } | Strategy::MultiBlock { pool, .. } if pool > MOST_TAILS => {
                refuse(format!("pool of {name} must be at most {MOST_TAILS}"))
            }
            _ => Ok(()),
        }
    }
}

/// The name and what is not left at its default.
impl fmt::Display for Strategy {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.name())?;
        match *self {
            Strategy::Ar => Ok(()),
            Strategy::Jacobi { n } | Strategy::Drafted { n } => write!(out, " n={n}"),
            Strategy::Rolling { n, .. } => write!(out, " n={n}"),
            Strategy::MultiBlock { n, blocks, ratio, .. } => write!(out, " n={n} blocks={blocks} ratio={ratio}"),
            Strategy::Lookahead { window, ngram, candidates } => {
                write!(out, " window={window} ngram={ngram} candidates={candidates}")
            }
        }?;
        match *self {
            Strategy::Rolling { pool, .. } | Strategy::MultiBlock { pool, .. } if pool > 0 => {
                write!(out, " pool={pool}")
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_strategy_leaves_out_has_its_default() {
        let read = |text: &str| serde_json::from_str::<Strategy>(text).unwrap();
        assert_eq!(read(r#"{"jacobi": {}}"#), Strategy::Jacobi { n: 16 });
        assert_eq!(read(r#"{"rolling": {}}"#), Strategy::rolling(16));
        assert_eq!(read(r#"{"multiblock": {}}"#), Strategy::multi_block(16));
        assert_eq!(read(r#"{"drafted": {}}"#), Strategy::Drafted { n: 16 });
        assert_eq!(read(r#"{"lookahead": {}}"#), Strategy::lookahead());
    }
}
