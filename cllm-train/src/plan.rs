//! `plan`: what a run will take, before anything is written.

use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use cllm_core::distributed::{ProcessEnv, ProcessGroup};
use cllm_core::program::{catch_panics, print, print_json};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device, interrupt, progress};
use serde::Serialize;
use tch::Device;

use crate::data::dataset::{self as examples, Example};
use crate::data::loader::{Packer, StepBatches};
use crate::data::schedule::Schedule;
use crate::memory::Memory;
use crate::optimizer::State;
use crate::settings::Settings;
use crate::step::Models;
use crate::trainer;

/// Steps that are timed after the first, which warms up.
const TIMED_STEPS: usize = 3;
/// After so long no further step is timed.
const TIMED_FOR: Duration = Duration::from_secs(20);

/// What a run will take.
#[derive(Serialize)]
struct Plan {
    schema_version: u32,
    device: &'static str,
    parameters: i64,
    /// Those that are trained: all, or the adapters'.
    trained_parameters: i64,
    responses: usize,
    /// Those of them that are too long.
    left_out: usize,
    epochs: usize,
    steps: usize,
    batches_per_step: usize,
    max_batch_tokens: usize,
    /// Packed tokens of all steps, padding aside.
    tokens: usize,
    /// Estimated from shapes.
    memory_bytes: Memory,
    duration: Timing,
}

/// How long a run takes, or why that is not known.
#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Timing {
    Estimated {
        /// Of all steps; probes and checkpoints come on top.
        seconds: f64,
        seconds_per_step: f64,
        timed_steps: usize,
    },
    Unknown {
        reason: String,
    },
}

/// Prints the plan of a run; with `timing`, some of its steps are taken (and thrown away) to tell how long it lasts.
pub fn run(settings: &Settings, timing: bool, json: bool) -> Result<()> {
    let member = ProcessEnv::from_env(|name| std::env::var(name).ok())?;
    let place = device::for_process(&settings.device, member.as_ref())?;
    let processes = member.map_or(1, |member| member.world_size);
    let (tokenizer, folder) = trainer::tokenizer(settings)?;
    let config = match &settings.init {
        None => cllm_core::checkpoint::load_config(&folder)?,
        Some(init) => trainer::random_config(init, &tokenizer)?,
    };
    let examples = examples::read(settings, &tokenizer, &config)?;
    let schedule = Schedule::new(&examples, settings)?;
    let memory = Memory::of(&config, device::default_kind(place), settings, &examples, &schedule.batches(0), processes);
    let free = if place.is_cuda() { None } else { available_memory() };
    let duration = match free {
        _ if !timing => Timing::Unknown { reason: "--no-timing".to_owned() },
        Some(free) if free < memory.peak => {
            Timing::Unknown { reason: format!("no step was timed: {} are free here", megabytes(free)) }
        }
        _ => {
            progress::log("timing some steps (--no-timing leaves this out)");
            match catch_panics(|| time(settings, &tokenizer, &folder, &examples, &schedule, place)) {
                Err(stopped @ Error::Interrupted(_)) => return Err(stopped),
                Err(error) => Timing::Unknown { reason: format!("a step was tried: {error}") },
                Ok(timing) => timing,
            }
        }
    };
    let plan = Plan {
        schema_version: 1,
        device: if place.is_cuda() { "the GPU" } else { "the CPU" },
        parameters: config.num_parameters(),
        trained_parameters: settings.trained_parameters(&config),
        responses: examples.len(),
        left_out: schedule.left_out,
        epochs: settings.epochs,
        steps: schedule.steps(),
        batches_per_step: settings.accumulation,
        max_batch_tokens: settings.max_batch_tokens,
        tokens: schedule.tokens,
        memory_bytes: memory,
        duration,
    };
    if json { print_json(&plan) } else { print(&plan.text()) }
}

impl Plan {
    fn text(&self) -> String {
        let memory = &self.memory_bytes;
        let duration = match &self.duration {
            Timing::Estimated { seconds, seconds_per_step, timed_steps } => format!(
                "about {} without probes and checkpoints: {seconds_per_step:.3} s a step, the mean of {timed_steps} timed here",
                span(*seconds)
            ),
            Timing::Unknown { reason } => format!("unknown ({reason})"),
        };
        format!(
            "parameters  {:.2} M, trained: {:.2} M\n\
             responses   {} ({} too long, left out)\n\
             steps       {}, batches a step: {} of up to {} tokens, epochs: {}\n\
             tokens      {}\n\
             memory      about {} at the peak on {}: the tensors alone, estimated from shapes\n            \
             weights {}, gradients {}, optimizer {}, activations {}\n\
             time        {duration}",
            self.parameters as f64 / 1e6,
            self.trained_parameters as f64 / 1e6,
            self.responses,
            self.left_out,
            self.steps,
            self.batches_per_step,
            self.max_batch_tokens,
            self.epochs,
            self.tokens,
            megabytes(memory.peak),
            self.device,
            megabytes(memory.weights),
            megabytes(memory.gradients),
            megabytes(memory.optimizer),
            megabytes(memory.activations),
        )
    }
}

/// Takes the first steps of the run on a copy of the model, without a change to it.
fn time(
    settings: &Settings,
    tokenizer: &Tokenizer,
    folder: &Path,
    examples: &[Example],
    schedule: &Schedule,
    place: Device,
) -> Result<Timing> {
    let models = Models::load(settings, tokenizer, folder, place)?;
    let mut state = State::new(&models.student, &settings.optimizer, settings.seed, Rc::new(ProcessGroup::single()))?;
    let packer = Packer::new(settings, examples, models.student.config());
    let batches = schedule.batches(0);
    let mut seconds = Vec::new();
    let begun = Instant::now();
    for group in batches.chunks(settings.accumulation).cycle().take(1 + TIMED_STEPS) {
        interrupt::check()?;
        let mut packed = StepBatches::default();
        for responses in group {
            let batch = packer.batch(responses, 0);
            packed.counts.add(batch.counts);
            packed.batches.push(batch);
        }
        let started = Instant::now();
        let _ = models.gradients(settings, &packed)?;
        let _ = state.step(&settings.optimizer, 0.0, 1)?;
        device::synchronize(place);
        seconds.push(started.elapsed().as_secs_f64());
        if begun.elapsed() > TIMED_FOR {
            break;
        }
    }
    // The first one warms up; where it took all the time there was, it is all that is known.
    let timed = if seconds.len() > 1 { &seconds[1..] } else { &seconds[..] };
    let seconds_per_step = timed.iter().sum::<f64>() / timed.len() as f64;
    let seconds = seconds_per_step * schedule.steps() as f64;
    Ok(Timing::Estimated { seconds, seconds_per_step, timed_steps: timed.len() })
}

/// Bytes that a program may still take on this machine, where the system tells.
fn available_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

fn megabytes(bytes: u64) -> String {
    match bytes as f64 / 1e6 {
        megabytes if megabytes >= 1e4 => format!("{:.1} GB", megabytes / 1e3),
        megabytes if megabytes >= 100.0 => format!("{megabytes:.0} MB"),
        megabytes => format!("{megabytes:.1} MB"),
    }
}

fn span(seconds: f64) -> String {
    match seconds {
        seconds if seconds < 120.0 => format!("{seconds:.0} s"),
        seconds if seconds < 7200.0 => format!("{:.0} min", seconds / 60.0),
        seconds => format!("{:.1} h", seconds / 3600.0),
    }
}
