//! How many tokens the forwards of a strategy accepted: how often each number occurred, how often
//! the draft token at each position was accepted, and how this changes over the course of an
//! answer.

use serde::{Deserialize, Serialize};

use crate::records::AnswerRecord;

/// Length of a [`Segment`], in tokens.
const SEGMENT_TOKENS: usize = 32;

/// Counts over all forwards of a model with a strategy, including those of unfinished answers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Acceptance {
    /// `forwards[k]` is the number of forwards that accepted `k + 1` tokens, the last known token
    /// included.
    pub forwards: Vec<u64>,
    /// `by_position[k]` is the fraction of forwards that accepted the draft token at position `k +
    /// 1` of the window.
    pub by_position: Vec<f64>,
    /// Segments of 32 tokens, from the first token of an answer on.
    pub over_answer: Vec<Segment>,
}

/// A stretch of the answers, between two positions.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Position of its first token in an answer, from 0.
    pub start: usize,
    /// Tokens accepted by the forwards that begin in the segment, over all answers that reach it.
    pub tokens: u64,
    /// Number of these forwards.
    pub forwards: u64,
}

impl Acceptance {
    pub fn from_answers(answers: &[&AnswerRecord]) -> Self {
        let mut acceptance = Acceptance::default();
        for answer in answers {
            let (mut position, forced) = (0, answer.forced_tokens());
            for &num_accepted in &answer.accepted {
                if position == forced.start {
                    position = forced.end;
                }
                acceptance.count(position, num_accepted as usize);
                position += num_accepted as usize;
            }
        }
        let total: u64 = acceptance.forwards.iter().sum();
        let mut num_beyond = total;
        for &num_forwards in &acceptance.forwards {
            num_beyond -= num_forwards;
            acceptance.by_position.push(num_beyond as f64 / total as f64);
        }
        // The last fraction belongs to a draft token that no forward accepted.
        acceptance.by_position.pop();
        acceptance
    }

    fn count(&mut self, position: usize, num_accepted: usize) {
        if num_accepted == 0 {
            return;
        }
        if self.forwards.len() < num_accepted {
            self.forwards.resize(num_accepted, 0);
        }
        self.forwards[num_accepted - 1] += 1;
        let index = position / SEGMENT_TOKENS;
        while self.over_answer.len() <= index {
            let start = self.over_answer.len() * SEGMENT_TOKENS;
            self.over_answer.push(Segment { start, ..Segment::default() });
        }
        let segment = &mut self.over_answer[index];
        segment.tokens += num_accepted as u64;
        segment.forwards += 1;
    }
}
