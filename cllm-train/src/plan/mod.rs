//! `plan`: what a run will need, compared with what is there, before anything is written. `run` uses
//! the same estimates to refuse what cannot fit.

mod device;
mod disk;
mod host;
mod needs;
mod proposal;
mod refusal;
mod text;
mod time;
mod timing;

use cllm_core::program::{catch_panics, print, print_json};
use cllm_core::{Error, Result, progress};
use serde::Serialize;

use crate::data::dataset;
use crate::memory::MemoryEstimate;
use crate::models::{load_config, load_tokenizer};
use crate::settings::Settings;
use crate::validation::Validator;
pub use device::{PlannedDevice, refuse_hypothetical};
use disk::DiskEstimate;
pub use disk::final_model_bytes;
use host::HostEstimate;
use needs::{Available, Comparisons, Needs, RunInputs};
use proposal::Proposals;
pub use refusal::refuse_what_cannot_fit;

/// What a run will need; docs/data-format.md describes the fields.
#[derive(Serialize)]
struct Plan {
    schema_version: u32,
    device: String,
    num_processes: usize,
    /// Why libtorch's operations will train the model on a GPU, if so.
    slow_path: Option<String>,
    parameters: i64,
    trained_parameters: i64,
    num_examples: usize,
    /// Number of examples with more than `max_example_tokens`.
    num_excluded: usize,
    epochs: usize,
    /// The epoch, from 1, in which `max_steps` ends the run.
    #[serde(skip)]
    last_epoch: Option<usize>,
    steps: usize,
    batches_per_step: usize,
    max_batch_tokens: usize,
    /// Packed tokens of all steps, without padding.
    tokens: usize,
    memory_bytes: MemoryEstimate,
    host_bytes: HostEstimate,
    disk_bytes: DiskEstimate,
    comparisons: Comparisons,
    fits: bool,
    proposals: Proposals,
    duration: DurationEstimate,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum DurationEstimate {
    Estimated {
        /// Over all steps, without validation and checkpoints.
        seconds: f64,
        seconds_per_step: f64,
        /// 0 for an estimate from operations and bytes.
        timed_steps: usize,
        /// Of an estimate from operations and bytes.
        relative_error: Option<f64>,
    },
    Unknown {
        reason: String,
    },
}

/// Prints the plan of a run. Unless `skip_timing`, it takes a few steps with random weights on a
/// device that this machine has.
///
/// # Errors
/// Bad settings and data.
pub fn run(settings: &Settings, skip_timing: bool, json: bool) -> Result<()> {
    let device = PlannedDevice::new(settings)?;
    settings.check_processes(device.world_size)?;
    let (tokenizer, folder) = load_tokenizer(settings)?;
    let config = load_config(settings, &tokenizer, &folder)?;
    let examples = dataset::read(settings, &tokenizer, &config)?;
    let probe = Validator::load(settings, &tokenizer, &config)?.and_then(|validator| validator.probe_size());
    let inputs = RunInputs::new(settings, device, &config, &examples, probe, &folder)?;
    let needs = inputs.needs(settings)?;
    let available = Available::detect(settings, &inputs.device)?;
    let comparisons = Comparisons::new(&needs, &available);
    let proposals = Proposals::find(&inputs, settings, &comparisons, &available)?;
    let slow_path = inputs.device.slow_path_reason(&config)?;
    let duration = estimate_duration(&inputs, settings, &needs, &comparisons, slow_path.as_deref(), skip_timing)?;
    let schedule = &needs.schedule;
    let plan = Plan {
        schema_version: 1,
        device: inputs.device.name.clone(),
        num_processes: inputs.device.world_size,
        slow_path,
        parameters: config.num_parameters(),
        trained_parameters: settings.trained_parameters(&config),
        num_examples: examples.len(),
        num_excluded: schedule.num_excluded,
        epochs: settings.epochs,
        last_epoch: settings.max_steps.filter(|&max| max == schedule.num_steps()).map(|_| schedule.num_epochs()),
        steps: schedule.num_steps(),
        batches_per_step: settings.accumulation,
        max_batch_tokens: settings.max_batch_tokens,
        tokens: schedule.num_tokens,
        memory_bytes: needs.memory,
        host_bytes: needs.host,
        disk_bytes: needs.disk,
        fits: comparisons.fit(),
        comparisons,
        proposals,
        duration,
    };
    if json { print_json(&plan) } else { print(&text::describe(&plan)) }
}

/// Times steps on a device that is here, if they fit. Estimates those on a GPU that is not, and those
/// of several processes.
fn estimate_duration(
    inputs: &RunInputs<'_>,
    settings: &Settings,
    needs: &Needs,
    comparisons: &Comparisons,
    slow_path: Option<&str>,
    skip_timing: bool,
) -> Result<DurationEstimate> {
    let device = &inputs.device;
    let unknown = |reason: String| Ok(DurationEstimate::Unknown { reason });
    let fits = comparisons.device_memory.unwrap_or(comparisons.host_memory).fits();
    let timed_device = device.present.filter(|_| device.world_size == 1);
    match (timed_device, device.gpu) {
        (Some(_), _) if skip_timing => unknown("--no-timing".to_owned()),
        (Some(_), _) if !fits => unknown("no step was timed, because it does not fit".to_owned()),
        (Some(here), _) => {
            progress::log("timing some steps (--no-timing skips this)");
            match catch_panics(|| timing::time_steps(settings, inputs, needs, here)) {
                Err(interrupted @ Error::Interrupted(_)) => Err(interrupted),
                Err(error) => unknown(format!("a step failed: {error}")),
                Ok(timed) => Ok(timed),
            }
        }
        (None, Some(_)) if slow_path.is_some() => {
            unknown("only steps on the device tell how long libtorch's operations take".to_owned())
        }
        (None, Some(gpu)) => {
            let seconds_per_step = inputs.step_work(settings, needs).seconds(gpu);
            let seconds = seconds_per_step * needs.schedule.num_steps() as f64;
            let relative_error = Some(time::RELATIVE_ERROR);
            Ok(DurationEstimate::Estimated { seconds, seconds_per_step, timed_steps: 0, relative_error })
        }
        (None, None) if device.present.is_some() => unknown(
            "only steps of a single process are timed here, and nothing is known about the speed of this device"
                .to_owned(),
        ),
        (None, None) => {
            unknown("nothing is known about the speed of this device: name one, as device=h100-80gb".to_owned())
        }
    }
}
