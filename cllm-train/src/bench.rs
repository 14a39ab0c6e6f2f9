//! `bench`: how fast a run trains, and how near that is to what the device can do.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use cllm_core::bench_results::{BenchRecord, BenchResults};
use cllm_core::cuda::libtorch;
use cllm_core::distributed::ProcessGroup;
use cllm_core::environment::Hardware;
use cllm_core::model::{ModelPreset, Transformer};
use cllm_core::program::{SettingsArgs, print, print_json};
use cllm_core::{Error, Result, device, interrupt, progress, text_file};
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::data::dataset as examples;
use crate::data::loader::{Packer, StepBatches};
use crate::data::schedule::Schedule;
use crate::memory::Memory;
use crate::optimizer::{State, learning_rate};
use crate::settings::Settings;
use crate::step::Models;
use crate::trainer;

/// Steps before those that are timed.
const WARM_UP: usize = 3;

/// What `bench` is given beside the settings of the run.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    pub given: SettingsArgs,
    /// Steps that are timed, after three that warm up.
    #[arg(long, default_value_t = 20, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..))]
    steps: usize,
    /// Random weights of a known shape, with the vocabulary of the run's model, instead of its weights.
    #[arg(long)]
    shape: Option<ModelPreset>,
    /// What the model is called in the results; else its shape or the last part of its folder.
    #[arg(long)]
    name: Option<String>,
    /// What scripts/bench-train-transformers wrote, to stand beside.
    #[arg(long)]
    baseline: Option<PathBuf>,
    /// File of the results; other models that it holds of the same machine are kept.
    #[arg(long, default_value = "runs/bench-train.json")]
    results: PathBuf,
}

/// Figures of a model.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrainFigures {
    /// Its name.
    name: String,
    /// Number of weights.
    parameters: i64,
    /// Processes, each with a GPU of its own.
    processes: usize,
    /// Steps that were timed.
    steps: usize,
    /// Median of a step, the optimizer's part and waiting for batches included.
    step_seconds: f64,
    /// Packed tokens over seconds, in all timed steps.
    tokens_per_second: f64,
    /// Noisy blocks over seconds.
    blocks_per_second: f64,
    /// Responses over seconds.
    responses_per_second: f64,
    /// Mean tokens of a forward.
    tokens_per_batch: f64,
    /// Floating-point operations of a step over its time and the device's peak: 6 x parameters x tokens, and 12 x layers x
    /// width of all heads for each pair of tokens that attention does not mask. None of what is computed twice.
    mfu: Option<f64>,
    /// The same, where attention counts every pair of a sequence of `max_example_tokens`, masked or not.
    mfu_dense_attention: Option<f64>,
    /// The peak of all GPUs that they are shares of, operations a second.
    peak_flops: Option<f64>,
    /// Bytes of memory at most on the GPU of the first process.
    peak_memory_bytes: Option<u64>,
    /// What `plan` says about it.
    planned_memory_bytes: u64,
    /// Seconds that the training thread waited for batches.
    waited_seconds: f64,
    /// Blocks a second of the paper's step with `transformers`, from the baseline's file.
    transformers_blocks_per_second: Option<f64>,
    /// The resolved configuration.
    settings: Settings,
}

impl BenchRecord for TrainFigures {
    fn name(&self) -> &str {
        &self.name
    }
}

/// Takes some steps of the run and puts their figures into the file. Nothing else is written.
pub fn run(arguments: &Arguments, settings: &Settings) -> Result<()> {
    let (place, group) = trainer::join(settings)?;
    if !group.is_main() {
        return measure(arguments, settings, place, group).map(drop);
    }
    let mut file = BenchResults::<TrainFigures>::open(&arguments.results, place)?;
    let baseline = arguments.baseline.as_deref().map(baseline).transpose()?;
    let mut figures = measure(arguments, settings, place, group)?;
    figures.transformers_blocks_per_second = baseline;
    let text = figures.text();
    file.put(&arguments.results, figures)?;
    progress::log(format!("wrote {}", arguments.results.display()));
    if arguments.given.json { print_json(&file) } else { print(&text) }
}

fn measure(arguments: &Arguments, settings: &Settings, place: Device, group: Rc<ProcessGroup>) -> Result<TrainFigures> {
    libtorch::reset_peak_gpu_memory(place);
    let (tokenizer, folder) = trainer::tokenizer(settings)?;
    let (models, name) = match arguments.shape {
        Some(shape) => {
            let config = shape.config(Some(tokenizer.vocab_size()))?;
            (Models::noise(config, settings, place)?, shape.name().to_owned())
        }
        None => {
            let name = folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            (Models::load(settings, &tokenizer, &folder, place)?, name)
        }
    };
    let student = &models.student;
    let examples = examples::read(settings, &tokenizer, student.config())?;
    let schedule = Schedule::new(&examples, settings)?;
    let total = WARM_UP + arguments.steps;
    if schedule.steps() < total {
        return Err(Error::usage(format!(
            "data: {} steps are in the run, {total} are measured: give more data or epochs, or fewer --steps",
            schedule.steps()
        )));
    }
    let planned =
        Memory::of(student.config(), student.kind(), settings, &examples, &schedule.batches(0), group.world_size());
    let mut state = State::new(student, &settings.optimizer, settings.seed, Rc::clone(&group))?;
    let packer = Packer::new(settings, &examples, student.config());
    let mut timed = Timed::default();
    std::thread::scope(|scope| -> Result<()> {
        let batches = packer.ahead(scope, &schedule, 0, (group.rank(), group.world_size()));
        for number in 1..=total {
            interrupt::check()?;
            let started = Instant::now();
            let batches = batches.recv().map_err(|_| Error::internal("the thread that packs batches has ended"))?;
            let waited = started.elapsed().as_secs_f64();
            let _ = models.gradients(settings, &batches)?;
            let rate = learning_rate(&settings.optimizer, number, total);
            let _ = state.step(&settings.optimizer, rate, number)?;
            device::synchronize(place);
            if number > WARM_UP {
                timed.add(&batches, started.elapsed().as_secs_f64(), waited);
            }
        }
        Ok(())
    })?;
    timed.share(&group, place)?;
    Ok(timed.figures(arguments.name.clone().unwrap_or(name), student, settings, planned, group.world_size()))
}

/// What the timed steps held and took.
#[derive(Default)]
struct Timed {
    seconds: Vec<f64>,
    waited: f64,
    batches: usize,
    tokens: usize,
    blocks: usize,
    responses: usize,
    /// Pairs of tokens that attention does not mask.
    pairs: usize,
}

impl Timed {
    fn add(&mut self, step: &StepBatches, seconds: f64, waited: f64) {
        self.seconds.push(seconds);
        self.waited += waited;
        self.tokens += step.counts.tokens;
        self.blocks += step.counts.blocks;
        for batch in &step.batches {
            self.batches += 1;
            self.responses += batch.stream.sequence_ends.len();
            let seen = batch.stream.attention_ranges.iter().flatten();
            self.pairs += seen.map(|(start, end)| (end - start).max(0) as usize).sum::<usize>();
        }
    }

    /// Adds up what only each process knows.
    fn share(&mut self, group: &ProcessGroup, place: Device) -> Result<()> {
        let counts = [&mut self.batches, &mut self.responses, &mut self.pairs];
        let all = Tensor::from_slice(&counts.each_ref().map(|count| **count as i64)).to_device(place);
        group.all_reduce(&all)?;
        for (index, count) in counts.into_iter().enumerate() {
            *count = all.int64_value(&[index as i64]) as usize;
        }
        Ok(())
    }

    fn figures(
        self,
        name: String,
        model: &Transformer,
        settings: &Settings,
        planned: Memory,
        processes: usize,
    ) -> TrainFigures {
        let config = model.config();
        let seconds: f64 = self.seconds.iter().sum();
        let mut sorted = self.seconds.clone();
        sorted.sort_by(f64::total_cmp);
        let rate = |count: usize| count as f64 / seconds;
        let attention = (12 * config.num_layers * config.num_heads * config.head_dim) as f64;
        let products = 6.0 * config.num_parameters() as f64 * self.tokens as f64;
        let peak = peak_flops(&Hardware::detect(model.device())).map(|peak| peak * processes as f64);
        let utilisation = |pairs: f64| peak.map(|peak| (products + attention * pairs) / seconds / peak);
        TrainFigures {
            parameters: config.num_parameters(),
            processes,
            steps: self.seconds.len(),
            step_seconds: sorted[sorted.len() / 2],
            tokens_per_second: rate(self.tokens),
            blocks_per_second: rate(self.blocks),
            responses_per_second: rate(self.responses),
            tokens_per_batch: self.tokens as f64 / self.batches as f64,
            mfu: utilisation(self.pairs as f64),
            mfu_dense_attention: utilisation((self.tokens * settings.max_example_tokens) as f64),
            peak_flops: peak,
            peak_memory_bytes: libtorch::gpu_memory(model.device()).map(|(_, peak)| peak),
            planned_memory_bytes: planned.peak,
            waited_seconds: self.waited,
            transformers_blocks_per_second: None,
            settings: settings.clone(),
            name,
        }
    }
}

impl TrainFigures {
    fn text(&self) -> String {
        let share =
            |share: Option<f64>| share.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", 100.0 * share));
        let gigabytes = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
        format!(
            "{}: {:.1} M parameters, {} steps of {:.3} s (median), {:.0} tokens a forward\n\
             {:.0} packed tokens/s, {:.0} blocks/s, {:.1} responses/s; waited {:.2} s for batches\n\
             {} of the device's bf16 peak ({} with every pair of attention)\n\
             memory {} at the peak, {} planned",
            self.name,
            self.parameters as f64 / 1e6,
            self.steps,
            self.step_seconds,
            self.tokens_per_batch,
            self.tokens_per_second,
            self.blocks_per_second,
            self.responses_per_second,
            self.waited_seconds,
            share(self.mfu),
            share(self.mfu_dense_attention),
            self.peak_memory_bytes.map_or_else(|| "-".to_owned(), gigabytes),
            gigabytes(self.planned_memory_bytes),
        )
    }
}

/// Dense bf16 operations a second that the vendor names, for GPUs that are known.
fn peak_flops(hardware: &Hardware) -> Option<f64> {
    let name = hardware.gpu.as_deref()?;
    let known = [("H100", 989e12), ("H200", 989e12), ("A100", 312e12)];
    known.iter().find(|(gpu, _)| name.contains(gpu)).map(|(_, peak)| *peak)
}

fn baseline(path: &Path) -> Result<f64> {
    let value: serde_json::Value =
        serde_json::from_str(&text_file::read(path)?).map_err(|error| Error::file(path, error.to_string()))?;
    value["blocks_per_second"]
        .as_f64()
        .ok_or_else(|| Error::file(path, "has no `blocks_per_second`: make it with scripts/bench-train-transformers"))
}
