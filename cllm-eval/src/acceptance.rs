//! How many tokens the forwards of a strategy made final: how often, at which guess, and over the course of an answer.

use serde::{Deserialize, Serialize};

use crate::records::AnswerRecord;

/// Tokens of a stretch of [`Acceptance::over_answer`].
const STRETCH: usize = 32;

/// Counts over all forwards of a model and a strategy, unfinished answers among them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Acceptance {
    /// `forwards[k]`: forwards that made `k + 1` tokens final, the token known from the forward before among them.
    pub forwards: Vec<u64>,
    /// `by_position[k]`: share of the forwards in which the guess at place `k + 1` was right, and all guesses before it.
    pub by_position: Vec<f64>,
    /// Stretches of 32 tokens, from the first of an answer on.
    pub over_answer: Vec<Stretch>,
}

/// Some tokens in the course of the answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stretch {
    /// Position of its first token in the answer, from 0.
    pub start: usize,
    /// Tokens that forwards beginning in it made final, over all answers that reach it.
    pub tokens: u64,
    /// Those forwards.
    pub forwards: u64,
}

impl Acceptance {
    /// Counts over `answers`.
    pub fn of(answers: &[&AnswerRecord]) -> Self {
        let mut found = Acceptance::default();
        for answer in answers {
            let mut at = 0;
            for &accepted in &answer.accepted {
                found.count(at, accepted as usize);
                at += accepted as usize;
            }
        }
        let all: u64 = found.forwards.iter().sum();
        let mut deeper = all;
        for &count in &found.forwards {
            deeper -= count;
            found.by_position.push(deeper as f64 / all as f64);
        }
        // No forward takes more tokens than there are, so nothing lies behind the last guess.
        found.by_position.pop();
        found
    }

    fn count(&mut self, at: usize, accepted: usize) {
        if accepted == 0 {
            return;
        }
        if self.forwards.len() < accepted {
            self.forwards.resize(accepted, 0);
        }
        self.forwards[accepted - 1] += 1;
        while self.over_answer.len() <= at / STRETCH {
            let start = self.over_answer.len() * STRETCH;
            self.over_answer.push(Stretch { start, ..Stretch::default() });
        }
        let stretch = &mut self.over_answer[at / STRETCH];
        stretch.tokens += accepted as u64;
        stretch.forwards += 1;
    }
}
