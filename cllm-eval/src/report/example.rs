//! One example as every model and strategy answered it, with the text that each forward added.

use cllm_core::decode::Strategy;
use cllm_core::task::Verdict;
use serde::Serialize;

use super::animation::{PLAY_SECONDS, TimedAnswer, duration, playback_speed};
use crate::records::{AnswerRecord, Records};
use crate::results::{Results, StrategyResults, fastest};

/// Number of colours in the page's style; successive forwards cycle through them.
const NUM_COLOURS: usize = 5;
/// Of more answers than these, only those of the baselines and of the fastest strategies are shown.
const MAX_ANSWERS: usize = 8;
/// How many answers must be timed for those that are not to be left out.
const MIN_PLAYED: usize = 2;

#[derive(Debug, Serialize)]
pub(super) struct Example {
    id: String,
    prompt: String,
    reference: Option<String>,
    /// How it is played. `None` unless every answer was timed.
    playback: Option<Playback>,
    answers: Vec<ExampleAnswer>,
    /// Models and strategies whose answers cannot be played beside the others.
    left_out: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Playback {
    /// Decoding time of the slowest answer.
    seconds: f64,
    /// How long the answers play.
    play_seconds: f64,
    /// The speed in words.
    speed: String,
}

#[derive(Debug, Serialize)]
struct ExampleAnswer {
    /// Model and strategy.
    name: String,
    verdict: Verdict,
    num_tokens: usize,
    num_forwards: usize,
    /// Decoding time as text. `None` if it was not timed.
    duration: Option<String>,
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
    /// When it had ended, in seconds of decoding.
    end: Option<f64>,
    colour: usize,
}

impl Example {
    /// Picks an example among those that keep the text of each forward: one that was timed with as many
    /// strategies as possible and has a correct answer, if there is one. Strategies are left out whose
    /// timed answer had other forwards than the one with the texts, so that the others can be played.
    pub(super) fn choose(records: &Records, results: &Results) -> Option<Self> {
        let mut indices: Vec<usize> =
            records.answers.iter().filter(|answer| answer.forward_texts.is_some()).map(|answer| answer.index).collect();
        indices.sort_unstable();
        indices.dedup();
        let answers = |index: usize| -> Vec<&AnswerRecord> {
            records.answers.iter().filter(|answer| answer.index == index && answer.forward_texts.is_some()).collect()
        };
        let key = |&index: &usize| {
            let answers = answers(index);
            let num_untimed = answers.iter().filter(|answer| timing(records, answer).is_none()).count();
            (num_untimed, !answers.iter().any(|answer| answer.verdict == Verdict::Correct))
        };
        let answers = answers(indices.into_iter().min_by_key(key)?);
        let (timed, untimed): (Vec<_>, Vec<_>) =
            answers.iter().copied().partition(|answer| timing(records, answer).is_some());
        let (answers, left_out) = if timed.len() < MIN_PLAYED { (answers, Vec::new()) } else { (timed, untimed) };
        let answers = if answers.len() > MAX_ANSWERS { most_telling(&answers, results) } else { answers };
        let first = answers.first()?;
        let timings: Option<Vec<f64>> =
            answers.iter().map(|answer| Some(timing(records, answer)?.speed.seconds)).collect();
        Some(Example {
            id: first.id.clone(),
            prompt: first.prompt.clone(),
            reference: first.reference.clone(),
            playback: timings.map(|seconds| Playback::new(seconds.into_iter().fold(0.0, f64::max))),
            answers: answers.iter().map(|answer| ExampleAnswer::new(records, answer)).collect(),
            left_out: left_out.into_iter().map(name).collect(),
        })
    }
}

/// The answers of the baselines, and those of the fastest strategy of each model among `answers`.
fn most_telling<'r>(answers: &[&'r AnswerRecord], results: &Results) -> Vec<&'r AnswerRecord> {
    let is_fastest = |answer: &AnswerRecord| {
        let is_answered = |figures: &&StrategyResults| {
            answers.iter().any(|other| (other.role, other.strategy) == (answer.role, figures.strategy))
        };
        let model = results.model(answer.role);
        let fastest = model.and_then(|model| fastest(model.strategies.iter().filter(is_answered)));
        fastest.is_some_and(|fastest| fastest.strategy == answer.strategy)
    };
    answers.iter().copied().filter(|answer| answer.strategy == Strategy::Ar || is_fastest(answer)).collect()
}

fn name(answer: &AnswerRecord) -> String {
    format!("{} {}", answer.role, answer.strategy)
}

fn timing<'r>(records: &'r Records, answer: &AnswerRecord) -> Option<TimedAnswer<'r>> {
    TimedAnswer::find(records, (answer.role, answer.strategy), answer.index)
}

impl Playback {
    fn new(seconds: f64) -> Self {
        Playback { seconds, play_seconds: PLAY_SECONDS, speed: playback_speed(PLAY_SECONDS / seconds) }
    }
}

impl ExampleAnswer {
    fn new(records: &Records, answer: &AnswerRecord) -> Self {
        let timing = timing(records, answer);
        let ends = timing.as_ref().map(|timed| timed.speed.forward_ends());
        let forwards = answer.forward_texts.iter().flatten().zip(&answer.accepted).enumerate();
        ExampleAnswer {
            name: name(answer),
            verdict: answer.verdict,
            num_tokens: answer.num_decoded_tokens(),
            num_forwards: answer.forwards,
            duration: timing.map(|timed| duration(timed.speed.seconds)),
            text: answer.text.clone(),
            forwards: forwards
                .map(|(index, (text, &num_tokens))| Forward {
                    number: index + 1,
                    text: text.clone(),
                    num_tokens,
                    end: ends.as_ref().map(|ends| ends[index]),
                    colour: index % NUM_COLOURS,
                })
                .collect(),
        }
    }
}
