//! Runs models on examples: batched for accuracy, one by one for speed.

use cllm_core::checkpoint::{self, hub};
use cllm_core::cuda::libtorch;
use cllm_core::decode::{
    DecodeOptions, Decoder, Request, StopConditions, Strategy, check_fits_context, required_slots,
};
use cllm_core::model::Transformer;
use cllm_core::progress::Progress;
use cllm_core::prompt_set::Sample;
use cllm_core::task::{ScoreContext, Task, Verdict};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device, interrupt, model};
use rayon::prelude::*;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use tch::Device;

use crate::config::RunSettings;
use crate::detokenize::split_by_forward;
use crate::mt_bench_turns;
use crate::records::{AnswerRecord, Journal, Line, ModelEntry, Records, SpeedRecord};
use crate::role::Role;
use crate::score::judge;

/// So many first examples keep the text of each forward, for reports.
const EXAMPLES_WITH_PIECES: usize = 5;

/// A model on its device, with its prompts.
pub struct Subject {
    /// Which.
    pub role: Role,
    /// The weights.
    pub model: Rc<Transformer>,
    /// The model that guesses for it in [`Strategy::Drafted`].
    pub draft_model: Option<Rc<Transformer>>,
    prompts: Prompts,
    /// Bytes of GPU memory that were in use before it was loaded.
    others: u64,
    /// Most bytes at batch 1, by strategy; empty on the CPU.
    speed_peaks: Vec<(Strategy, u64)>,
}

/// The examples as a model reads them.
pub struct Prompts {
    tokenizer: Tokenizer,
    stop: StopConditions,
    /// Rendered prompt and request of each example.
    each: Vec<(String, Request)>,
}

impl Prompts {
    /// Renders the examples for a model, before any of its weights are loaded: what does not fit is found before hours of work.
    ///
    /// # Errors
    /// When a file of the tokenizer is missing or broken, its template refuses a prompt, or a prompt does not fit the context.
    pub fn render(folder: &Path, samples: &[Sample], settings: &RunSettings) -> Result<Self> {
        let tokenizer = Tokenizer::load(folder)?;
        let config = checkpoint::load_config(folder)?;
        let eos_ids = eos_ids(settings.eos_ids.as_deref(), &tokenizer, folder, &config)?;
        let stop = StopConditions { max_new_tokens: settings.max_new_tokens, eos_ids };
        let each = samples
            .iter()
            .map(|sample| {
                let (text, prompt_ids) = tokenizer.encode_prompt(&sample.prompt)?;
                let request = Request { sample_id: sample.id.clone(), prompt_ids };
                // The answer to the first turn is still to come into the prompt of the second.
                let turns = if mt_bench_turns::is_second(sample) { 2 } else { 1 };
                let new = StopConditions { max_new_tokens: stop.max_new_tokens.saturating_mul(turns), ..stop.clone() };
                check_fits_context(&request, &new, config.max_positions)?;
                Ok((text, request))
            })
            .collect::<Result<_>>()?;
        Ok(Prompts { tokenizer, stop, each })
    }
}

/// The ids that end an answer: those given, or else the model's own.
///
/// # Errors
/// When one of them is no token of the model.
pub fn eos_ids(
    given: Option<&[i32]>,
    tokenizer: &Tokenizer,
    folder: &Path,
    config: &model::ModelConfig,
) -> Result<Vec<i32>> {
    let ids = given.unwrap_or_else(|| tokenizer.eos_ids());
    if let Some(id) = ids.iter().find(|&&id| i64::from(id) >= config.vocab_size || id < 0) {
        let (folder, vocab_size) = (folder.display(), config.vocab_size);
        return Err(Error::usage(format!("eos_ids: {id} is no token of {folder}, which has {vocab_size}")));
    }
    Ok(ids.to_vec())
}

/// Finds a model and says what it is, without loading its weights.
///
/// # Errors
/// When there is no such model.
pub fn identify(role: Role, name: &str) -> Result<(PathBuf, ModelEntry)> {
    let folder = hub::locate(name)?;
    let config = checkpoint::load_config(&folder)?;
    checkpoint::check(&folder)?;
    let entry = ModelEntry {
        role,
        path: folder.display().to_string(),
        fingerprint: checkpoint::fingerprint(&folder)?,
        parameters: config.num_parameters(),
    };
    Ok((folder, entry))
}

impl Subject {
    /// Loads a model.
    ///
    /// # Errors
    /// When a file of the model is missing or broken.
    pub fn load(role: Role, folder: &Path, prompts: Prompts, device: Device) -> Result<Self> {
        let others = libtorch::gpu_memory(device).map_or(0, |(current, _)| current);
        let model = checkpoint::load(folder, device, device::default_kind(device))?;
        Ok(Subject { role, model: Rc::new(model), draft_model: None, prompts, others, speed_peaks: Vec::new() })
    }

    /// Tokens of an example's prompt.
    pub fn prompt_ids(&self, index: usize) -> &[i32] {
        &self.prompts.each[index].1.prompt_ids
    }

    /// Puts the answers of a strategy to the first turns into the prompts of the second ones, where there are such.
    ///
    /// # Errors
    /// When the template refuses a prompt.
    pub fn fill_second_turns(&mut self, samples: &[Sample], strategy: Strategy, records: &Records) -> Result<()> {
        let mine = |answer: &&AnswerRecord| answer.role == self.role && answer.strategy == strategy;
        for first in records.answers.iter().filter(mine) {
            let index = first.index + 1;
            let Some(sample) = samples.get(index).filter(|sample| mt_bench_turns::is_second(sample)) else { continue };
            let (text, prompt_ids) =
                self.prompts.tokenizer.encode_prompt(&mt_bench_turns::conversation(sample, &first.text)?)?;
            self.prompts.each[index] = (text, Request { sample_id: sample.id.clone(), prompt_ids });
        }
        Ok(())
    }

    /// Answers all examples in batches; those that `records` has already are left. Second turns come after all first ones.
    ///
    /// # Errors
    /// What decoding, scoring or writing fails with; what was finished is kept.
    pub fn answer_all(
        &mut self,
        samples: &[Sample],
        strategy: Strategy,
        settings: &RunSettings,
        (task, by): (Task, ScoreContext<'_>),
        records: &mut Records,
        journal: &mut Journal,
    ) -> Result<()> {
        let mut done = vec![false; samples.len()];
        let mine = |answer: &&AnswerRecord| answer.role == self.role && answer.strategy == strategy;
        records.answers.iter().filter(mine).for_each(|answer| done[answer.index] = true);
        let open: Vec<usize> = (0..samples.len()).filter(|&index| !done[index]).collect();
        if open.is_empty() {
            return Ok(());
        }
        let title = format!("{} {}", self.role.name(), strategy.to_string());
        let finished = samples.len() - open.len();
        let mut progress = Progress::new(&title, finished as u64, samples.len() as u64);
        libtorch::reset_peak_gpu_memory(self.model.device());
        let (second, first): (Vec<usize>, Vec<usize>) =
            open.into_iter().partition(|&index| mt_bench_turns::is_second(&samples[index]));
        self.answer_open(first, samples, strategy, settings, (task, by), (records, journal, &mut progress))?;
        self.fill_second_turns(samples, strategy, records)?;
        self.answer_open(second, samples, strategy, settings, (task, by), (records, journal, &mut progress))?;
        progress.finish();
        Ok(())
    }

    fn answer_open(
        &self,
        mut open: Vec<usize>,
        samples: &[Sample],
        strategy: Strategy,
        settings: &RunSettings,
        scoring: (Task, ScoreContext<'_>),
        (records, journal, progress): (&mut Records, &mut Journal, &mut Progress),
    ) -> Result<()> {
        if open.is_empty() {
            return Ok(());
        }
        // Rows of like length waste least padding; the longest first, so that memory that does not suffice shows at once.
        open.sort_by_key(|&index| (std::cmp::Reverse(self.prompts.each[index].1.prompt_ids.len()), index));
        let mut decoder = self.decoder(settings.batch_size.min(open.len()), &[strategy])?;
        for batch in open.chunks(settings.batch_size) {
            interrupt::check()?;
            let answers = self.answer_batch(&mut decoder, samples, batch, strategy, settings, scoring)?;
            let lines: Vec<_> = answers.iter().cloned().map(|answer| Line::Answer(Box::new(answer))).collect();
            journal.append(&lines)?;
            records.answers.extend(answers);
            progress.advance(batch.len() as u64);
        }
        Ok(())
    }

    /// A decoder with room for so many answers to any of the prompts, and with the drafter where a strategy has one.
    fn decoder(&self, rows: usize, strategies: &[Strategy]) -> Result<Decoder<'_>> {
        let longest = self.prompts.each.iter().map(|(_, request)| request.prompt_ids.len()).max().unwrap_or(0);
        let needed = |&strategy: &Strategy| required_slots(longest, &self.prompts.stop, strategy);
        let decoder = Decoder::new(&self.model, rows, strategies.iter().map(needed).max().unwrap_or(0))?;
        match &self.draft_model {
            Some(draft_model) if strategies.iter().any(|strategy| strategy.needs_draft_model()) => {
                decoder.with_draft_model(draft_model)
            }
            _ => Ok(decoder),
        }
    }

    fn answer_batch(
        &self,
        decoder: &mut Decoder<'_>,
        samples: &[Sample],
        batch: &[usize],
        strategy: Strategy,
        settings: &RunSettings,
        (task, by): (Task, ScoreContext<'_>),
    ) -> Result<Vec<AnswerRecord>> {
        let device = self.model.device();
        let requests: Vec<_> = batch.iter().map(|&index| self.prompts.each[index].1.clone()).collect();
        let options = options(strategy, settings);
        let (answers, timing) = decoder.answer(&requests, &self.prompts.stop, options, None)?;
        let peak_memory_bytes = libtorch::gpu_memory(device).map(|(_, peak)| peak.saturating_sub(self.others));
        let share = 1.0 / batch.len() as f64;
        let mut found = Vec::with_capacity(batch.len());
        for ((&index, request), answer) in batch.iter().zip(&requests).zip(answers) {
            let sample = &samples[index];
            let shown = index < EXAMPLES_WITH_PIECES;
            found.push(AnswerRecord {
                role: self.role,
                strategy,
                index,
                id: sample.id.clone(),
                source: sample.source.clone(),
                prompt: self.prompts.each[index].0.clone(),
                prompt_tokens: request.prompt_ids.len(),
                reference: sample.reference.clone(),
                meta: sample.meta.clone(),
                text: self.prompts.tokenizer.decode(&answer.response_ids)?,
                verdict: Verdict::Unscored,
                finish_reason: answer.finish_reason,
                forwards: answer.num_forwards,
                forward_texts: shown
                    .then(|| split_by_forward(&self.prompts.tokenizer, &answer.response_ids, &answer.num_new_tokens))
                    .transpose()?,
                response_ids: answer.response_ids,
                accepted: answer.num_new_tokens,
                batch_prefill_seconds: timing.prefill_seconds * share,
                batch_seconds: timing.decode_seconds * share,
                peak_memory_bytes,
                logit_gap_at_difference: None,
            });
        }
        let score = |answer: &AnswerRecord| judge(task, by, answer);
        let verdicts: Vec<Verdict> = found.par_iter().map(score).collect::<Result<_>>()?;
        for (answer, verdict) in found.iter_mut().zip(verdicts) {
            answer.verdict = verdict;
        }
        Ok(found)
    }

    /// Measures how much memory each strategy takes at batch 1, of this model alone, with the longest prompt of the timed
    /// examples; nothing on the CPU. It is apart from the timing, whose decoders hold room for every strategy, and whose
    /// recorded steps allocate nothing when they are replayed.
    ///
    /// # Errors
    /// What decoding fails with.
    pub fn measure_memory(&mut self, strategies: &[Strategy], settings: &RunSettings, timed: &[usize]) -> Result<()> {
        let device = self.model.device();
        let length = |&index: &usize| self.prompts.each[index].1.prompt_ids.len();
        let Some(longest) = timed.iter().copied().max_by_key(length) else { return Ok(()) };
        for &strategy in strategies.iter().filter(|_| device.is_cuda()) {
            interrupt::check()?;
            libtorch::reset_peak_gpu_memory(device);
            self.time_one(&mut self.decoder(1, &[strategy])?, longest, strategy, settings)?;
            if let Some((_, peak)) = libtorch::gpu_memory(device) {
                self.speed_peaks.push((strategy, peak.saturating_sub(self.others)));
            }
        }
        Ok(())
    }

    fn time_one(
        &self,
        decoder: &mut Decoder<'_>,
        index: usize,
        strategy: Strategy,
        settings: &RunSettings,
    ) -> Result<SpeedRecord> {
        let request = std::slice::from_ref(&self.prompts.each[index].1);
        let options = options(strategy, settings);
        let (answers, timing) = decoder.answer(request, &self.prompts.stop, options, None)?;
        let answer = answers.first().ok_or_else(|| Error::internal("decoding gave no answer"))?;
        Ok(SpeedRecord {
            role: self.role,
            strategy,
            index,
            id: request[0].sample_id.clone(),
            tokens: answer.response_ids.len(),
            forwards: answer.num_forwards,
            finish_reason: answer.finish_reason,
            prefill_seconds: timing.prefill_seconds,
            seconds: timing.decode_seconds,
            peak_memory_bytes: self.speed_peaks.iter().find(|(of, _)| *of == strategy).map(|&(_, peak)| peak),
        })
    }
}

fn options(strategy: Strategy, settings: &RunSettings) -> DecodeOptions {
    DecodeOptions { sampling: settings.sampling(), ..DecodeOptions::greedy(strategy, settings.seed) }
}

/// The examples to time: so many, spread evenly over all of them, since neighbours are often alike (of one database, say).
pub fn timed(count: usize, examples: usize) -> Vec<usize> {
    let count = count.min(examples);
    (0..count).map(|number| number * examples / count).collect()
}

/// Times examples at batch 1. Models and strategies take turns on each example, so that a machine that slows
/// down slows all of them.
///
/// # Errors
/// What decoding or writing fails with; what was timed is kept.
pub fn time_all(
    subjects: &[Subject],
    settings: &RunSettings,
    examples: &[usize],
    records: &mut Records,
    journal: &mut Journal,
) -> Result<()> {
    let of = |subject: &Subject| settings.strategies_of(subject.role).collect::<Vec<_>>();
    let mut decoders: Vec<Decoder<'_>> =
        subjects.iter().map(|subject| subject.decoder(1, &of(subject))).collect::<Result<_>>()?;
    let turns: Vec<(usize, Strategy)> = subjects
        .iter()
        .enumerate()
        .flat_map(|(number, subject)| of(subject).into_iter().map(move |strategy| (number, strategy)))
        .collect();
    let has = |records: &Records, subject: &Subject, strategy: Strategy, index: usize| {
        let same =
            |speed: &SpeedRecord| speed.role == subject.role && speed.strategy == strategy && speed.index == index;
        records.speeds.iter().any(same)
    };
    let done = records.speeds.len();
    let total = turns.len() * examples.len();
    let Some(&first) = examples.first().filter(|_| done < total) else { return Ok(()) };
    let mut progress = Progress::new("speed at batch 1", done as u64, total as u64);
    // Twice: the first steps of a size are recorded, and from the third on they run as they will.
    for &(subject, strategy) in turns.iter().chain(&turns) {
        interrupt::check()?;
        subjects[subject].time_one(&mut decoders[subject], first, strategy, settings)?;
    }
    for (number, &index) in examples.iter().enumerate() {
        for turn in 0..turns.len() {
            interrupt::check()?;
            // Another one begins each time: none is always the first after a change of example.
            let (model, strategy) = turns[(number + turn) % turns.len()];
            let subject = &subjects[model];
            if has(records, subject, strategy, index) {
                continue;
            }
            let speed = subject.time_one(&mut decoders[model], index, strategy, settings)?;
            journal.append(&[Line::Speed(speed.clone())])?;
            records.speeds.push(speed);
            progress.advance(1);
        }
    }
    progress.finish();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timed_examples_are_spread() {
        assert_eq!(timed(3, 10), [0, 3, 6]);
        assert_eq!(timed(5, 4), [0, 1, 2, 3]);
        assert!(timed(0, 4).is_empty() && timed(3, 0).is_empty());
    }
}
