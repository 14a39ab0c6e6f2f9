//! One example as an animated SVG: the teacher's autoregressive answer beside the student's
//! fastest, each forward's text appearing when that forward ended, on one common time scale.
//!
//! The animation is CSS inside the SVG, with no script, so that it also plays where an SVG is
//! embedded as an image, such as in a README. Without animation (and for readers who prefer reduced
//! motion) the picture is its own last frame.

mod drawing;
mod layout;
mod timed_answer;

use std::path::Path;

use cllm_core::decode::Strategy;
use cllm_core::task::Verdict;
use cllm_core::{Error, Result, atomic_file};

use crate::records::{Records, SAMPLES};
use crate::results::{self, Results, StrategyResults};
use crate::role::Role;
use drawing::Drawing;
pub(super) use drawing::{PLAY_SECONDS, duration, playback_speed};
use timed_answer::Contender;
pub(super) use timed_answer::TimedAnswer;

/// Writes the animation of an example of a run (its folder, or its samples.jsonl) to `output`.
/// Without an id, draws the first example that both sides answered correctly, or else the first
/// one.
///
/// # Errors
/// When no example has everything that is needed, or a file cannot be read or written.
pub fn animate(run: &Path, example: Option<&str>, output: &Path) -> Result<()> {
    let samples = if run.is_dir() { run.join(SAMPLES) } else { run.to_owned() };
    let records = Records::read(&samples)?;
    let contenders = contenders(&records).ok_or_else(|| {
        Error::file(&samples, "has no autoregressive answers beside those of another strategy: run both")
    })?;
    let pair = choose(&records, contenders, example).ok_or_else(|| {
        let which = example.map_or_else(|| "no example".to_owned(), |id| format!("no example `{id}`"));
        let [a, b] = contenders.map(|(role, strategy)| format!("{role} {strategy}"));
        Error::file(
            &samples,
            format!(
                "has {which} with timings and the text of each forward for both {a} and {b}: only the first 5 examples \
                 keep these texts, so run with limit=5 num_speed_examples=5"
            ),
        )
    })?;
    atomic_file::write(output, Drawing::new(&records.header, pair).to_svg().as_bytes())
}

/// The animation of the example that [`animate`] chooses; `None` if there is none.
pub(super) fn draw_first(records: &Records) -> Option<String> {
    let pair = choose(records, contenders(records)?, None)?;
    Some(Drawing::new(&records.header, pair).to_svg())
}

/// The autoregressive answers of the teacher (or the only model), and the fastest strategy that has an
/// example to draw, or else the fastest.
fn contenders(records: &Records) -> Option<[Contender; 2]> {
    let results = Results::from_records(records);
    let (role, fastest) = results.headline().filter(|(_, fastest)| fastest.strategy != Strategy::Ar)?;
    let baseline = results.model(Role::Teacher).or(results.model(role))?;
    baseline.autoregressive()?;
    // `n: auto` may have other forwards where it is timed than in the batches that give the texts.
    let is_drawn =
        |figures: &&StrategyResults| figures.strategy != Strategy::Ar && has_example(records, (role, figures.strategy));
    let drawn = results.model(role).and_then(|model| results::fastest(model.strategies.iter().filter(is_drawn)));
    Some([(baseline.model.role, Strategy::Ar), (role, drawn.unwrap_or(fastest).strategy)])
}

fn has_example(records: &Records, contender: Contender) -> bool {
    let mut answers = records.answers_of(contender.0, contender.1).filter(|answer| answer.forward_texts.is_some());
    answers.any(|answer| TimedAnswer::find(records, contender, answer.index).is_some())
}

/// The two answers to one example.
fn choose<'r>(records: &'r Records, contenders: [Contender; 2], id: Option<&str>) -> Option<[TimedAnswer<'r>; 2]> {
    let [(role, strategy), other] = contenders;
    let answers = records.answers_of(role, strategy).filter(|answer| id.is_none_or(|id| answer.id == id));
    let pairs = answers.filter_map(|answer| {
        let find = |contender| TimedAnswer::find(records, contender, answer.index);
        Some([find((role, strategy))?, find(other)?])
    });
    pairs.min_by_key(|pair| {
        let num_incorrect = pair.iter().filter(|one| one.answer.verdict != Verdict::Correct).count();
        (num_incorrect, pair[0].answer.index)
    })
}
