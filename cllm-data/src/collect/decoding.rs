//! Decodes the prompts that have no response yet, and stores the answers as they finish.

use std::sync::mpsc;

use cllm_core::decode::{Answer, DecodeOptions, Decoder, StopConditions, Strategy, required_slots};
use cllm_core::model::Transformer;
use cllm_core::progress::{Progress, count};
use cllm_core::{Error, Result};

use super::prompts::RenderedPrompt;
use super::settings::Settings;
use super::shard_buffer::ShardBuffer;
use super::stats::Counts;
use super::teacher::Teacher;

/// Number of answers that may wait to be stored before decoding pauses.
const MAX_WAITING_ANSWERS: usize = 4096;
/// Number of answers stored at a time when decoding and storing take turns.
const ANSWERS_PER_TURN: usize = 64;

/// An answer with the index of its prompt.
type IndexedAnswer = (usize, Answer);

/// Gets each answer as it finishes.
type OnAnswer<'a> = dyn FnMut(usize, Answer) -> Result<()> + 'a;

/// Decodes the prompts that `buffer` has no response for, and returns the counts of the new rows.
pub(super) fn decode_missing(
    teacher: &Teacher,
    model: &Transformer,
    prompts: &[RenderedPrompt],
    settings: &Settings,
    buffer: &mut ShardBuffer<'_>,
    progress: &mut Progress,
) -> Result<Counts> {
    let order = buffer.missing_by_length();
    let Some(longest) = order.iter().map(|&index| prompts[index].ids.len()).max() else {
        return Ok(Counts::default());
    };
    let stop = StopConditions {
        thought_limit: teacher.thought_limit.clone(),
        ..StopConditions::new(settings.max_new_tokens, teacher.tokenizer.eos_ids().to_vec())
    };
    let strategy = Strategy::Jacobi { n: settings.n };
    let options = DecodeOptions { record_trajectory: true, ..DecodeOptions::greedy(strategy, settings.seed) };
    let batch_size = settings.batch_size.min(order.len());
    let mut decoder = Decoder::new(model, batch_size, required_slots(longest, &stop, strategy))?;
    let mut requests = order.iter().map(|&index| prompts[index].request());
    let decode = |on_answer: &mut OnAnswer<'_>| {
        let mut on_finish = |request: usize, answer| on_answer(order[request], answer);
        decoder.stream(&mut requests, &stop, options, &mut on_finish)
    };

    let mut counts = Counts::default();
    let store = |answers: Vec<IndexedAnswer>| -> Result<()> {
        let num_answers = answers.len() as u64;
        counts += buffer.store(answers)?;
        progress.set_message(count(counts.num_decoded_tokens(), "token"));
        progress.advance(num_answers);
        Ok(())
    };
    if model.device().is_cuda() {
        store_on_a_thread(decode, store)?;
    } else {
        store_in_turns(decode, store, ANSWERS_PER_TURN.min(settings.rows_per_shard))?;
    }
    Ok(counts)
}

/// Stores answers on another thread, so that the GPU never waits for scoring and writing.
fn store_on_a_thread(
    decode: impl FnOnce(&mut OnAnswer<'_>) -> Result<()>,
    mut store: impl FnMut(Vec<IndexedAnswer>) -> Result<()> + Send,
) -> Result<()> {
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel::<IndexedAnswer>(MAX_WAITING_ANSWERS);
        let storing = scope.spawn(move || -> Result<()> {
            while let Ok(first) = receiver.recv() {
                store(std::iter::once(first).chain(receiver.try_iter()).collect())?;
            }
            Ok(())
        });
        let decoded = decode(&mut |index, answer| {
            let stopped = |_| Error::internal("the thread that stores answers has ended early");
            sender.send((index, answer)).map_err(stopped)
        });
        drop(sender);
        // If storing failed, decoding failed because of it: report the cause.
        storing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        decoded
    })
}

/// Stores `answers_per_turn` answers at a time between two steps of decoding. On the CPU, decoding
/// uses all cores: a thread beside it would only slow it down.
fn store_in_turns(
    decode: impl FnOnce(&mut OnAnswer<'_>) -> Result<()>,
    mut store: impl FnMut(Vec<IndexedAnswer>) -> Result<()>,
    answers_per_turn: usize,
) -> Result<()> {
    let mut waiting = Vec::new();
    let decoded = decode(&mut |index, answer| {
        waiting.push((index, answer));
        if waiting.len() < answers_per_turn { Ok(()) } else { store(std::mem::take(&mut waiting)) }
    });
    store(waiting)?;
    decoded
}
