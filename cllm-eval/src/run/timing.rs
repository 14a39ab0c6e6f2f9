//! Times answers at batch 1.

use cllm_core::decode::{Decoder, Strategy};
use cllm_core::progress::Progress;
use cllm_core::{Error, Result, interrupt};

use super::models::{LoadedModel, decode_options};
use super::session::Session;
use crate::records::SpeedRecord;

/// Times the examples that the journal does not contain yet. All models and strategies take turns
/// on each example, so that a machine that slows down slows all of them.
///
/// # Errors
/// When decoding or writing fails. Finished timings are in the journal.
pub(super) fn time_strategies(session: &mut Session<'_>, models: &[LoadedModel]) -> Result<()> {
    let strategies = |model: &LoadedModel| session.settings.strategies_of(model.role).collect::<Vec<_>>();
    let mut decoders: Vec<Decoder<'_>> =
        models.iter().map(|model| model.decoder(1, &strategies(model))).collect::<Result<_>>()?;
    let turns: Vec<(usize, Strategy)> = models
        .iter()
        .enumerate()
        .flat_map(|(number, model)| strategies(model).into_iter().map(move |strategy| (number, strategy)))
        .collect();
    let (num_timed, total) = (session.journal.records().speeds.len(), turns.len() * session.timed.len());
    let Some(&first) = session.timed.first().filter(|_| num_timed < total) else { return Ok(()) };
    let mut progress = Progress::new("speed at batch 1", num_timed as u64, total as u64);
    // Two rounds of warm-up: CUDA graphs are captured during the first steps of each size.
    for &(number, strategy) in turns.iter().chain(&turns) {
        interrupt::check()?;
        time_answer(session, &models[number], &mut decoders[number], strategy, first)?;
    }
    for (round, index) in session.timed.clone().into_iter().enumerate() {
        for turn in 0..turns.len() {
            interrupt::check()?;
            // A different model and strategy goes first on each example, so that none always comes
            // right after a change of prompt.
            let (number, strategy) = turns[(round + turn) % turns.len()];
            let model = &models[number];
            if is_timed(session, model, strategy, index) {
                continue;
            }
            let speed = time_answer(session, model, &mut decoders[number], strategy, index)?;
            session.journal.append_speed(speed)?;
            progress.advance(1);
        }
    }
    progress.finish();
    Ok(())
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
    let (answers, timing) = decoder.answer(request, &model.prompts.stop, options, None)?;
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
        finish_reason: answer.finish_reason,
        prefill_seconds: timing.prefill_seconds,
        seconds: timing.decode_seconds,
        peak_memory_bytes,
    })
}
