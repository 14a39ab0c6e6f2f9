//! The timings of one model.

use std::collections::BTreeMap;
use std::time::Instant;

use cllm_core::cuda::libtorch;
use cllm_core::decode::{
    Answer, DecodeOptions, Decoder, Request, StopConditions, Strategy, attention_seconds, required_slots,
};
use cllm_core::environment::Hardware;
use cllm_core::model::{AdaptedTokens, LoraConfig, Transformer};
use cllm_core::progress::Progress;
use cllm_core::prompt_set::Sample;
use cllm_core::statistics::median;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::FinishReason;
use cllm_core::{Error, Result, device, interrupt};
use tch::{Device, Kind, Tensor};

use super::record::{CollectionBench, DecodeBench, GatedBench, MemoryFloor, StrategyBench};
use super::settings::{BenchSettings, GatedBenchSettings};

/// Number of warm-up repetitions: the first steps of each size are captured as CUDA graphs.
const NUM_WARM_UPS: usize = 2;
const NUM_COPIES: usize = 10;

pub(super) struct Bench<'m> {
    pub(super) model: &'m Transformer,
    pub(super) settings: &'m BenchSettings,
    /// GPU memory in use before the model was loaded, in bytes.
    pub(super) other_memory_bytes: u64,
}

impl Bench<'_> {
    /// Measures what needs no prompts: steps, prefill, batches and memory.
    pub(super) fn measure_steps(&self, name: String) -> Result<DecodeBench> {
        let settings = self.settings;
        settings.gated.iter().try_for_each(|gated| draft_adapters(gated).check(self.model.config()))?;
        let mut sizes = settings.step_tokens.clone();
        sizes.push(1);
        sizes.sort_unstable();
        sizes.dedup();
        let num_batch_timings = settings.batch_sizes.len() * (1 + settings.batch_step_tokens.len());
        let mut progress = Progress::new("steps", 0, (sizes.len() + num_batch_timings) as u64);
        libtorch::reset_peak_gpu_memory(self.model.device());
        let (step_ms, prefill_ms) = self.time_steps(&sizes, &mut progress)?;
        let peak_memory_bytes = self.peak_memory_bytes();
        let attention_ms = self.time_attention(&sizes)?;
        let (mut batch_tokens_per_second, mut batch_step_ms) = (BTreeMap::new(), BTreeMap::new());
        for &batch_size in &settings.batch_sizes {
            batch_tokens_per_second.insert(batch_size, self.time_batch(batch_size)?);
            progress.advance(1);
            if !settings.batch_step_tokens.is_empty() {
                batch_step_ms.insert(batch_size, self.time_batch_steps(batch_size, &mut progress)?);
            }
        }
        progress.finish();
        let single_ms = step_ms[&1];
        let gated = settings.gated.as_ref().map(|gated| self.measure_gated(gated, single_ms)).transpose()?;
        Ok(DecodeBench {
            name,
            parameters: self.model.config().num_parameters(),
            ar_tokens_per_second: 1e3 / single_ms,
            transformers_ar_tokens_per_second: None,
            transformers_compiled_ar_tokens_per_second: None,
            relative_step_time: step_ms.iter().map(|(&num_tokens, &ms)| (num_tokens, ms / single_ms)).collect(),
            step_ms,
            attention_ms,
            prefill_ms,
            batch_tokens_per_second,
            batch_step_ms,
            gated,
            memory_floor: self.memory_floor(single_ms)?,
            peak_memory_bytes,
            strategies: Vec::new(),
            collections: Vec::new(),
            settings: settings.clone(),
        })
    }

    /// Measures steps of strategy `gated`, with random adapters beside the model's weights.
    fn measure_gated(&self, gated: &GatedBenchSettings, single_ms: f64) -> Result<GatedBench> {
        let lora = draft_adapters(gated);
        let peak_of_ar = self
            .peak_memory_of(|| self.time_step(&mut self.step_decoder(Strategy::Ar, 1)?, 1, Strategy::Ar).map(drop))?;
        let mut adapted = self.model.without_adapters();
        adapted.add_adapters_for_decoding(&lora, 0);
        let bench = Bench { model: &adapted, ..*self };
        let mut gated_step_ms = BTreeMap::new();
        let peak = self.peak_memory_of(|| {
            for n in self.settings.gated_windows() {
                let strategy = Strategy::gated(n);
                let (ms, _) = bench.time_step(&mut bench.step_decoder(strategy, 1)?, 1, strategy)?;
                gated_step_ms.insert(n, ms);
            }
            Ok(())
        })?;
        Ok(GatedBench {
            rank: lora.rank,
            targets: lora.targets,
            first_layer: lora.first_layer,
            relative_step_time: gated_step_ms.iter().map(|(&n, &ms)| (n, ms / single_ms)).collect(),
            gated_step_ms,
            memory_over_ar: peak.zip(peak_of_ar).map(|(peak, of_ar)| peak as f64 / of_ar as f64),
        })
    }

    /// Peak GPU memory during some work.
    fn peak_memory_of(&self, work: impl FnOnce() -> Result<()>) -> Result<Option<u64>> {
        libtorch::reset_peak_gpu_memory(self.model.device());
        work()?;
        Ok(self.peak_memory_bytes())
    }

    /// Milliseconds of a step of each size, and of the prefill.
    fn time_steps(&self, sizes: &[usize], progress: &mut Progress) -> Result<(BTreeMap<usize, f64>, f64)> {
        let mut decoder = self.step_decoder(widest(sizes), 1)?;
        let mut step_ms = BTreeMap::new();
        let mut prefill_ms = 0.0;
        for &num_tokens in sizes {
            let ms;
            (ms, prefill_ms) = self.time_step(&mut decoder, 1, step_strategy(num_tokens))?;
            step_ms.insert(num_tokens, ms);
            progress.advance(1);
        }
        Ok((step_ms, prefill_ms))
    }

    /// Milliseconds of a step of a batch, by the number of tokens that each row has in it.
    fn time_batch_steps(&self, batch_size: usize, progress: &mut Progress) -> Result<BTreeMap<usize, f64>> {
        let sizes = &self.settings.batch_step_tokens;
        let mut decoder = self.step_decoder(widest(sizes), batch_size)?;
        let time = |&num_tokens: &usize| {
            let (step_ms, _) = self.time_step(&mut decoder, batch_size, step_strategy(num_tokens))?;
            progress.advance(1);
            Ok((num_tokens, step_ms))
        };
        sizes.iter().map(time).collect()
    }

    /// A decoder for steps with windows of up to those of a strategy in each row.
    fn step_decoder(&self, strategy: Strategy, batch_size: usize) -> Result<Decoder<'_>> {
        let num_slots = required_slots(self.settings.num_prompt_tokens, &self.synthetic_stop(), strategy);
        Decoder::new(self.model, batch_size, num_slots)
    }

    /// Milliseconds of a step in which each row has a window of a strategy, and of the prefill.
    fn time_step(&self, decoder: &mut Decoder<'_>, batch_size: usize, strategy: Strategy) -> Result<(f64, f64)> {
        let stop = self.synthetic_stop();
        let requests: Vec<Request> = (0..batch_size).map(|row| self.synthetic_request(row)).collect();
        let timings = self.repeat(|| {
            let (answers, timing) = decoder.answer(&requests, &stop, DecodeOptions::greedy(strategy, 0), None)?;
            // Every step has all rows until the first of them ends.
            let seconds = |answer: &Answer| answer.timing.decode_seconds;
            let first = answers.iter().min_by(|one, other| seconds(one).total_cmp(&seconds(other)));
            let first = first.ok_or_else(|| Error::internal("decoding returned no answer"))?;
            Ok((seconds(first) * 1e3 / first.num_forwards as f64, timing.prefill_seconds * 1e3))
        })?;
        let median_of = |part: fn(&(f64, f64)) -> f64| median_time(timings.iter().map(part));
        Ok((median_of(|timing| timing.0)?, median_of(|timing| timing.1)?))
    }

    /// Milliseconds of the attention of a step of each size; empty if our kernels do not compute it.
    fn time_attention(&self, sizes: &[usize]) -> Result<BTreeMap<usize, f64>> {
        let mut attention_ms = BTreeMap::new();
        for &num_tokens in sizes {
            if let Some(seconds) = attention_seconds(self.model, num_tokens, self.mean_context())? {
                attention_ms.insert(num_tokens, seconds * 1e3);
            }
        }
        Ok(attention_ms)
    }

    /// The mean number of tokens in the cache while steps are timed.
    fn mean_context(&self) -> usize {
        self.settings.num_prompt_tokens + self.settings.num_new_tokens / 2
    }

    /// Autoregressive tokens per second of a batch.
    fn time_batch(&self, batch_size: usize) -> Result<f64> {
        let stop = self.synthetic_stop();
        let num_slots = required_slots(self.settings.num_prompt_tokens, &stop, Strategy::Ar);
        let mut decoder = Decoder::new(self.model, batch_size, num_slots)?;
        let requests: Vec<Request> = (0..batch_size).map(|row| self.synthetic_request(row)).collect();
        let speeds = self.repeat(|| {
            let (answers, timing) = decoder.answer(&requests, &stop, DecodeOptions::greedy(Strategy::Ar, 0), None)?;
            let num_tokens: usize = answers.iter().map(|answer| answer.response_ids.len()).sum();
            Ok(num_tokens as f64 / timing.decode_seconds)
        })?;
        median_time(speeds.into_iter())
    }

    /// Measures strategies, and collection if the settings ask for it. Without a prompt set, only
    /// collection is measured, on synthetic prompts.
    pub(super) fn measure_prompts(
        &self,
        prompts: Option<(Vec<Sample>, Tokenizer)>,
        record: &mut DecodeBench,
    ) -> Result<()> {
        let Some((samples, tokenizer)) = prompts else {
            let num_copies = 2;
            return self.measure_collections(&self.synthetic_stop(), record, |batch_size| {
                (0..num_copies * batch_size).map(|row| self.synthetic_request(row)).collect()
            });
        };
        let stop = StopConditions::new(self.settings.max_new_tokens, tokenizer.eos_ids().to_vec());
        let requests: Vec<Request> = samples
            .iter()
            .map(|sample| {
                let (_, prompt_ids) = tokenizer.encode_prompt(&sample.prompt)?;
                Ok(Request { sample_id: sample.id.clone(), prompt_ids })
            })
            .collect::<Result<_>>()?;
        let Some(max_prompt_tokens) = requests.iter().map(|request| request.prompt_ids.len()).max() else {
            return Err(Error::usage("the prompt set is empty: there is nothing to measure"));
        };
        let num_examples = self.settings.num_examples.min(requests.len());
        record.strategies = self.time_strategies(&requests[..num_examples], max_prompt_tokens, &stop)?;
        self.measure_collections(&stop, record, |_| requests.clone())
    }

    fn measure_collections(
        &self,
        stop: &StopConditions,
        record: &mut DecodeBench,
        requests: impl Fn(usize) -> Vec<Request>,
    ) -> Result<()> {
        for &batch_size in &self.settings.collect_batch_sizes {
            let work = self.time_collection(requests(batch_size), stop, batch_size)?;
            record.collections.push(self.collection_bench(&work, record.memory_floor.bandwidth_bytes_per_second));
        }
        Ok(())
    }

    fn time_strategies(
        &self,
        examples: &[Request],
        max_prompt_tokens: usize,
        stop: &StopConditions,
    ) -> Result<Vec<StrategyBench>> {
        let others = self.settings.strategies.iter().copied();
        let strategies: Vec<Strategy> = [Strategy::Ar].into_iter().chain(others).collect();
        let warm_decoder = |&strategy: &Strategy| {
            let num_slots = required_slots(max_prompt_tokens, stop, strategy);
            let mut decoder = Decoder::new(self.model, 1, num_slots)?;
            for _ in 0..NUM_WARM_UPS {
                decoder.answer(&examples[..1], stop, DecodeOptions::greedy(strategy, 0), None)?;
            }
            Ok(decoder)
        };
        // Memory is measured with one decoder at a time, before all of them are in memory.
        let peak_memory = |strategy| {
            libtorch::reset_peak_gpu_memory(self.model.device());
            warm_decoder(strategy).map(|_| self.peak_memory_bytes())
        };
        let peaks: Vec<Option<u64>> = strategies.iter().map(peak_memory).collect::<Result<_>>()?;
        let decoders: Vec<Decoder<'_>> = strategies.iter().map(warm_decoder).collect::<Result<_>>()?;
        let answers = time_in_turns(&strategies, decoders, examples, stop)?;
        let timed = strategies.iter().zip(&answers).zip(peaks);
        Ok(timed.map(|((&strategy, timed), peak)| StrategyBench::new(strategy, timed, &answers[0], peak)).collect())
    }

    /// Answers all prompts the way `cllm-data collect` does.
    fn time_collection(
        &self,
        mut requests: Vec<Request>,
        stop: &StopConditions,
        batch_size: usize,
    ) -> Result<CollectionWork> {
        // Similar lengths are neighbours, as in the shards of a collection.
        requests.sort_by_key(|request| request.prompt_ids.len());
        let prompt_tokens: Vec<usize> = requests.iter().map(|request| request.prompt_ids.len()).collect();
        let strategy = Strategy::Jacobi { n: self.settings.collect_n };
        let options = DecodeOptions { record_trajectory: true, ..DecodeOptions::greedy(strategy, 0) };
        let num_slots = required_slots(prompt_tokens.last().copied().unwrap_or(0), stop, strategy);
        let mut decoder = Decoder::new(self.model, batch_size.min(requests.len()), num_slots)?;
        // The first steps of each size are captured as CUDA graphs.
        let warm_up = requests[..batch_size.min(requests.len())].to_vec();
        let one_block = StopConditions::new(self.settings.collect_n, Vec::new());
        decoder.stream(&mut warm_up.into_iter(), &one_block, options, &mut |_, _| Ok(()))?;
        let mut progress = Progress::new("collect", 0, requests.len() as u64);
        let mut work = CollectionWork { batch_size, ..CollectionWork::default() };
        let started = Instant::now();
        decoder.stream(&mut requests.into_iter(), stop, options, &mut |index, answer| {
            work.add(prompt_tokens[index], &answer);
            progress.advance(1);
            Ok(())
        })?;
        work.seconds = started.elapsed().as_secs_f64();
        progress.finish();
        Ok(work)
    }

    fn collection_bench(&self, work: &CollectionWork, bandwidth_bytes_per_second: f64) -> CollectionBench {
        let config = self.model.config();
        let (batch_size, num_forwards) = (work.batch_size, work.num_forwards as f64);
        let head = (config.vocab_size * config.hidden_size) as f64;
        let embeddings = if config.tied_embeddings { head } else { 2.0 * head };
        let layers = config.num_parameters() as f64 - embeddings;
        // Each step reads the weights once for all sequences of the batch, and the keys and values of each.
        let element_bytes = self.model.kind().elt_size_in_bytes() as f64;
        let cached =
            (2 * config.num_layers * config.num_kv_heads * config.head_dim) as f64 * work.context_tokens as f64;
        let bytes = element_bytes * ((layers + head) * num_forwards / batch_size as f64 + cached);
        let window_tokens = work.num_window_tokens as f64;
        let flops = 2.0 * (layers * (work.num_prompt_tokens as f64 + window_tokens) + head * window_tokens);
        let peak_flops = Hardware::detect(self.model.device()).gpu_model().map(|gpu| gpu.bf16_flops);
        CollectionBench {
            batch_size,
            n: self.settings.collect_n,
            responses: work.num_responses,
            tokens_per_forward: work.num_tokens as f64 / num_forwards,
            mean_window_tokens: Some(window_tokens / num_forwards),
            tokens_per_second: work.num_tokens as f64 / work.seconds,
            fraction_of_bandwidth: Some(bytes / bandwidth_bytes_per_second / work.seconds),
            fraction_of_peak_flops: peak_flops.map(|peak| flops / peak / work.seconds),
        }
    }

    fn synthetic_stop(&self) -> StopConditions {
        StopConditions::new(self.settings.num_new_tokens, Vec::new())
    }

    fn synthetic_request(&self, row: usize) -> Request {
        let vocab_size = self.model.config().vocab_size as usize;
        let ids = (0..self.settings.num_prompt_tokens).map(|i| ((i * 7919 + row * 104_729) % vocab_size) as i32);
        Request { sample_id: format!("synthetic-{row}"), prompt_ids: ids.collect() }
    }

    /// The results of `num_repeats` runs, after the warm-up.
    fn repeat<T>(&self, mut run: impl FnMut() -> Result<T>) -> Result<Vec<T>> {
        for _ in 0..NUM_WARM_UPS {
            run()?;
        }
        (0..self.settings.num_repeats)
            .map(|_| {
                interrupt::check()?;
                run()
            })
            .collect()
    }

    fn peak_memory_bytes(&self) -> Option<u64> {
        libtorch::gpu_memory(self.model.device()).map(|(_, peak)| peak.saturating_sub(self.other_memory_bytes))
    }

    fn memory_floor(&self, step_ms: f64) -> Result<MemoryFloor> {
        let config = self.model.config();
        let element_bytes = self.model.kind().elt_size_in_bytes() as i64;
        // A step reads one row of the embedding, unless the embedding is also the output
        // projection.
        let embedding = config.vocab_size * config.hidden_size;
        let weights = config.num_parameters() - if config.tied_embeddings { 0 } else { embedding };
        let cached = 2 * config.num_layers * config.num_kv_heads * config.head_dim * self.mean_context() as i64;
        let bytes = (element_bytes * (weights + cached)) as u64;
        let bandwidth_bytes_per_second = measure_bandwidth(self.model.device())?;
        let ms = bytes as f64 / bandwidth_bytes_per_second * 1e3;
        Ok(MemoryFloor { bytes, bandwidth_bytes_per_second, ms, fraction_of_step: ms / step_ms })
    }
}

/// The strategy whose steps have so many tokens of each row.
fn step_strategy(num_tokens: usize) -> Strategy {
    if num_tokens == 1 { Strategy::Ar } else { Strategy::rolling(num_tokens) }
}

/// The one with the most tokens.
fn widest(sizes: &[usize]) -> Strategy {
    Strategy::rolling(sizes.iter().copied().max().unwrap_or(1).max(2))
}

/// What a collection did, summed over its responses.
#[derive(Default)]
struct CollectionWork {
    batch_size: usize,
    num_responses: usize,
    num_prompt_tokens: usize,
    num_tokens: usize,
    num_forwards: usize,
    num_window_tokens: u64,
    /// Tokens in the cache, summed over the forwards.
    context_tokens: usize,
    seconds: f64,
}

impl CollectionWork {
    fn add(&mut self, num_prompt_tokens: usize, answer: &Answer) {
        let num_tokens = answer.response_ids.len();
        self.num_responses += 1;
        self.num_prompt_tokens += num_prompt_tokens;
        self.num_tokens += num_tokens;
        self.num_forwards += answer.num_forwards;
        self.num_window_tokens += answer.num_window_tokens;
        self.context_tokens += answer.num_forwards * (num_prompt_tokens + num_tokens / 2);
    }
}

/// An answer and its decoding time after prefill.
struct TimedAnswer {
    answer: Answer,
    seconds: f64,
}

/// Answers every example with every strategy. A different strategy goes first on each example, so
/// that a machine that slows down affects all of them alike.
fn time_in_turns(
    strategies: &[Strategy],
    mut decoders: Vec<Decoder<'_>>,
    examples: &[Request],
    stop: &StopConditions,
) -> Result<Vec<Vec<TimedAnswer>>> {
    let mut progress = Progress::new("strategies", 0, (strategies.len() * examples.len()) as u64);
    let mut answers: Vec<Vec<TimedAnswer>> = strategies.iter().map(|_| Vec::new()).collect();
    for (number, example) in examples.iter().enumerate() {
        interrupt::check()?;
        for turn in 0..strategies.len() {
            let index = (number + turn) % strategies.len();
            let options = DecodeOptions::greedy(strategies[index], 0);
            let (mut answer, timing) = decoders[index].answer(std::slice::from_ref(example), stop, options, None)?;
            let answer = answer.pop().ok_or_else(|| Error::internal("decoding returned no answer"))?;
            answers[index].push(TimedAnswer { answer, seconds: timing.decode_seconds });
            progress.advance(1);
        }
    }
    progress.finish();
    Ok(answers)
}

impl StrategyBench {
    /// `ar` holds the autoregressive answers to the same prompts.
    fn new(strategy: Strategy, timed: &[TimedAnswer], ar: &[TimedAnswer], peak_memory_bytes: Option<u64>) -> Self {
        let num_tokens = |timed: &[TimedAnswer]| timed.iter().map(|one| one.answer.response_ids.len()).sum::<usize>();
        let speed = |timed: &[TimedAnswer]| num_tokens(timed) as f64 / timed.iter().map(|one| one.seconds).sum::<f64>();
        let num_forwards: usize = timed.iter().map(|one| one.answer.num_forwards).sum();
        let num_window_tokens: u64 = timed.iter().map(|one| one.answer.num_window_tokens).sum();
        let is_equal = |(one, ar): &(&TimedAnswer, &TimedAnswer)| one.answer.response_ids == ar.answer.response_ids;
        let num_equal = timed.iter().zip(ar).filter(is_equal).count();
        StrategyBench {
            strategy,
            examples: timed.len(),
            unfinished: timed.iter().filter(|one| one.answer.finish_reason == FinishReason::Length).count(),
            tokens_per_forward: num_tokens(timed) as f64 / num_forwards as f64,
            mean_window_tokens: Some(num_window_tokens as f64 / num_forwards as f64),
            tokens_per_second: speed(timed),
            speedup_vs_ar: speed(timed) / speed(ar),
            exact_match_vs_ar: num_equal as f64 / timed.len() as f64,
            peak_memory_bytes,
        }
    }
}

/// Bytes read and written per second by a large copy.
fn measure_bandwidth(device: Device) -> Result<f64> {
    let num_bytes: i64 = if device.is_cuda() { 4 << 30 } else { 256 << 20 };
    let zeros = || Tensor::f_zeros([num_bytes], (Kind::Uint8, device));
    let (source, mut target) = (zeros()?, zeros()?);
    let mut seconds = Vec::new();
    for _ in 0..NUM_WARM_UPS + NUM_COPIES {
        device::synchronize(device);
        let started = Instant::now();
        target.copy_(&source);
        device::synchronize(device);
        seconds.push(started.elapsed().as_secs_f64());
    }
    Ok(2.0 * num_bytes as f64 / median_time(seconds.into_iter().skip(NUM_WARM_UPS))?)
}

fn median_time(values: impl Iterator<Item = f64>) -> Result<f64> {
    median(values).ok_or_else(|| Error::internal("nothing was timed"))
}

fn draft_adapters(gated: &GatedBenchSettings) -> LoraConfig {
    let &GatedBenchSettings { rank, ref targets, first_layer } = gated;
    LoraConfig { rank, targets: targets.clone(), first_layer, on: AdaptedTokens::Drafts, ..LoraConfig::default() }
}
