//! The answers that an animation shows.

use cllm_core::decode::Strategy;

use crate::records::{AnswerRecord, Records, SpeedRecord};
use crate::role::Role;

/// A model and a strategy.
pub(in crate::report) type Contender = (Role, Strategy);

/// An answer with the text of each forward, and how long it took at batch 1.
pub(in crate::report) struct TimedAnswer<'r> {
    pub(super) answer: &'r AnswerRecord,
    pub(super) texts: &'r [String],
    pub(in crate::report) speed: &'r SpeedRecord,
}

impl<'r> TimedAnswer<'r> {
    /// `None` if the answer was not timed, or if its timed repetition gave another answer (which
    /// rounding can cause).
    pub(in crate::report) fn find(records: &'r Records, (role, strategy): Contender, index: usize) -> Option<Self> {
        let answer = records.answers_of(role, strategy).find(|answer| answer.index == index)?;
        let speed = records.speeds_of(role, strategy).find(|speed| speed.index == index)?;
        let texts = answer.forward_texts.as_deref()?;
        let same = (speed.tokens, speed.forwards) == (answer.num_decoded_tokens(), texts.len());
        (same && !texts.is_empty() && speed.forward_ends().len() == texts.len()).then_some(TimedAnswer {
            answer,
            texts,
            speed,
        })
    }

    pub(super) fn tokens_per_second(&self) -> f64 {
        self.speed.tokens as f64 / self.speed.seconds
    }
}
