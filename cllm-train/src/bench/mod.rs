//! `bench`: how fast a recipe trains, and how close that comes to the peak of the device.

mod host;
mod record;
mod settings;
mod synthetic;
mod timings;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use cllm_core::bench_results::BenchResults;
use cllm_core::cuda::libtorch;
use cllm_core::distributed::ProcessGroup;
use cllm_core::program::{print, print_json};
use cllm_core::progress::count;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device, interrupt, progress, text_file, train};
use tch::Device;

use crate::data::dataset;
use crate::data::division::RankShard;
use crate::data::loader::BatchLoader;
use crate::data::schedule::Schedule;
use crate::memory::{MemoryEstimate, Workload};
use crate::models::{Models, load_tokenizer};
use crate::optimizer::{OptimizerState, learning_rate};
use crate::processes;
use crate::settings::Settings;
use crate::step::train_step;
use host::HostUsage;
use record::{ModelKind, TrainBenchRecord};
pub use settings::BenchSettings;
use timings::{Throughput, Timings};

/// Number of steps before the timed ones.
const NUM_WARMUP_STEPS: usize = 3;

/// Takes some steps and adds the measurements to the results file. Nothing else stays on the disk.
///
/// # Errors
/// Bad settings and data; fewer steps in the data than there are to measure.
pub fn run(settings: &BenchSettings, json: bool) -> Result<()> {
    let training = settings.training()?;
    let (device, group) = processes::join(&training)?;
    if !group.is_main() {
        measure(settings, &training, device, &group)?;
        ProcessGroup::leave(group);
        return Ok(());
    }
    let mut results = BenchResults::<TrainBenchRecord>::open(&settings.output, device)?;
    let baseline = settings.baseline.as_deref().map(read_baseline).transpose()?;
    let mut record = match device {
        Device::Cpu => {
            let (record, peak) = libtorch::with_peak_cpu_memory(|| measure(settings, &training, device, &group))?;
            TrainBenchRecord { peak_memory_bytes: Some(peak), ..record? }
        }
        _ => measure(settings, &training, device, &group)?,
    };
    ProcessGroup::leave(group);
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
    group: &Rc<ProcessGroup>,
) -> Result<TrainBenchRecord> {
    libtorch::reset_peak_gpu_memory(device);
    let source = ModelSource::find(settings, training)?;
    let models = source.load(settings, training, device)?;
    models.log_slow_path()?;
    let (config, kind) = (models.student.config(), models.student.kind());
    let examples = match &source.tokenizer {
        Some(tokenizer) if !settings.is_synthetic() => dataset::read(training, tokenizer, config)?,
        _ => synthetic::examples(&settings.synthetic, config.vocab_size, training.seed),
    };
    let schedule = Schedule::new(&examples, training)?;
    let batches = schedule.batches(0);
    let planned = MemoryEstimate::new(&Workload {
        config,
        kind,
        is_eager: !device.is_cuda() || train::slow_path_reason_on(config, kind, device)?.is_some(),
        settings: training,
        examples: &examples,
        batches: &batches,
        probe: None,
        world_size: group.world_size(),
    });
    let loader = BatchLoader::new(training, &examples, &models.student)?;
    let timings = time_steps(training, &models, loader, &schedule, settings.num_steps, group)?;
    let peak_memory_bytes = libtorch::gpu_memory(device).map(|(_, peak)| peak);
    let peak_reserved_bytes = libtorch::peak_reserved_gpu_memory(device);
    let throughput = Throughput::new(&timings, config, training, device, group.world_size());
    let parameters = config.num_parameters();
    let host = match settings.files && group.is_main() {
        true => HostUsage::with_files(models.student, training, &settings.output)?,
        false => HostUsage::without_files(),
    };
    Ok(TrainBenchRecord {
        name: settings.name.clone().unwrap_or_else(|| source.default_name(settings)),
        kind: ModelKind::of(training),
        parameters,
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
        peak_memory_bytes,
        peak_reserved_bytes,
        planned_memory_bytes: planned.training_peak(),
        host,
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
    let mut optimizer = OptimizerState::new(student, training, Rc::clone(group))?;
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
                timings.add(&batches, student.config(), started.elapsed().as_secs_f64(), wait_seconds);
            }
        }
        Ok(())
    })?;
    timings.sum_over_processes(group, student.device())?;
    Ok(timings)
}

/// Where the model to measure comes from.
struct ModelSource {
    /// `None` where neither a model nor data call for one.
    tokenizer: Option<Tokenizer>,
    /// Of the model or of its tokenizer.
    folder: PathBuf,
}

impl ModelSource {
    fn find(settings: &BenchSettings, training: &Settings) -> Result<Self> {
        if settings.shape.is_some() && settings.model.is_none() {
            if !settings.is_synthetic() {
                return Err(Error::usage(
                    "datasets need the tokenizer of a `model` beside `shape`: set model, or no datasets",
                ));
            }
            return Ok(ModelSource { tokenizer: None, folder: PathBuf::new() });
        }
        let (tokenizer, folder) = load_tokenizer(training)?;
        Ok(ModelSource { tokenizer: Some(tokenizer), folder })
    }

    fn load(&self, settings: &BenchSettings, training: &Settings, device: Device) -> Result<Models> {
        match (settings.shape, &self.tokenizer) {
            (Some(shape), tokenizer) => {
                let vocab_size = tokenizer.as_ref().map(Tokenizer::vocab_size);
                Models::random(shape.config(vocab_size)?, training, device)
            }
            (None, Some(tokenizer)) => Models::load(training, tokenizer, &self.folder, device),
            (None, None) => Err(Error::internal("a model without a shape has a tokenizer")),
        }
    }

    fn default_name(&self, settings: &BenchSettings) -> String {
        match settings.shape {
            Some(shape) => shape.to_string(),
            None => self.folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned()),
        }
    }
}

fn read_baseline(path: &Path) -> Result<f64> {
    let value: serde_json::Value = text_file::read_json(path)?;
    value["blocks_per_second"]
        .as_f64()
        .ok_or_else(|| Error::file(path, "has no `blocks_per_second`: make it with scripts/bench-train-transformers"))
}
