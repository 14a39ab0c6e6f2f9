//! Times answers at batch 1.

use std::time::Instant;

use cllm_core::decode::{Decoder, Strategy};
use cllm_core::progress::Progress;
use cllm_core::{Error, Result, interrupt};

use super::answers::NUM_EXAMPLES_WITH_TEXTS;
use super::models::{LoadedModel, decode_options};
use super::session::Session;
use crate::records::SpeedRecord;

/// Times the examples that the journal does not contain yet. All models and strategies take turns
/// on each example, so that a machine that slows down slows all of them.
///
/// # Errors
/// When decoding or writing fails. Finished timings are in the journal.
pub(super) fn time_strategies(session: &mut Session<'_>, models: &[LoadedModel]) -> Result<()> {
    let mut decoders = decoders(session, models, 1)?;
    let turns = turns(session, models);
    let (num_timed, total) = (session.journal.records().speeds.len(), turns.len() * session.timed.len());
    let Some(&first) = session.timed.first().filter(|_| num_timed < total) else { return Ok(()) };
    let mut progress = Progress::new("speed at batch 1", num_timed as u64, total as u64);
    // Two rounds of warm-up: CUDA graphs are captured during the first steps of each size.
    for &(number, strategy) in turns.iter().chain(&turns) {
        interrupt::check()?;
        time_answer(session, &models[number], &mut decoders[number], strategy, first)?;
    }
    for (round, (number, strategy)) in in_turns(&turns, session.timed.len()) {
        interrupt::check()?;
        let (model, index) = (&models[number], session.timed[round]);
        if is_timed(session, model, strategy, index) {
            continue;
        }
        let speed = time_answer(session, model, &mut decoders[number], strategy, index)?;
        session.journal.append_speed(speed)?;
        progress.advance(1);
    }
    progress.finish();
    Ok(())
}

/// A model, by its position, and one of its strategies.
pub(super) type Turn = (usize, Strategy);

/// Every model with every strategy.
pub(super) fn turns(session: &Session<'_>, models: &[LoadedModel]) -> Vec<Turn> {
    let of_model = |(number, model): (usize, &LoadedModel)| {
        session.strategies_of(model.role).map(move |strategy| (number, strategy)).collect::<Vec<_>>()
    };
    models.iter().enumerate().flat_map(of_model).collect()
}

/// The turns of each round, with the number of the round. A different model and strategy goes first
/// in each, so that none always comes right after the same other.
pub(super) fn in_turns(turns: &[Turn], num_rounds: usize) -> impl Iterator<Item = (usize, Turn)> {
    let in_round = move |round: usize| (0..turns.len()).map(move |turn| (round, turns[(round + turn) % turns.len()]));
    (0..num_rounds).flat_map(in_round)
}

/// A decoder of each model for `rows` answers at once with any of its strategies.
///
/// # Errors
/// As [`Decoder::new`].
pub(super) fn decoders<'m>(session: &Session<'_>, models: &'m [LoadedModel], rows: usize) -> Result<Vec<Decoder<'m>>> {
    let strategies = |model: &LoadedModel| session.strategies_of(model.role).collect::<Vec<_>>();
    models.iter().map(|model| model.decoder(rows, &strategies(model))).collect()
}

fn is_timed(session: &Session<'_>, model: &LoadedModel, strategy: Strategy, index: usize) -> bool {
    session.journal.records().speeds_of(model.role, strategy).any(|speed| speed.index == index)
}

/// Answers one example at batch 1.
///
/// # Errors
/// When decoding fails.
pub(super) fn time_answer(
    session: &Session<'_>,
    model: &LoadedModel,
    decoder: &mut Decoder<'_>,
    strategy: Strategy,
    index: usize,
) -> Result<SpeedRecord> {
    let request = std::slice::from_ref(&model.prompts.get(index).request);
    let options = decode_options(strategy, &session.settings);
    let mut moments = Vec::new();
    let mut watch = |_: usize, _: &[i32]| moments.push(Instant::now());
    let (answers, timing) = decoder.answer(request, &model.prompts.stop, options, Some(&mut watch))?;
    let answer = answers.first().ok_or_else(|| Error::internal("decoding gave no answer"))?;
    let peak_memory_bytes =
        model.batch1_peak_bytes.iter().find(|(other, _)| *other == strategy).map(|&(_, peak_bytes)| peak_bytes);
    Ok(SpeedRecord {
        role: model.role,
        strategy,
        index,
        id: request[0].sample_id.clone(),
        tokens: answer.num_decoded_tokens(),
        forwards: answer.num_forwards,
        window_tokens: Some(answer.num_window_tokens),
        probes: answer.num_probes,
        finish_reason: answer.finish_reason,
        prefill_seconds: timing.prefill_seconds,
        seconds: timing.decode_seconds,
        forward_ends: (index < NUM_EXAMPLES_WITH_TEXTS).then(|| forward_ends(&moments, timing.decode_seconds)),
        peak_memory_bytes,
    })
}

/// When each forward had ended, in seconds of decoding, given the moments of their ends and the
/// duration of them all.
fn forward_ends(moments: &[Instant], decode_seconds: f64) -> Vec<f64> {
    let Some(&last) = moments.last() else { return Vec::new() };
    // The moment at which decoding began is not known, but when it ended is.
    moments.iter().map(|&moment| (decode_seconds - last.duration_since(moment).as_secs_f64()).max(0.0)).collect()
}
