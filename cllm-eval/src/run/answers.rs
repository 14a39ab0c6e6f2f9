//! Answers all examples in batches, to measure accuracy and tokens per forward.

use std::cmp::Reverse;

use cllm_core::cuda::libtorch;
use cllm_core::decode::{Answer, Decoder, Strategy, Timing};
use cllm_core::progress::Progress;
use cllm_core::task::Verdict;
use cllm_core::thought::Thought;
use cllm_core::{Result, interrupt};

use super::models::{LoadedModel, decode_options};
use super::session::Session;
use crate::detokenize::split_by_forward;
use crate::mt_bench_turns;
use crate::records::AnswerRecord;

/// Number of leading examples that keep the text of each forward for reports.
pub(super) const NUM_EXAMPLES_WITH_TEXTS: usize = 5;

/// Answers the examples that the journal does not contain yet. Second turns come after all first
/// turns.
///
/// # Errors
/// When decoding, scoring or writing fails. Finished batches are in the journal.
pub(super) fn answer_examples(session: &mut Session<'_>, model: &mut LoadedModel, strategy: Strategy) -> Result<()> {
    let samples = session.samples;
    let mut is_answered = vec![false; samples.len()];
    for answer in session.journal.records().answers_of(model.role, strategy) {
        is_answered[answer.index] = true;
    }
    let (second, first): (Vec<usize>, Vec<usize>) = (0..samples.len())
        .filter(|&index| !is_answered[index])
        .partition(|&index| mt_bench_turns::is_second(&samples[index]));
    let num_open = first.len() + second.len();
    if num_open == 0 {
        return Ok(());
    }
    let num_answered = samples.len() - num_open;
    let title = format!("{} {strategy}", model.role);
    let mut progress = Progress::new(&title, num_answered as u64, samples.len() as u64);
    libtorch::reset_peak_gpu_memory(session.device);
    answer_in_batches(session, model, strategy, first, &mut progress)?;
    model.prompts.fill_second_turns(samples, session.journal.records().answers_of(model.role, strategy))?;
    answer_in_batches(session, model, strategy, second, &mut progress)?;
    progress.finish();
    Ok(())
}

fn answer_in_batches(
    session: &mut Session<'_>,
    model: &LoadedModel,
    strategy: Strategy,
    mut indices: Vec<usize>,
    progress: &mut Progress,
) -> Result<()> {
    if indices.is_empty() {
        return Ok(());
    }
    // Rows of similar length waste the least padding. The longest come first, so that running out
    // of memory shows at once.
    indices.sort_by_key(|&index| (Reverse(model.prompts.get(index).num_tokens()), index));
    let batch_size = session.settings.batch_size;
    let mut decoder = model.decoder(batch_size.min(indices.len()), &[strategy])?;
    for batch in indices.chunks(batch_size) {
        interrupt::check()?;
        let mut answers = answer_batch(session, model, &mut decoder, strategy, batch)?;
        session.scorer.score(&mut answers)?;
        session.journal.append_answers(answers)?;
        progress.advance(batch.len() as u64);
    }
    Ok(())
}

fn answer_batch(
    session: &Session<'_>,
    model: &LoadedModel,
    decoder: &mut Decoder<'_>,
    strategy: Strategy,
    batch: &[usize],
) -> Result<Vec<AnswerRecord>> {
    let requests: Vec<_> = batch.iter().map(|&index| model.prompts.get(index).request.clone()).collect();
    let options = decode_options(strategy, &session.settings);
    let (answers, timing) = decoder.answer(&requests, &model.prompts.stop, options, None)?;
    let per_answer = 1.0 / batch.len() as f64;
    let timing = Timing {
        prefill_seconds: timing.prefill_seconds * per_answer,
        decode_seconds: timing.decode_seconds * per_answer,
    };
    batch.iter().zip(answers).map(|(&index, answer)| record(session, model, strategy, index, answer, timing)).collect()
}

/// The record of an answer that is not scored yet.
fn record(
    session: &Session<'_>,
    model: &LoadedModel,
    strategy: Strategy,
    index: usize,
    answer: Answer,
    timing: Timing,
) -> Result<AnswerRecord> {
    let (sample, prompt, tokenizer) = (&session.samples[index], model.prompts.get(index), &model.prompts.tokenizer);
    let forced = answer.thought.as_ref().map_or(0..0, Thought::forced_tokens);
    let prompt_ids = &prompt.request.prompt_ids;
    let thought = || model.prompts.thought_tokens.as_ref()?.thought(prompt_ids, &answer.response_ids);
    let texts = || split_by_forward(tokenizer, prompt_ids, &answer.response_ids, &answer.num_new_tokens, forced);
    Ok(AnswerRecord {
        role: model.role,
        strategy,
        index,
        id: sample.id.clone(),
        source: sample.source.clone(),
        prompt: prompt.text.clone(),
        prompt_tokens: prompt.num_tokens(),
        reference: sample.reference.clone(),
        meta: sample.meta.clone(),
        text: tokenizer.decode_answer(prompt_ids, &answer.response_ids)?,
        verdict: Verdict::Unscored,
        alternative: None,
        finish_reason: answer.finish_reason,
        thought: answer.thought.or_else(thought),
        forwards: answer.num_forwards,
        forward_texts: (index < NUM_EXAMPLES_WITH_TEXTS).then(texts).transpose()?,
        response_ids: answer.response_ids,
        accepted: answer.num_new_tokens,
        batch_prefill_seconds: timing.prefill_seconds,
        batch_seconds: timing.decode_seconds,
        peak_memory_bytes: model.peak_memory_bytes(),
        logit_gap_at_difference: None,
    })
}
