//! The verdict on an answer, which every benchmark gives.

use serde::{Deserialize, Serialize};

/// The score of one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Correct,
    /// Incorrect, or no answer could be extracted.
    Incorrect,
    /// There is nothing to score the answer with.
    Unscored,
}

impl Verdict {
    pub(super) fn from_correct(is_correct: bool) -> Self {
        if is_correct { Verdict::Correct } else { Verdict::Incorrect }
    }
}
