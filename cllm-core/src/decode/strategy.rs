//! The strategies: their settings with the allowed ranges, and the proposer of each.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::backend::Window;
use super::proposer::Proposer;
use super::proposer::jacobi::Jacobi;
use super::proposer::likeliest_paths::LikeliestPaths;
use super::proposer::lookahead::Lookahead;
use super::proposer::multi_block::MultiBlock;
use super::proposer::random_draft::RandomDraft;
use super::proposer::rolling::Rolling;
use super::tree::MAX_TREE_TOKENS;
use super::width::Width;
use crate::{Error, Result};

/// What is said of a model that cannot decode with [`Strategy::Gated`].
pub const NO_DRAFT_ADAPTERS: &str = "has no adapters for draft tokens, which strategy `gated` needs (docs/method.md): choose \
                                     another strategy, or train them with lora.on=drafts";

/// How the next tokens are drafted. Every strategy gives the answer of autoregressive decoding.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Strategy {
    /// Autoregressive decoding, one token per forward.
    Ar,
    /// Jacobi decoding of fixed blocks of n tokens, each iterated to its fixed point (Song et al.,
    /// arXiv 2002.03629; CLLM, arXiv 2403.00835).
    Jacobi {
        /// Tokens of a block, at least 2.
        #[serde(default = "default_n")]
        n: usize,
    },
    /// A window of n tokens that moves on with every accepted token, so n - 1 draft tokens are
    /// always in flight. The predictions after the accepted tokens are the next draft. With `n:
    /// auto`, each forward has as many draft tokens (0 to 63) as give the most tokens per second, by
    /// how many were accepted lately, how probable these are and how long forwards took. With `tree`
    /// (0), the window also holds the likeliest other continuations, up to that many tokens in all.
    /// The last `pool` (0) rejected drafts are kept, and drafted again after a token that they
    /// contain.
    Rolling {
        /// Tokens of the window, at least 2, or `auto`.
        #[serde(default = "default_width")]
        n: Width,
        /// Maximum number of tokens of a window that branches, more than n; 0 if it does not.
        #[serde(default, skip_serializing_if = "is_zero")]
        tree: usize,
        /// Number of rejected drafts to keep.
        #[serde(default, skip_serializing_if = "is_zero")]
        pool: usize,
    },
    /// Blocks of n tokens, of which up to `blocks` (2) are in flight: a new one begins once the
    /// fraction `ratio` (0.85) of the newest is accepted. `pool` works as in `rolling` (Jacobi
    /// Forcing, arXiv 2512.14681).
    MultiBlock {
        /// Tokens of a block, at least 2.
        #[serde(default = "default_n")]
        n: usize,
        /// Maximum number of blocks in flight, at least 2.
        #[serde(default = "default_blocks")]
        blocks: usize,
        /// Fraction of the newest block that must be accepted before another begins.
        #[serde(default = "default_ratio")]
        ratio: f64,
        /// Number of rejected drafts to keep.
        #[serde(default, skip_serializing_if = "is_zero")]
        pool: usize,
    },
    /// Speculative decoding with a draft model. Both models forward the same rolling window of n
    /// tokens, the target model decides what is accepted, and the draft model's predictions are the
    /// next draft. The answer is the target model's own. In an evaluation, the student is the draft
    /// model of its teacher.
    Drafted {
        /// Tokens of the window, at least 2.
        #[serde(default = "default_n")]
        n: usize,
    },
    /// The model verifies, and its adapters for draft tokens propose. A forward has every token of a
    /// rolling window of n twice: as the model reads it, which decides what is accepted, and as the
    /// model with the adapters reads it, which gives the next draft. The answer is the model's own.
    /// `n: auto` and `tree` (0) work as in `rolling`, with half as many tokens, since each counts
    /// twice.
    Gated {
        /// Tokens of the window, from 2 to 32, or `auto`.
        #[serde(default = "default_width")]
        n: Width,
        /// Maximum number of tokens of a window that branches, more than n and at most 32; 0 if it does
        /// not.
        #[serde(default, skip_serializing_if = "is_zero")]
        tree: usize,
    },
    /// Lookahead decoding. Jacobi iterations on the next `window` (5) tokens collect n-grams of
    /// `ngram` (4) tokens. The newest `candidates` (5) that begin with the last token are verified
    /// in the same forward, a tree of at most (window + candidates) x (ngram - 1) tokens (Fu et
    /// al., arXiv 2402.02057).
    Lookahead {
        /// Tokens of each level of the lookahead window, at least 1.
        #[serde(default = "default_window")]
        window: usize,
        /// Tokens of an n-gram, at least 2.
        #[serde(default = "default_ngram")]
        ngram: usize,
        /// Maximum number of n-grams to verify at once, at least 1.
        #[serde(default = "default_candidates")]
        candidates: usize,
    },
}

/// What is off need not be written.
fn is_zero(number: &usize) -> bool {
    *number == 0
}

fn default_n() -> usize {
    16
}

fn default_width() -> Width {
    Width::Fixed(default_n())
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

/// Maximum number of tokens of a rolling window, which has at most `max_tokens` if its width is chosen.
fn rolling_tokens(n: Width, tree: usize, max_tokens: usize) -> usize {
    match n {
        _ if tree > 0 => tree,
        Width::Fixed(n) => n,
        Width::Auto => max_tokens,
    }
}

/// Maximum length of a window whose tokens are in order.
const MAX_WINDOW_TOKENS: usize = 1024;
/// Maximum length of a window that a forward has twice.
pub const MAX_GATED_TOKENS: usize = MAX_TREE_TOKENS / 2;
const MAX_POOL_DRAFTS: usize = 1024;

impl Strategy {
    /// A rolling window of n tokens without a pool.
    pub fn rolling(n: usize) -> Self {
        Strategy::Rolling { n: Width::Fixed(n), tree: 0, pool: 0 }
    }

    /// A window of n tokens that the model's adapters for draft tokens propose.
    pub fn gated(n: usize) -> Self {
        Strategy::Gated { n: Width::Fixed(n), tree: 0 }
    }

    /// What suits a model with a window of `n`: `gated` with adapters for draft tokens, else `rolling`.
    pub fn suitable(n: usize, adapts_drafts: bool) -> Self {
        if adapts_drafts { Strategy::gated(n) } else { Strategy::rolling(n) }
    }

    /// A rolling window whose width is chosen while decoding, with up to `tree` tokens if that is
    /// not 0.
    pub fn auto(tree: usize) -> Self {
        Strategy::Rolling { n: Width::Auto, tree, pool: 0 }
    }

    /// Multi-block decoding with the default number of blocks and ratio, without a pool.
    pub fn multi_block(n: usize) -> Self {
        Strategy::MultiBlock { n, blocks: default_blocks(), ratio: default_ratio(), pool: 0 }
    }

    /// Lookahead decoding with its default sizes.
    pub fn lookahead() -> Self {
        Strategy::Lookahead { window: default_window(), ngram: default_ngram(), candidates: default_candidates() }
    }

    /// The name in settings.
    pub fn name(self) -> &'static str {
        match self {
            Strategy::Ar => "ar",
            Strategy::Jacobi { .. } => "jacobi",
            Strategy::Rolling { .. } => "rolling",
            Strategy::MultiBlock { .. } => "multiblock",
            Strategy::Drafted { .. } => "drafted",
            Strategy::Gated { .. } => "gated",
            Strategy::Lookahead { .. } => "lookahead",
        }
    }

    /// Maximum number of tokens of a window, and so of those that a forward accepts.
    pub fn max_window_tokens(self) -> usize {
        match self {
            Strategy::Ar => 1,
            Strategy::Jacobi { n } | Strategy::Drafted { n } => n,
            Strategy::Gated { n, tree } => rolling_tokens(n, tree, MAX_GATED_TOKENS),
            Strategy::Rolling { n, tree, .. } => rolling_tokens(n, tree, MAX_TREE_TOKENS),
            Strategy::MultiBlock { n, blocks, .. } => n.saturating_mul(blocks),
            Strategy::Lookahead { window, ngram, candidates } => {
                window.saturating_add(candidates).saturating_mul(ngram.saturating_sub(1))
            }
        }
    }

    /// Maximum number of tokens that a sequence forwards at once, each in a slot of its own: those of
    /// its window, as often as a forward has them.
    pub fn max_forwarded_tokens(self) -> usize {
        self.max_window_tokens().saturating_mul(self.num_copies())
    }

    /// How often a forward has each token of a window that needs proposals.
    pub(super) fn num_copies(self) -> usize {
        if self.needs_draft_adapters() { 2 } else { 1 }
    }

    /// Number of tokens that a window is forwarded as.
    pub(super) fn num_forwarded(self, window: &Window<'_>) -> usize {
        if window.needs_proposals() { window.len() * self.num_copies() } else { window.len() }
    }

    /// Whether a second model makes the drafts.
    pub fn needs_draft_model(self) -> bool {
        matches!(self, Strategy::Drafted { .. })
    }

    /// Whether adapters that act on draft tokens alone make the drafts.
    pub fn needs_draft_adapters(self) -> bool {
        matches!(self, Strategy::Gated { .. })
    }

    /// Whether the number of draft tokens is chosen for each forward.
    pub fn has_chosen_width(self) -> bool {
        matches!(self, Strategy::Rolling { n: Width::Auto, .. } | Strategy::Gated { n: Width::Auto, .. })
    }

    /// Whether the drafts need the probabilities of the tokens that were predicted.
    pub(super) fn needs_candidates(self) -> bool {
        let branches = matches!(self, Strategy::Rolling { tree: 1.., .. } | Strategy::Gated { tree: 1.., .. });
        self.has_chosen_width() || branches
    }

    /// The proposer of a sequence that decodes with this strategy.
    pub(super) fn proposer(self, prompt: &[i32], random: RandomDraft, record_trajectory: bool) -> Box<dyn Proposer> {
        match self {
            Strategy::Ar => Box::new(Jacobi::new(1, prompt, record_trajectory, random)),
            Strategy::Jacobi { n } => Box::new(Jacobi::new(n, prompt, record_trajectory, random)),
            Strategy::Rolling { n: Width::Fixed(n), tree: 0, pool } => Box::new(Rolling::new(n, pool, prompt, random)),
            Strategy::Gated { n: Width::Fixed(n), tree: 0 } | Strategy::Drafted { n } => {
                Box::new(Rolling::new(n, 0, prompt, random))
            }
            Strategy::Rolling { n, tree, .. } | Strategy::Gated { n, tree } => {
                Box::new(LikeliestPaths::new(n, self.max_window_tokens(), tree > 0, prompt, random))
            }
            Strategy::MultiBlock { n, blocks, ratio, pool } => {
                let min_accepted = (ratio * n as f64).ceil() as usize;
                Box::new(MultiBlock::new(n, blocks, min_accepted, pool, prompt, random))
            }
            Strategy::Lookahead { window, ngram, candidates } => {
                Box::new(Lookahead::new(window, ngram, candidates, prompt, random))
            }
        }
    }

    /// Checks that every parameter is in its range.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the strategy, the parameter, its value and its range.
    pub fn check(self) -> Result<()> {
        let checked = match self {
            Strategy::Ar => Ok(()),
            Strategy::Jacobi { n } | Strategy::Drafted { n } => check_n(n),
            Strategy::Gated { n, tree } => check_gated(n).and_then(|()| check_tree(n, tree, MAX_GATED_TOKENS)),
            Strategy::Rolling { n, tree, pool } => check_rolling(n, tree, pool).and_then(|()| check_pool(pool)),
            Strategy::MultiBlock { n, blocks, ratio, pool } => check_n(n)
                .and_then(|()| check_blocks(n, blocks, ratio, self.max_window_tokens()))
                .and_then(|()| check_pool(pool)),
            Strategy::Lookahead { window, ngram, candidates } => {
                check_lookahead(window, ngram, candidates, self.max_window_tokens())
            }
        };
        checked.map_err(|problem| Error::usage(format!("strategy `{}`: {problem}", self.name())))
    }
}

fn check_n(n: usize) -> std::result::Result<(), String> {
    match n {
        2..=MAX_WINDOW_TOKENS => Ok(()),
        _ => Err(format!("n={n} is out of range; set it from 2 to {MAX_WINDOW_TOKENS}")),
    }
}

fn check_gated(n: Width) -> std::result::Result<(), String> {
    match n {
        Width::Auto | Width::Fixed(2..=MAX_GATED_TOKENS) => Ok(()),
        Width::Fixed(n) => Err(format!("n={n} is out of range; set it from 2 to {MAX_GATED_TOKENS}, or to auto")),
    }
}

fn check_tree(n: Width, tree: usize, max_tokens: usize) -> std::result::Result<(), String> {
    let min_tree = if let Width::Fixed(n) = n { n + 1 } else { 2 };
    if tree == 0 || (min_tree..=max_tokens).contains(&tree) {
        return Ok(());
    }
    Err(format!(
        "tree={tree} is out of range; with n={n}, set it from {min_tree} to {max_tokens}, or to 0 for a window that does \
         not branch"
    ))
}

fn check_rolling(n: Width, tree: usize, pool: usize) -> std::result::Result<(), String> {
    if let Width::Fixed(n) = n {
        check_n(n)?;
    }
    check_tree(n, tree, MAX_TREE_TOKENS)?;
    if pool > 0 && (tree > 0 || n == Width::Auto) {
        return Err(format!(
            "pool={pool} needs a number for n and no tree; leave it out, or set n to a number and tree to 0"
        ));
    }
    Ok(())
}

fn check_pool(pool: usize) -> std::result::Result<(), String> {
    match pool {
        0..=MAX_POOL_DRAFTS => Ok(()),
        _ => Err(format!("pool={pool} is too large; set it to at most {MAX_POOL_DRAFTS}")),
    }
}

fn check_blocks(n: usize, blocks: usize, ratio: f64, num_tokens: usize) -> std::result::Result<(), String> {
    if blocks < 2 {
        Err(format!("blocks={blocks} is too small; set it to at least 2, or use `jacobi`"))
    } else if !(ratio > 0.0 && ratio <= 1.0) {
        Err(format!("ratio={ratio} is out of range; set it above 0 and to at most 1"))
    } else if num_tokens > MAX_WINDOW_TOKENS {
        Err(format!(
            "{blocks} blocks of {n} tokens are {num_tokens} in flight; at most {MAX_WINDOW_TOKENS} are supported"
        ))
    } else {
        Ok(())
    }
}

fn check_lookahead(
    window: usize,
    ngram: usize,
    candidates: usize,
    num_tokens: usize,
) -> std::result::Result<(), String> {
    if window < 1 || ngram < 2 || candidates < 1 {
        Err("window and candidates must be at least 1, ngram at least 2".to_owned())
    } else if num_tokens > MAX_TREE_TOKENS {
        Err(format!(
            "window={window}, ngram={ngram} and candidates={candidates} make a tree of (window + candidates) x (ngram - 1) = \
             {num_tokens} tokens; at most {MAX_TREE_TOKENS} are supported"
        ))
    } else {
        Ok(())
    }
}

/// The name and every parameter but a tree or pool of 0: `rolling n=16`.
impl fmt::Display for Strategy {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name();
        let unless_zero = |key: &str, value: usize| if value == 0 { String::new() } else { format!(" {key}={value}") };
        match *self {
            Strategy::Ar => out.write_str(name),
            Strategy::Jacobi { n } | Strategy::Drafted { n } => write!(out, "{name} n={n}"),
            Strategy::Gated { n, tree } => write!(out, "{name} n={n}{}", unless_zero("tree", tree)),
            Strategy::Rolling { n, tree, pool } => {
                write!(out, "{name} n={n}{}{}", unless_zero("tree", tree), unless_zero("pool", pool))
            }
            Strategy::MultiBlock { n, blocks, ratio, pool } => {
                write!(out, "{name} n={n} blocks={blocks} ratio={ratio}{}", unless_zero("pool", pool))
            }
            Strategy::Lookahead { window, ngram, candidates } => {
                write!(out, "{name} window={window} ngram={ngram} candidates={candidates}")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forward_has_the_window_of_gated_twice_and_all_others_once() {
        let gated = |n, tree| Strategy::Gated { n, tree };
        for (strategy, num_window_tokens, num_forwarded) in [
            (Strategy::Ar, 1, 1),
            (Strategy::rolling(16), 16, 16),
            (Strategy::auto(0), 64, 64),
            (Strategy::Drafted { n: 16 }, 16, 16),
            (Strategy::multi_block(16), 32, 32),
            (Strategy::gated(16), 16, 32),
            (gated(Width::Fixed(8), 20), 20, 40),
            (gated(Width::Auto, 0), 32, 64),
        ] {
            let sizes = (strategy.max_window_tokens(), strategy.max_forwarded_tokens());
            assert_eq!(sizes, (num_window_tokens, num_forwarded), "{strategy}");
        }
    }

    #[test]
    fn parameters_that_settings_leave_out_have_their_defaults() {
        let read = |text: &str| serde_json::from_str::<Strategy>(text).unwrap();
        assert_eq!(read(r#"{"jacobi": {}}"#), Strategy::Jacobi { n: 16 });
        assert_eq!(read(r#"{"rolling": {}}"#), Strategy::rolling(16));
        assert_eq!(read(r#"{"rolling": {"n": "auto"}}"#), Strategy::auto(0));
        assert_eq!(read(r#"{"multiblock": {}}"#), Strategy::multi_block(16));
        assert_eq!(read(r#"{"drafted": {}}"#), Strategy::Drafted { n: 16 });
        assert_eq!(read(r#"{"gated": {}}"#), Strategy::gated(16));
        assert_eq!(read(r#"{"gated": {"n": "auto"}}"#), Strategy::Gated { n: Width::Auto, tree: 0 });
        assert_eq!(read(r#"{"lookahead": {}}"#), Strategy::lookahead());
    }

    #[test]
    fn names_and_files_leave_out_what_is_off() {
        let gated = |n, tree| Strategy::Gated { n, tree };
        for (strategy, name, file) in [
            (Strategy::rolling(16), "rolling n=16", r#"{"rolling":{"n":16}}"#),
            (Strategy::auto(0), "rolling n=auto", r#"{"rolling":{"n":"auto"}}"#),
            (Strategy::auto(64), "rolling n=auto tree=64", r#"{"rolling":{"n":"auto","tree":64}}"#),
            (Strategy::gated(16), "gated n=16", r#"{"gated":{"n":16}}"#),
            (gated(Width::Auto, 32), "gated n=auto tree=32", r#"{"gated":{"n":"auto","tree":32}}"#),
        ] {
            assert_eq!(strategy.to_string(), name);
            assert_eq!(serde_json::to_string(&strategy).unwrap(), file);
            assert_eq!(serde_json::from_str::<Strategy>(file).unwrap(), strategy);
        }
    }

    #[test]
    fn parameters_out_of_range_are_refused_with_their_values() {
        let gated = |n, tree| Strategy::Gated { n, tree };
        let lookahead = |window, ngram, candidates| Strategy::Lookahead { window, ngram, candidates };
        let tree = |n, tree| Strategy::Rolling { n, tree, pool: 0 };
        let multi = |n, blocks, ratio| Strategy::MultiBlock { n, blocks, ratio, pool: 0 };
        for (strategy, message) in [
            (Strategy::Jacobi { n: 1 }, "strategy `jacobi`: n=1 is out of range; set it from 2 to 1024"),
            (Strategy::rolling(1025), "strategy `rolling`: n=1025 is out of range; set it from 2 to 1024"),
            (
                Strategy::Rolling { n: Width::Fixed(4), tree: 0, pool: 1025 },
                "strategy `rolling`: pool=1025 is too large; set it to at most 1024",
            ),
            (
                tree(Width::Fixed(16), 16),
                "strategy `rolling`: tree=16 is out of range; with n=16, set it from 17 to 64",
            ),
            (tree(Width::Fixed(16), 65), "tree=65 is out of range"),
            (tree(Width::Auto, 1), "tree=1 is out of range; with n=auto, set it from 2 to 64, or to 0"),
            (Strategy::Rolling { n: Width::Auto, tree: 0, pool: 2 }, "pool=2 needs a number for n and no tree"),
            (Strategy::Rolling { n: Width::Fixed(4), tree: 8, pool: 2 }, "pool=2 needs a number for n and no tree"),
            (multi(16, 1, 0.5), "strategy `multiblock`: blocks=1 is too small"),
            (multi(16, 2, 0.0), "ratio=0 is out of range; set it above 0 and to at most 1"),
            (lookahead(0, 4, 5), "strategy `lookahead`: window and candidates must be at least 1"),
            (lookahead(5, 1, 5), "ngram at least 2"),
            (Strategy::gated(33), "strategy `gated`: n=33 is out of range; set it from 2 to 32, or to auto"),
            (gated(Width::Fixed(16), 33), "tree=33 is out of range; with n=16, set it from 17 to 32"),
            (gated(Width::Auto, 1), "tree=1 is out of range; with n=auto, set it from 2 to 32"),
            (lookahead(15, 5, 15), "window=15, ngram=5 and candidates=15 make a tree of"),
            (lookahead(usize::MAX, 5, 15), "at most 64 are supported"),
            (multi(512, 3, 1.0), "3 blocks of 512 tokens are 1536 in flight; at most 1024 are supported"),
        ] {
            let error = strategy.check().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let trees = [tree(Width::Fixed(16), 64), tree(Width::Fixed(63), 64), Strategy::auto(0), Strategy::auto(2)];
        let gated = [gated(Width::Fixed(32), 0), gated(Width::Fixed(31), 32), gated(Width::Auto, 2)];
        let others = [Strategy::Jacobi { n: 2 }, Strategy::rolling(1024), multi(512, 2, 1.0), lookahead(10, 5, 6)];
        for strategy in trees.into_iter().chain(gated).chain(others) {
            assert!(strategy.check().is_ok(), "{strategy:?}");
        }
    }
}
