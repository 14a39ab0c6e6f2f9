//! `bench`: how fast a recipe trains, and how close that comes to the peak of the device.

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use cllm_core::bench_results::{BenchRecord, BenchResults};
use cllm_core::cuda::libtorch;
use cllm_core::distributed::ProcessGroup;
use cllm_core::environment::Hardware;
use cllm_core::model::{ModelConfig, ModelPreset};
use cllm_core::program::{print, print_json};
use cllm_core::progress::count;
use cllm_core::settings::required_path;
use cllm_core::statistics::median;
use cllm_core::{Error, Result, device, interrupt, progress, text_file};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use crate::data::dataset;
use crate::data::loader::{BatchLoader, RankShard, StepBatches};
use crate::data::schedule::Schedule;
use crate::memory::MemoryEstimate;
use crate::models::{Models, load_tokenizer};
use crate::optimizer::{OptimizerState, learning_rate};
use crate::processes;
use crate::settings::Settings;
use crate::step::train_step;

/// Number of steps before the timed ones.
const NUM_WARMUP_STEPS: usize = 3;

/// Settings of `cllm-train bench`.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BenchSettings {
    /// Folder or id of the model to train. Alternatively, set `train.init`.
    #[garde(skip)]
    pub model: Option<String>,
    /// Train random weights in the shape of a known model (with the vocabulary of `model`) instead
    /// of the weights of `model`.
    #[garde(skip)]
    pub preset: Option<ModelPreset>,
    /// Name of the model in the results. Default: its preset, or the last part of its folder.
    #[garde(skip)]
    pub name: Option<String>,
    /// Data sets to train on, as in `run`.
    #[garde(length(min = 1))]
    pub datasets: Vec<PathBuf>,
    /// Number of steps to time, after three warm-up steps.
    #[garde(range(min = 1))]
    pub num_steps: usize,
    /// All other settings of the training, as in `run`; `bench` sets model, datasets, output and
    /// device.
    #[garde(skip)]
    #[schemars(extend("elsewhere" = true))]
    pub train: Settings,
    /// Output of scripts/bench-train-transformers, to report beside the results.
    #[garde(skip)]
    pub baseline: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
    /// File for the results. It keeps the results of other models if they were measured on the same
    /// machine.
    #[garde(custom(required_path))]
    pub output: PathBuf,
}

impl Default for BenchSettings {
    fn default() -> Self {
        BenchSettings {
            model: None,
            preset: None,
            name: None,
            datasets: Vec::new(),
            num_steps: 20,
            train: Settings::default(),
            baseline: None,
            device: "auto".to_owned(),
            output: PathBuf::from("runs/bench-train.json"),
        }
    }
}

impl BenchSettings {
    /// The settings of the training to measure.
    ///
    /// # Errors
    /// [`Error::Usage`] naming a key that is out of range or must not be set.
    pub fn training(&self) -> Result<Settings> {
        let defaults = Settings::default();
        let set_by_bench = [
            ("train.model", self.train.model.is_some()),
            ("train.datasets", !self.train.datasets.is_empty()),
            ("train.output", self.train.output != defaults.output),
            ("train.device", self.train.device != defaults.device),
        ];
        if let Some((key, _)) = set_by_bench.into_iter().find(|(_, is_set)| *is_set) {
            let own_key = key.trim_start_matches("train.");
            return Err(Error::usage(format!("{key} is set by bench: leave it out and set {own_key}")));
        }
        let training = Settings {
            model: self.model.clone(),
            datasets: self.datasets.clone(),
            // Nothing is written to this folder.
            output: PathBuf::from("unused"),
            device: self.device.clone(),
            ..self.train.clone()
        };
        training.validate().map_err(|report| {
            let lines = report.iter().map(|(path, error)| format!("train.{path}: {error}"));
            Error::usage(lines.collect::<Vec<_>>().join("\n"))
        })?;
        training.check().map_err(|error| Error::usage(format!("train: {error}")))?;
        Ok(training)
    }
}

/// Measurements of one model; docs/data-format.md describes the fields.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TrainBenchRecord {
    name: String,
    parameters: i64,
    /// Each with a GPU of its own.
    num_processes: usize,
    num_steps: usize,
    /// Median over the timed steps, including the optimizer and waiting for batches.
    step_seconds: f64,
    /// Packed tokens, divided by the seconds of all timed steps.
    tokens_per_second: f64,
    /// Noisy blocks, divided by the same seconds.
    blocks_per_second: f64,
    examples_per_second: f64,
    /// Mean number of tokens in a forward.
    mean_batch_tokens: f64,
    /// Model FLOPs over the seconds and `peak_flops`: 6 x parameters x tokens, plus 12 x layers x
    /// width of all heads for each pair of tokens that attention does not mask. Recomputation does
    /// not count. `None` on devices whose peak is not known.
    mfu: Option<f64>,
    /// The same, if attention counts every pair of tokens in a sequence of `max_example_tokens`.
    mfu_dense_attention: Option<f64>,
    /// Peak of all GPUs together, in operations per second.
    peak_flops: Option<f64>,
    /// Of the main process; `None` on the CPU.
    peak_memory_bytes: Option<u64>,
    /// The peak that `plan` estimates.
    planned_memory_bytes: u64,
    /// Seconds that the training thread waited for batches, in all timed steps.
    batch_wait_seconds: f64,
    /// Blocks per second of the paper's training step with `transformers`, from the baseline's
    /// file.
    transformers_blocks_per_second: Option<f64>,
    settings: BenchSettings,
}

impl BenchRecord for TrainBenchRecord {
    fn name(&self) -> &str {
        &self.name
    }
}

/// Takes some steps and adds the measurements to the results file. Nothing else is written.
///
/// # Errors
/// Bad settings and data; fewer steps in the data than there are to measure.
pub fn run(settings: &BenchSettings, json: bool) -> Result<()> {
    let training = settings.training()?;
    let (device, group) = processes::join(&training)?;
    if !group.is_main() {
        return measure(settings, &training, device, group).map(drop);
    }
    let mut results = BenchResults::<TrainBenchRecord>::open(&settings.output, device)?;
    let baseline = settings.baseline.as_deref().map(read_baseline).transpose()?;
    let mut record = measure(settings, &training, device, group)?;
    record.transformers_blocks_per_second = baseline;
    let text = record.text();
    results.put(&settings.output, record)?;
    progress::log(format!("wrote {}", settings.output.display()));
    if json { print_json(&results) } else { print(&text) }
}

fn measure(
    settings: &BenchSettings,
    training: &Settings,
    device: Device,
    group: Rc<ProcessGroup>,
) -> Result<TrainBenchRecord> {
    libtorch::reset_peak_gpu_memory(device);
    let (tokenizer, folder) = load_tokenizer(training)?;
    let models = match settings.preset {
        Some(preset) => Models::random(preset.config(Some(tokenizer.vocab_size()))?, training, device)?,
        None => Models::load(training, &tokenizer, &folder, device)?,
    };
    let (config, kind) = (models.student.config(), models.student.kind());
    let examples = dataset::read(training, &tokenizer, config)?;
    let schedule = Schedule::new(&examples, training)?;
    let batches = schedule.batches(0);
    let planned = MemoryEstimate::new(config, kind, training, &examples, &batches, group.world_size());
    let loader = BatchLoader::new(training, &examples, config);
    let timings = time_steps(training, &models, loader, &schedule, settings.num_steps, &group)?;
    let throughput = Throughput::new(&timings, config, training.max_example_tokens, device, group.world_size());
    Ok(TrainBenchRecord {
        name: settings.name.clone().unwrap_or_else(|| default_name(settings.preset, &folder)),
        parameters: config.num_parameters(),
        num_processes: group.world_size(),
        num_steps: settings.num_steps,
        step_seconds: timings.median_step_seconds(),
        tokens_per_second: timings.per_second(timings.num_tokens),
        blocks_per_second: timings.per_second(timings.num_blocks),
        examples_per_second: timings.per_second(timings.num_examples),
        mean_batch_tokens: timings.num_tokens as f64 / timings.num_batches as f64,
        mfu: throughput.mfu,
        mfu_dense_attention: throughput.mfu_dense_attention,
        peak_flops: throughput.peak_flops,
        peak_memory_bytes: libtorch::gpu_memory(device).map(|(_, peak)| peak),
        planned_memory_bytes: planned.peak,
        batch_wait_seconds: timings.wait_seconds,
        transformers_blocks_per_second: None,
        settings: settings.clone(),
    })
}

/// Takes the warm-up steps and then the timed ones.
fn time_steps(
    training: &Settings,
    models: &Models,
    loader: BatchLoader<'_>,
    schedule: &Schedule,
    num_timed_steps: usize,
    group: &Rc<ProcessGroup>,
) -> Result<Timings> {
    let (student, num_steps) = (&models.student, NUM_WARMUP_STEPS + num_timed_steps);
    if schedule.num_steps() < num_steps {
        return Err(Error::usage(format!(
            "datasets: there are only {}, and {num_steps} are needed ({NUM_WARMUP_STEPS} of them to warm up): give more data \
             or train.epochs, or a smaller num_steps",
            count(schedule.num_steps(), "step")
        )));
    }
    let mut optimizer = OptimizerState::new(student, &training.optimizer, training.seed, Rc::clone(group))?;
    let mut timings = Timings::default();
    std::thread::scope(|scope| -> Result<()> {
        let batches = loader.load_ahead(scope, schedule, 0, RankShard::for_process(group));
        for number in 1..=num_steps {
            interrupt::check()?;
            let started = Instant::now();
            let batches = batches.recv().map_err(|_| Error::internal("the thread that packs batches has ended"))?;
            let wait_seconds = started.elapsed().as_secs_f64();
            let lr = learning_rate(&training.optimizer, number, num_steps);
            let _ = train_step(models, &mut optimizer, training, &batches, number, lr)?;
            device::synchronize(student.device());
            if number > NUM_WARMUP_STEPS {
                timings.add(&batches, started.elapsed().as_secs_f64(), wait_seconds);
            }
        }
        Ok(())
    })?;
    timings.sum_over_processes(group, student.device())?;
    Ok(timings)
}

fn default_name(preset: Option<ModelPreset>, folder: &Path) -> String {
    match preset {
        Some(preset) => preset.name().to_owned(),
        None => folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
    }
}

/// Totals over the timed steps, and the seconds of each.
#[derive(Default)]
struct Timings {
    step_seconds: Vec<f64>,
    wait_seconds: f64,
    num_batches: usize,
    num_tokens: usize,
    num_blocks: usize,
    num_examples: usize,
    /// Pairs of tokens that attention does not mask.
    num_attended_pairs: usize,
}

impl Timings {
    fn add(&mut self, step: &StepBatches, seconds: f64, wait_seconds: f64) {
        self.step_seconds.push(seconds);
        self.wait_seconds += wait_seconds;
        self.num_tokens += step.counts.num_tokens;
        self.num_blocks += step.counts.num_blocks;
        for batch in &step.batches {
            self.num_batches += 1;
            self.num_examples += batch.packed.sequence_ends.len();
            let ranges = batch.packed.attention_ranges.iter().flatten();
            self.num_attended_pairs += ranges.map(|(start, end)| (end - start).max(0) as usize).sum::<usize>();
        }
    }

    /// Sums the counts that each process knows only for its own batches.
    fn sum_over_processes(&mut self, group: &ProcessGroup, device: Device) -> Result<()> {
        let counts = [&mut self.num_batches, &mut self.num_examples, &mut self.num_attended_pairs];
        let sums = Tensor::from_slice(&counts.each_ref().map(|count| **count as i64)).to_device(device);
        group.all_reduce(&sums)?;
        for (index, count) in counts.into_iter().enumerate() {
            *count = sums.int64_value(&[index as i64]) as usize;
        }
        Ok(())
    }

    fn seconds(&self) -> f64 {
        self.step_seconds.iter().sum()
    }

    fn per_second(&self, count: usize) -> f64 {
        count as f64 / self.seconds()
    }

    fn median_step_seconds(&self) -> f64 {
        median(self.step_seconds.iter().copied()).expect("num_steps is at least 1")
    }
}

/// Floating-point operations per second, compared with the peak of the GPUs.
struct Throughput {
    mfu: Option<f64>,
    mfu_dense_attention: Option<f64>,
    peak_flops: Option<f64>,
}

impl Throughput {
    fn new(
        timings: &Timings,
        config: &ModelConfig,
        max_example_tokens: usize,
        device: Device,
        world_size: usize,
    ) -> Self {
        let peak_flops = peak_flops(&Hardware::detect(device)).map(|peak| peak * world_size as f64);
        let flops_per_pair = (12 * config.num_layers * config.num_heads * config.head_dim) as f64;
        let matmul_flops = 6.0 * config.num_parameters() as f64 * timings.num_tokens as f64;
        let mfu = |num_pairs: usize| {
            peak_flops.map(|peak| (matmul_flops + flops_per_pair * num_pairs as f64) / timings.seconds() / peak)
        };
        Throughput {
            mfu: mfu(timings.num_attended_pairs),
            mfu_dense_attention: mfu(timings.num_tokens * max_example_tokens),
            peak_flops,
        }
    }
}

impl TrainBenchRecord {
    fn text(&self) -> String {
        let gigabytes = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
        let mut text = format!(
            "{}: {:.1} M parameters, {} of {:.3} s (median), {:.0} tokens per forward\n\
             {:.0} packed tokens/s, {:.0} blocks/s, {:.1} examples/s; waited {:.2} s for batches\n",
            self.name,
            self.parameters as f64 / 1e6,
            count(self.num_steps, "step"),
            self.step_seconds,
            self.mean_batch_tokens,
            self.tokens_per_second,
            self.blocks_per_second,
            self.examples_per_second,
            self.batch_wait_seconds,
        );
        if let (Some(mfu), Some(dense)) = (self.mfu, self.mfu_dense_attention) {
            let (mfu, dense) = (100.0 * mfu, 100.0 * dense);
            text += &format!("{mfu:.1} % of the device's bf16 peak ({dense:.1} % counting masked attention too)\n");
        }
        let planned = gigabytes(self.planned_memory_bytes);
        text + &match self.peak_memory_bytes {
            Some(peak) => format!("memory {} at the peak, {planned} planned", gigabytes(peak)),
            None => format!("memory {planned} planned"),
        }
    }
}

/// Dense bf16 operations per second according to the vendor; `None` for other GPUs.
fn peak_flops(hardware: &Hardware) -> Option<f64> {
    let name = hardware.gpu.as_deref()?;
    let known = [("H100", 989e12), ("H200", 989e12), ("A100", 312e12)];
    known.iter().find(|(gpu, _)| name.contains(gpu)).map(|(_, peak)| *peak)
}

fn read_baseline(path: &Path) -> Result<f64> {
    let value: serde_json::Value = text_file::read_json(path)?;
    value["blocks_per_second"]
        .as_f64()
        .ok_or_else(|| Error::file(path, "has no `blocks_per_second`: make it with scripts/bench-train-transformers"))
}
