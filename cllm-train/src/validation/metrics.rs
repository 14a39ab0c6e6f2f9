use cllm_core::decode::Answer;
use cllm_core::task::Verdict;
use cllm_core::trajectory::FinishReason;
use serde::{Deserialize, Serialize};

/// Speed and accuracy of a model's answers to the validation prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct GenerationMetrics {
    pub tokens_per_forward: f64,
    /// Over the answers that ended with EOS, if any did. Text that loops until the length limit
    /// decodes fast and flatters `tokens_per_forward`.
    pub tokens_per_forward_finished: Option<f64>,
    /// Number of answers that reached the length limit.
    pub unfinished: usize,
    /// Fraction of correct answers among those with a score; `None` if none has one. An answer that
    /// reached the length limit is never correct.
    pub accuracy: Option<f64>,
}

impl GenerationMetrics {
    pub fn from_answers(answers: &[(&Answer, Verdict)]) -> Self {
        let is_finished = |answer: &Answer| answer.finish_reason == FinishReason::Eos;
        let num_with = |verdict: Verdict| answers.iter().filter(|(_, other)| *other == verdict).count();
        let num_scored = answers.len() - num_with(Verdict::Unscored);
        let all = answers.iter().map(|(answer, _)| *answer);
        GenerationMetrics {
            tokens_per_forward: tokens_per_forward(all.clone()).unwrap_or(0.0),
            tokens_per_forward_finished: tokens_per_forward(all.clone().filter(|answer| is_finished(answer))),
            unfinished: all.filter(|answer| !is_finished(answer)).count(),
            accuracy: (num_scored > 0).then(|| num_with(Verdict::Correct) as f64 / num_scored as f64),
        }
    }
}

impl GenerationMetrics {
    /// `2.41 tokens per forward, accuracy 91.0 %, 2 unfinished`
    pub fn text(&self) -> String {
        let speed = match self.tokens_per_forward_finished {
            Some(speed) => format!("{speed:.2} tokens per forward"),
            None => "no answer ended".to_owned(),
        };
        let accuracy = self.accuracy.map_or_else(String::new, |value| format!(", accuracy {:.1} %", 100.0 * value));
        let unfinished = if self.unfinished > 0 { format!(", {} unfinished", self.unfinished) } else { String::new() };
        format!("{speed}{accuracy}{unfinished}")
    }
}

/// `None` without forwards.
fn tokens_per_forward<'a>(answers: impl Iterator<Item = &'a Answer>) -> Option<f64> {
    let (num_tokens, num_forwards) = answers.fold((0, 0), |(num_tokens, num_forwards), answer| {
        (num_tokens + answer.response_ids.len(), num_forwards + answer.num_forwards)
    });
    (num_forwards > 0).then(|| num_tokens as f64 / num_forwards as f64)
}

#[cfg(test)]
mod tests {
    use cllm_core::decode::Timing;

    use super::*;

    #[test]
    fn unfinished_and_unscored_answers_are_counted_separately() {
        let answer = |num_tokens: usize, num_forwards: usize, finish_reason| Answer {
            thought: None,
            response_ids: vec![1; num_tokens],
            num_forwards,
            finish_reason,
            num_new_tokens: Vec::new(),
            num_window_tokens: 0,
            num_probes: 0,
            blocks: Vec::new(),
            timing: Timing::default(),
        };
        let (short, long) = (answer(10, 5, FinishReason::Eos), answer(20, 10, FinishReason::Eos));
        let looping = answer(90, 10, FinishReason::Length);
        let finished = GenerationMetrics::from_answers(&[(&short, Verdict::Correct), (&long, Verdict::Unscored)]);
        let expected = GenerationMetrics {
            tokens_per_forward: 2.0,
            tokens_per_forward_finished: Some(2.0),
            unfinished: 0,
            accuracy: Some(1.0),
        };
        assert_eq!(finished, expected);
        let mixed = GenerationMetrics::from_answers(&[(&short, Verdict::Correct), (&looping, Verdict::Incorrect)]);
        assert_eq!((mixed.tokens_per_forward_finished, mixed.unfinished, mixed.accuracy), (Some(2.0), 1, Some(0.5)));
        assert!(mixed.tokens_per_forward > 6.0);
        assert_eq!(mixed.text(), "2.00 tokens per forward, accuracy 50.0 %, 1 unfinished");
        assert_eq!(finished.text(), "2.00 tokens per forward, accuracy 100.0 %");
        let unscored = GenerationMetrics::from_answers(&[(&looping, Verdict::Unscored)]);
        assert_eq!((unscored.tokens_per_forward_finished, unscored.accuracy), (None, None));
        assert_eq!(unscored.text(), "no answer ended, 1 unfinished");
    }
}
