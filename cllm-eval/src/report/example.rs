//! One example as every model and strategy answered it, with the text that each forward added.

use cllm_core::task::Verdict;
use serde::Serialize;

use crate::records::{AnswerRecord, Records};

/// Number of colours in the page's style; successive forwards cycle through them.
const NUM_COLOURS: usize = 5;

#[derive(Debug, Serialize)]
pub(super) struct Example {
    id: String,
    prompt: String,
    reference: Option<String>,
    /// Number of forwards of the slowest answer.
    max_forwards: usize,
    answers: Vec<ExampleAnswer>,
}

#[derive(Debug, Serialize)]
struct ExampleAnswer {
    /// Model and strategy.
    name: String,
    verdict: Verdict,
    num_tokens: usize,
    num_forwards: usize,
    text: String,
    forwards: Vec<Forward>,
}

/// What one forward added to an answer.
#[derive(Debug, Serialize)]
struct Forward {
    /// Counted from 1.
    number: usize,
    text: String,
    num_tokens: u32,
    colour: usize,
}

impl Example {
    /// Picks the first example with a correct answer among those that keep the text of each
    /// forward, or else the first of them.
    pub(super) fn choose(records: &Records) -> Option<Self> {
        let shown = || records.answers.iter().filter(|answer| answer.forward_texts.is_some());
        let correct = shown().filter(|answer| answer.verdict == Verdict::Correct).map(|answer| answer.index).min();
        let index = correct.or_else(|| shown().map(|answer| answer.index).min())?;
        let answers: Vec<&AnswerRecord> = shown().filter(|answer| answer.index == index).collect();
        let first = answers.first()?;
        Some(Example {
            id: first.id.clone(),
            prompt: first.prompt.clone(),
            reference: first.reference.clone(),
            max_forwards: answers.iter().map(|answer| answer.accepted.len()).max()?,
            answers: answers.iter().map(|answer| ExampleAnswer::new(answer)).collect(),
        })
    }
}

impl ExampleAnswer {
    fn new(answer: &AnswerRecord) -> Self {
        let forwards = answer.forward_texts.iter().flatten().zip(&answer.accepted).enumerate();
        ExampleAnswer {
            name: format!("{} {}", answer.role, answer.strategy),
            verdict: answer.verdict,
            num_tokens: answer.num_decoded_tokens(),
            num_forwards: answer.forwards,
            text: answer.text.clone(),
            forwards: forwards
                .map(|(index, (text, &num_tokens))| Forward {
                    number: index + 1,
                    text: text.clone(),
                    num_tokens,
                    colour: index % NUM_COLOURS,
                })
                .collect(),
        }
    }
}
