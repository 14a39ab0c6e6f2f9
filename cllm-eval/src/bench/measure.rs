//! The timings of a model.

use std::collections::BTreeMap;
use std::time::Instant;

use cllm_core::cuda::libtorch;
use cllm_core::decode::{Answer, DecodeOptions, Decoder, Request, StopConditions, Strategy, required_slots};
use cllm_core::model::Transformer;
use cllm_core::progress::Progress;
use cllm_core::prompt_set::Sample;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::FinishReason;
use cllm_core::{Error, Result, device, interrupt};
use tch::{Device, Kind, Tensor};

use super::{BenchSettings, Floor, ModelBench, StrategyBench};

/// Runs of a timing before the counted ones: the first steps of a size are recorded.
const WARM_UP: usize = 2;

pub(super) struct Bench<'m> {
    pub(super) model: &'m Transformer,
    pub(super) settings: &'m BenchSettings,
    /// Bytes of GPU memory that were in use before the model.
    pub(super) others: u64,
}

impl Bench<'_> {
    /// What needs no prompts of the user's.
    pub(super) fn steps(&self, name: String) -> Result<ModelBench> {
        let settings = self.settings;
        let mut sizes = settings.steps.clone();
        sizes.push(1);
        sizes.sort_unstable();
        sizes.dedup();
        let stop = StopConditions { max_new_tokens: settings.new_tokens, eos_ids: Vec::new() };
        let widest = Strategy::rolling(sizes.last().copied().unwrap_or(1).max(2));
        libtorch::reset_peak_gpu_memory(self.model.device());
        let mut decoder = Decoder::new(self.model, 1, required_slots(settings.prompt_tokens, &stop, widest))?;
        let mut progress = Progress::new("steps", 0, (sizes.len() + settings.batches.len()) as u64);
        let mut step_ms = BTreeMap::new();
        let mut prefill_ms = 0.0;
        for &n in &sizes {
            let strategy = if n == 1 { Strategy::Ar } else { Strategy::rolling(n) };
            let runs = self.repeat(|| {
                let (answers, timing) =
                    decoder.answer(&[self.made_up(0)], &stop, DecodeOptions::greedy(strategy, 0), None)?;
                let forwards: usize = answers.iter().map(|answer| answer.num_forwards).sum();
                Ok((timing.decode_seconds * 1e3 / forwards as f64, timing.prefill_seconds * 1e3))
            })?;
            step_ms.insert(n, median(runs.iter().map(|run| run.0)));
            prefill_ms = median(runs.iter().map(|run| run.1));
            progress.advance(1);
        }
        let peak_memory_bytes = self.peak();
        drop(decoder);
        let mut batch_tokens_per_second = BTreeMap::new();
        for &rows in &settings.batches {
            batch_tokens_per_second.insert(rows, self.batch(rows, &stop)?);
            progress.advance(1);
        }
        progress.finish();
        let one = step_ms[&1];
        Ok(ModelBench {
            name,
            parameters: self.model.config().num_parameters(),
            ar_tokens_per_second: 1e3 / one,
            transformers_ar_tokens_per_second: None,
            step_over_one: step_ms.iter().map(|(&n, &ms)| (n, ms / one)).collect(),
            step_ms,
            prefill_ms,
            batch_tokens_per_second,
            floor: self.floor(one)?,
            peak_memory_bytes,
            strategies: Vec::new(),
            collect_tokens_per_second: None,
            collect_tokens_per_forward: None,
            collect_responses: None,
            settings: settings.clone(),
        })
    }

    /// Autoregressive tokens per second of a batch.
    fn batch(&self, rows: usize, stop: &StopConditions) -> Result<f64> {
        let mut decoder =
            Decoder::new(self.model, rows, required_slots(self.settings.prompt_tokens, stop, Strategy::Ar))?;
        let requests: Vec<Request> = (0..rows).map(|row| self.made_up(row)).collect();
        let rates = self.repeat(|| {
            let (answers, timing) = decoder.answer(&requests, stop, DecodeOptions::greedy(Strategy::Ar, 0), None)?;
            let tokens: usize = answers.iter().map(|answer| answer.response_ids.len()).sum();
            Ok(tokens as f64 / timing.decode_seconds)
        })?;
        Ok(median(rates.into_iter()))
    }

    /// Strategies, equality and collection, on a prompt set.
    pub(super) fn prompts(&self, samples: &[Sample], tokenizer: &Tokenizer, found: &mut ModelBench) -> Result<()> {
        let stop =
            StopConditions { max_new_tokens: self.settings.max_new_tokens, eos_ids: tokenizer.eos_ids().to_vec() };
        let requests: Vec<Request> = samples
            .iter()
            .map(|sample| {
                Ok(Request { sample_id: sample.id.clone(), prompt_ids: tokenizer.encode_prompt(&sample.prompt)?.1 })
            })
            .collect::<Result<_>>()?;
        if requests.is_empty() {
            return Err(Error::usage("the prompt set is empty: there is nothing to measure"));
        }
        let longest = requests.iter().map(|request| request.prompt_ids.len()).max().unwrap_or(0);
        let examples = &requests[..self.settings.examples.min(requests.len())];
        found.strategies = self.strategies(examples, longest, &stop)?;
        if self.settings.collect_rows > 0 {
            self.collect(requests, longest, &stop, found)?;
        }
        Ok(())
    }

    fn strategies(&self, examples: &[Request], longest: usize, stop: &StopConditions) -> Result<Vec<StrategyBench>> {
        let turns: Vec<Strategy> = [Strategy::Ar].into_iter().chain(self.settings.strategies.iter().copied()).collect();
        let mut progress = Progress::new("strategies", 0, (turns.len() * examples.len()) as u64);
        let decoder = |&strategy: &Strategy| {
            let mut decoder = Decoder::new(self.model, 1, required_slots(longest, stop, strategy))?;
            for _ in 0..WARM_UP {
                decoder.answer(&examples[..1], stop, DecodeOptions::greedy(strategy, 0), None)?;
            }
            Ok(decoder)
        };
        // Each alone beside the weights, before all of them are there.
        let peak = |strategy| {
            libtorch::reset_peak_gpu_memory(self.model.device());
            decoder(strategy).map(|_| self.peak())
        };
        let peaks: Vec<Option<u64>> = turns.iter().map(peak).collect::<Result<_>>()?;
        let mut decoders: Vec<Decoder<'_>> = turns.iter().map(decoder).collect::<Result<_>>()?;
        let mut answers: Vec<Vec<Timed>> = turns.iter().map(|_| Vec::new()).collect();
        for (index, example) in examples.iter().enumerate() {
            interrupt::check()?;
            for turn in 0..turns.len() {
                // Another one begins each time, so that a machine that slows down slows all of them.
                let turn = (index + turn) % turns.len();
                let options = DecodeOptions::greedy(turns[turn], 0);
                let (mut answer, timing) = decoders[turn].answer(std::slice::from_ref(example), stop, options, None)?;
                let answer = answer.pop().ok_or_else(|| Error::internal("decoding gave no answer"))?;
                answers[turn].push(Timed { answer, seconds: timing.decode_seconds });
                progress.advance(1);
            }
        }
        progress.finish();
        let sums = turns.iter().zip(&answers).zip(peaks);
        Ok(sums.map(|((&strategy, timed), peak)| summary(strategy, timed, &answers[0], peak)).collect())
    }

    /// Answers all prompts as a collection does.
    fn collect(
        &self,
        mut requests: Vec<Request>,
        longest: usize,
        stop: &StopConditions,
        found: &mut ModelBench,
    ) -> Result<()> {
        // Neighbours of like length, as in the shards of a collection.
        requests.sort_by_key(|request| request.prompt_ids.len());
        let strategy = Strategy::Jacobi { n: self.settings.collect_n };
        let options = DecodeOptions { record_trajectory: true, ..DecodeOptions::greedy(strategy, 0) };
        let rows = self.settings.collect_rows.min(requests.len());
        let mut decoder = Decoder::new(self.model, rows, required_slots(longest, stop, strategy))?;
        let mut progress = Progress::new("collect", 0, requests.len() as u64);
        let (mut tokens, mut forwards, mut responses) = (0, 0, 0);
        let started = Instant::now();
        decoder.stream(&mut requests.into_iter(), stop, options, &mut |_, answer| {
            tokens += answer.response_ids.len();
            forwards += answer.num_forwards;
            responses += 1;
            progress.advance(1);
            Ok(())
        })?;
        let seconds = started.elapsed().as_secs_f64();
        progress.finish();
        found.collect_tokens_per_second = Some(tokens as f64 / seconds);
        found.collect_tokens_per_forward = Some(tokens as f64 / forwards as f64);
        found.collect_responses = Some(responses);
        Ok(())
    }

    /// A prompt of made-up ids; the steps take the same time whatever they are.
    fn made_up(&self, row: usize) -> Request {
        let vocab = self.model.config().vocab_size as usize;
        let ids = (0..self.settings.prompt_tokens).map(|i| ((i * 7919 + row * 104_729) % vocab) as i32);
        Request { sample_id: format!("made-up-{row}"), prompt_ids: ids.collect() }
    }

    fn repeat<T>(&self, mut run: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
        for _ in 0..WARM_UP {
            run()?;
        }
        (0..self.settings.repeats)
            .map(|_| {
                interrupt::check()?;
                run()
            })
            .collect()
    }

    fn peak(&self) -> Option<u64> {
        libtorch::gpu_memory(self.model.device()).map(|(_, peak)| peak.saturating_sub(self.others))
    }

    fn floor(&self, step_ms: f64) -> Result<Floor> {
        let config = self.model.config();
        let element = self.model.kind().elt_size_in_bytes() as i64;
        // The embedding is read a row at a time, unless it is the output projection too.
        let table = config.vocab_size * config.hidden_size;
        let weights = config.num_parameters() - if config.tied_embeddings { 0 } else { table };
        let context = (self.settings.prompt_tokens + self.settings.new_tokens / 2) as i64;
        let cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim * context;
        let bytes = (element * (weights + cached)) as u64;
        let bandwidth = bandwidth(self.model.device())?;
        let ms = bytes as f64 / bandwidth * 1e3;
        Ok(Floor { bytes, bandwidth, ms, share: ms / step_ms })
    }
}

/// An answer and the seconds that it took after prefill.
struct Timed {
    answer: Answer,
    seconds: f64,
}

fn summary(strategy: Strategy, timed: &[Timed], plain: &[Timed], peak_memory_bytes: Option<u64>) -> StrategyBench {
    let tokens = |timed: &[Timed]| timed.iter().map(|one| one.answer.response_ids.len()).sum::<usize>() as f64;
    let rate = |timed: &[Timed]| tokens(timed) / timed.iter().map(|one| one.seconds).sum::<f64>();
    let forwards: usize = timed.iter().map(|one| one.answer.num_forwards).sum();
    let same = timed.iter().zip(plain).filter(|(one, ar)| one.answer.response_ids == ar.answer.response_ids).count();
    StrategyBench {
        strategy,
        examples: timed.len(),
        unfinished: timed.iter().filter(|one| one.answer.finish_reason == FinishReason::Length).count(),
        tokens_per_forward: tokens(timed) / forwards as f64,
        tokens_per_second: rate(timed),
        speedup_vs_ar: rate(timed) / rate(plain),
        exact_match_vs_ar: same as f64 / timed.len() as f64,
        peak_memory_bytes,
    }
}

/// Bytes per second of a large copy, read and written ones counted.
fn bandwidth(place: Device) -> Result<f64> {
    let bytes: i64 = if place.is_cuda() { 4 << 30 } else { 256 << 20 };
    let empty = || Tensor::f_zeros([bytes], (Kind::Uint8, place));
    let (from, mut to) = (empty()?, empty()?);
    let mut seconds = Vec::new();
    for _ in 0..WARM_UP + 10 {
        device::synchronize(place);
        let started = Instant::now();
        to.copy_(&from);
        device::synchronize(place);
        seconds.push(started.elapsed().as_secs_f64());
    }
    Ok(2.0 * bytes as f64 / median(seconds.into_iter().skip(WARM_UP)))
}

/// The middle value; the mean of the two middle ones of an even number.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), 2.0);
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()), 2.5);
    }
}
