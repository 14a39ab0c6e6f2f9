//! An example, as every model and strategy answered it: the text that each forward made final.

use cllm_core::task::Verdict;
use serde::Serialize;

use crate::records::{AnswerRecord, Records};

/// Colours of neighbouring forwards in the page's style.
const FORWARD_COLOURS: usize = 5;

#[derive(Debug, Serialize)]
pub(super) struct Example {
    id: String,
    prompt: String,
    reference: Option<String>,
    /// Most forwards of an answer.
    forwards: usize,
    answers: Vec<Answer>,
}

#[derive(Debug, Serialize)]
struct Answer {
    name: String,
    verdict: Verdict,
    tokens: usize,
    forwards: usize,
    text: String,
    pieces: Vec<Piece>,
}

/// What one forward made final.
#[derive(Debug, Serialize)]
struct Piece {
    text: String,
    colour: usize,
    /// Counted from 1.
    forward: usize,
    tokens: u32,
}

impl Example {
    /// Of the examples whose forwards' texts were kept, the first that somebody answered right; the first, where nobody did.
    pub(super) fn of(records: &Records) -> Option<Self> {
        let with_pieces = || records.answers.iter().filter(|answer| answer.forward_texts.is_some());
        let right = with_pieces().filter(|answer| answer.verdict == Verdict::Correct).map(|answer| answer.index).min();
        let index = right.or_else(|| with_pieces().map(|answer| answer.index).min())?;
        let chosen: Vec<&AnswerRecord> = with_pieces().filter(|answer| answer.index == index).collect();
        let first = chosen.first()?;
        Some(Example {
            id: first.id.clone(),
            prompt: first.prompt.clone(),
            reference: first.reference.clone(),
            forwards: chosen.iter().map(|answer| answer.accepted.len()).max()?,
            answers: chosen.iter().map(|answer| Answer::of(answer)).collect(),
        })
    }
}

impl Answer {
    fn of(answer: &AnswerRecord) -> Self {
        let pieces = answer.forward_texts.iter().flatten().zip(&answer.accepted).enumerate();
        Answer {
            name: format!("{} {}", answer.role.name(), answer.strategy.to_string()),
            verdict: answer.verdict,
            tokens: answer.response_ids.len(),
            forwards: answer.forwards,
            text: answer.text.clone(),
            pieces: pieces
                .map(|(index, (text, &tokens))| Piece {
                    text: text.clone(),
                    colour: index % FORWARD_COLOURS,
                    forward: index + 1,
                    tokens,
                })
                .collect(),
        }
    }
}
