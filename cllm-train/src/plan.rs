//! `plan`: estimates what a run will need, before it writes anything. To estimate the duration, it
//! takes some steps on a copy of the model.

use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cllm_core::distributed::{ProcessEnv, ProcessGroup};
use cllm_core::program::{catch_panics, print, print_json};
use cllm_core::progress::count;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, checkpoint, device, interrupt, progress};
use serde::Serialize;
use tch::Device;

use crate::data::dataset::{self, Example};
use crate::data::loader::{BatchLoader, RankShard};
use crate::data::schedule::Schedule;
use crate::memory::MemoryEstimate;
use crate::models::{Models, init_config, load_tokenizer};
use crate::optimizer::OptimizerState;
use crate::settings::Settings;
use crate::step::train_step;

/// Number of steps to time, after one that warms up.
const NUM_TIMED_STEPS: usize = 3;
/// After this time, no further step is timed.
const MAX_TIMING: Duration = Duration::from_secs(20);

/// What a run will need; docs/data-format.md describes the fields.
#[derive(Serialize)]
struct Plan {
    schema_version: u32,
    device: String,
    parameters: i64,
    trained_parameters: i64,
    num_examples: usize,
    /// Number of examples with more than `max_example_tokens`.
    num_excluded: usize,
    epochs: usize,
    steps: usize,
    batches_per_step: usize,
    max_batch_tokens: usize,
    /// Packed tokens of all steps, without padding.
    tokens: usize,
    memory_bytes: MemoryEstimate,
    duration: DurationEstimate,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum DurationEstimate {
    Estimated {
        /// Over all steps, without validation and checkpoints.
        seconds: f64,
        seconds_per_step: f64,
        timed_steps: usize,
    },
    Unknown {
        reason: String,
    },
}

/// Prints the plan of a run. Unless `skip_timing`, it takes a few steps and discards them.
///
/// # Errors
/// Bad settings and data.
pub fn run(settings: &Settings, skip_timing: bool, json: bool) -> Result<()> {
    let env = ProcessEnv::from_env(|name| std::env::var(name).ok())?;
    let device = device::for_process(&settings.device, env.as_ref())?;
    let world_size = env.map_or(1, |env| env.world_size);
    let (tokenizer, folder) = load_tokenizer(settings)?;
    let config = match &settings.init {
        None => checkpoint::load_config(&folder)?,
        Some(init) => init_config(init, &tokenizer)?,
    };
    let examples = dataset::read(settings, &tokenizer, &config)?;
    let schedule = Schedule::new(&examples, settings)?;
    let kind = device::default_kind(device);
    let memory = MemoryEstimate::new(&config, kind, settings, &examples, &schedule.batches(0), world_size);
    let duration = match available_memory().filter(|_| !device.is_cuda()) {
        _ if skip_timing => DurationEstimate::Unknown { reason: "--no-timing".to_owned() },
        Some(available) if available < memory.peak => {
            let available = format_bytes(available);
            DurationEstimate::Unknown { reason: format!("no step was timed: only {available} are available here") }
        }
        _ => {
            progress::log("timing some steps (--no-timing skips this)");
            let timed = catch_panics(|| time_steps(settings, &tokenizer, &folder, &examples, &schedule, device));
            match timed {
                Err(interrupted @ Error::Interrupted(_)) => return Err(interrupted),
                Err(error) => DurationEstimate::Unknown { reason: format!("a step failed: {error}") },
                Ok(timing) => timing,
            }
        }
    };
    let plan = Plan {
        schema_version: 1,
        device: match device {
            Device::Cuda(index) => format!("cuda:{index}"),
            _ => "cpu".to_owned(),
        },
        parameters: config.num_parameters(),
        trained_parameters: settings.trained_parameters(&config),
        num_examples: examples.len(),
        num_excluded: schedule.num_excluded,
        epochs: settings.epochs,
        steps: schedule.num_steps(),
        batches_per_step: settings.accumulation,
        max_batch_tokens: settings.max_batch_tokens,
        tokens: schedule.num_tokens,
        memory_bytes: memory,
        duration,
    };
    if json { print_json(&plan) } else { print(&plan.text()) }
}

impl Plan {
    fn text(&self) -> String {
        let memory = &self.memory_bytes;
        let duration = match &self.duration {
            DurationEstimate::Estimated { seconds, seconds_per_step, timed_steps } => format!(
                "about {}, without validation and checkpoints: {seconds_per_step:.3} s per step, the mean of {timed_steps} timed \
                 here",
                format_seconds(*seconds)
            ),
            DurationEstimate::Unknown { reason } => format!("unknown ({reason})"),
        };
        format!(
            "parameters  {:.2} M, trained: {:.2} M\n\
             examples    {} ({} too long and excluded)\n\
             steps       {} in {}, each of {} with up to {} tokens\n\
             tokens      {}\n\
             memory      about {} at the peak ({}), counting tensors only\n            \
             weights {}, gradients {}, optimizer {}, activations {}\n\
             time        {duration}",
            self.parameters as f64 / 1e6,
            self.trained_parameters as f64 / 1e6,
            self.num_examples,
            self.num_excluded,
            self.steps,
            count(self.epochs, "epoch"),
            count(self.batches_per_step, "batch"),
            self.max_batch_tokens,
            self.tokens,
            format_bytes(memory.peak),
            self.device,
            format_bytes(memory.weights),
            format_bytes(memory.gradients),
            format_bytes(memory.optimizer),
            format_bytes(memory.activations),
        )
    }
}

/// Takes the first steps of a run with a learning rate of 0.
fn time_steps(
    settings: &Settings,
    tokenizer: &Tokenizer,
    folder: &Path,
    examples: &[Example],
    schedule: &Schedule,
    device: Device,
) -> Result<DurationEstimate> {
    let models = Models::load(settings, tokenizer, folder, device)?;
    let group = Rc::new(ProcessGroup::single());
    let mut optimizer = OptimizerState::new(&models.student, &settings.optimizer, settings.seed, group)?;
    let loader = BatchLoader::new(settings, examples, models.student.config());
    let batches = schedule.batches(0);
    let mut step_seconds = Vec::new();
    let began = Instant::now();
    for batches in batches.chunks(settings.accumulation).cycle().take(1 + NUM_TIMED_STEPS) {
        interrupt::check()?;
        let batches = loader.step_batches(batches, 0, RankShard::all());
        let started = Instant::now();
        let _ = train_step(&models, &mut optimizer, settings, &batches, 1, 0.0)?;
        device::synchronize(device);
        step_seconds.push(started.elapsed().as_secs_f64());
        if began.elapsed() > MAX_TIMING {
            break;
        }
    }
    // The first step warms up. If it took all the available time, it is the only measurement.
    let timed = if step_seconds.len() > 1 { &step_seconds[1..] } else { &step_seconds[..] };
    let seconds_per_step = timed.iter().sum::<f64>() / timed.len() as f64;
    let seconds = seconds_per_step * schedule.num_steps() as f64;
    Ok(DurationEstimate::Estimated { seconds, seconds_per_step, timed_steps: timed.len() })
}

/// Bytes that a program may still allocate on this machine; `None` if the system does not say.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

fn format_bytes(bytes: u64) -> String {
    match bytes as f64 / 1e6 {
        megabytes if megabytes >= 1e4 => format!("{:.1} GB", megabytes / 1e3),
        megabytes if megabytes >= 100.0 => format!("{megabytes:.0} MB"),
        megabytes => format!("{megabytes:.1} MB"),
    }
}

fn format_seconds(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 120.0 => format!("{seconds:.0} s"),
        seconds if seconds < 7200.0 => format!("{:.0} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}
