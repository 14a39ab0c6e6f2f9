//! Times continuous batching at several numbers of rows.

use cllm_core::decode::{Decoder, Request, Strategy, Timing};
use cllm_core::progress::Progress;
use cllm_core::trajectory::FinishReason;
use cllm_core::{Error, Result, interrupt};

use super::models::{LoadedModel, decode_options};
use super::session::Session;
use super::timing::{decoders, in_turns, turns};
use crate::records::ThroughputRecord;

/// Number of repetitions that are timed.
pub(super) const NUM_REPETITIONS: usize = 3;
/// Minimum number of requests for each row. With fewer, the batch would not be full for most of the
/// time, because rows run empty while the last answers end.
const MIN_REQUESTS_PER_ROW: usize = 8;

/// Measures the throughput that the journal does not contain yet. All models and strategies take
/// turns, as at batch 1. One row is batch 1, which is timed already.
///
/// # Errors
/// When decoding or writing fails. Finished repetitions are in the journal.
pub(super) fn measure_throughput(session: &mut Session<'_>, models: &[LoadedModel]) -> Result<()> {
    let batches: Vec<usize> = session.settings.concurrency.iter().copied().filter(|&rows| rows > 1).collect();
    batches.into_iter().try_for_each(|rows| measure_rows(session, models, rows).map_err(|error| name_rows(error, rows)))
}

fn measure_rows(session: &mut Session<'_>, models: &[LoadedModel], rows: usize) -> Result<()> {
    let turns = turns(session, models);
    let num_measured = session.journal.records().throughputs.iter().filter(|one| one.concurrency == rows).count();
    let total = NUM_REPETITIONS * turns.len();
    if num_measured >= total {
        return Ok(());
    }
    let mut decoders = decoders(session, models, rows)?;
    let mut progress = Progress::new(&format!("speed at {rows} rows"), num_measured as u64, total as u64);
    // The warm-up is a whole repetition, in which CUDA graphs of all sizes are captured.
    for &(number, strategy) in &turns {
        interrupt::check()?;
        measure(session, &models[number], &mut decoders[number], strategy, rows)?;
    }
    for (repetition, (number, strategy)) in in_turns(&turns, NUM_REPETITIONS) {
        interrupt::check()?;
        let model = &models[number];
        if is_measured(session, model, strategy, rows, repetition) {
            continue;
        }
        let record = measure(session, model, &mut decoders[number], strategy, rows)?;
        session.journal.append_throughput(ThroughputRecord { repetition, ..record })?;
        progress.advance(1);
    }
    progress.finish();
    Ok(())
}

fn is_measured(session: &Session<'_>, model: &LoadedModel, strategy: Strategy, rows: usize, repetition: usize) -> bool {
    let mut measured = session.journal.records().throughputs_of(model.role, strategy);
    measured.any(|one| (one.concurrency, one.repetition) == (rows, repetition))
}

/// Answers the timed examples, as often as there must be requests. The record is that of the first
/// repetition.
fn measure(
    session: &Session<'_>,
    model: &LoadedModel,
    decoder: &mut Decoder<'_>,
    strategy: Strategy,
    rows: usize,
) -> Result<ThroughputRecord> {
    let num_passes = (MIN_REQUESTS_PER_ROW * rows).div_ceil(session.timed.len());
    let indices = (0..num_passes).flat_map(|_| &session.timed);
    let requests: Vec<Request> = indices.map(|&index| model.prompts.get(index).request.clone()).collect();
    let options = decode_options(strategy, &session.settings);
    let (answers, timing) = decoder.answer(&requests, &model.prompts.stop, options, None)?;
    let mut of_answers = Timing::default();
    answers.iter().for_each(|answer| of_answers += answer.timing);
    Ok(ThroughputRecord {
        role: model.role,
        strategy,
        concurrency: rows,
        repetition: 0,
        answers: answers.len(),
        unfinished: answers.iter().filter(|answer| answer.finish_reason == FinishReason::Length).count(),
        tokens: answers.iter().map(|answer| answer.num_decoded_tokens()).sum(),
        forwards: answers.iter().map(|answer| answer.num_forwards).sum(),
        prefill_seconds: timing.prefill_seconds,
        seconds: timing.decode_seconds,
        answer_prefill_seconds: of_answers.prefill_seconds,
        answer_seconds: of_answers.decode_seconds,
    })
}

/// Names the setting where memory ran out.
fn name_rows(error: Error, rows: usize) -> Error {
    match error {
        Error::Torch(_) => Error::environment(format!(
            "concurrency={rows}, with caches of as many rows for all models at once: {error}"
        )),
        other => other,
    }
}
