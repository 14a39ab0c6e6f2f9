//! How long a step takes on a device that is here: some are taken, and discarded.

use std::rc::Rc;
use std::time::{Duration, Instant};

use cllm_core::distributed::ProcessGroup;
use cllm_core::{Result, device, interrupt};
use tch::Device;

use crate::data::division::RankShard;
use crate::data::loader::BatchLoader;
use crate::models::Models;
use crate::optimizer::OptimizerState;
use crate::plan::DurationEstimate;
use crate::plan::needs::{Needs, RunInputs};
use crate::settings::Settings;
use crate::step::train_step;

/// Number of steps to time, after one that warms up.
const NUM_TIMED_STEPS: usize = 3;
/// After this time, no further step is timed.
const MAX_TIMING: Duration = Duration::from_secs(20);

/// Takes the first steps of a run with random weights and a learning rate of 0.
pub(super) fn time_steps(
    settings: &Settings,
    inputs: &RunInputs<'_>,
    needs: &Needs,
    device: Device,
) -> Result<DurationEstimate> {
    let models = Models::random(inputs.config.clone(), settings, device)?;
    let group = Rc::new(ProcessGroup::single());
    let mut optimizer = OptimizerState::new(&models.student, settings, group)?;
    let loader = BatchLoader::new(settings, inputs.examples, &models.student)?;
    let mut step_seconds = Vec::new();
    let began = Instant::now();
    for batches in needs.batches.chunks(settings.accumulation).cycle().take(1 + NUM_TIMED_STEPS) {
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
    let seconds = seconds_per_step * needs.schedule.num_steps() as f64;
    Ok(DurationEstimate::Estimated { seconds, seconds_per_step, timed_steps: timed.len(), relative_error: None })
}
