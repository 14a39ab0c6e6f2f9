//! `plan`: what a run will take, before anything starts.

use cllm_core::model::ModelConfig;
use cllm_core::program::print;
use cllm_core::{Result, device};
use tch::Kind;

use crate::schedule::Schedule;
use crate::settings::Settings;
use crate::trainer;

/// Prints parameters, memory of the weights and optimizer, steps and tokens.
pub fn run(settings: &Settings) -> Result<()> {
    let place = device::parse(&settings.device)?;
    let (tokenizer, folder) = trainer::tokenizer(settings)?;
    let config = match &settings.init {
        None => ModelConfig::load(&folder)?,
        Some(init) => trainer::random_config(init, &tokenizer)?,
    };
    let examples = crate::examples::read(settings, &tokenizer, &config)?;
    let schedule = Schedule::new(&examples, settings)?;
    let (steps, left_out) = (schedule.steps(), schedule.left_out);
    let tokens: usize = examples.iter().map(|example| example.packed_len(&settings.consistency)).sum();
    let parameters = config.parameter_count() as f64;
    // Weights, gradients and two moments; in bf16 also masters, and the gradients in float32 during the update.
    let per_parameter = if device::default_kind(place) == Kind::Float { 4.0 * 4.0 } else { 2.0 + 2.0 + 4.0 * 4.0 };
    print(&format!(
        "parameters            {:.2} M\nresponses             {} ({left_out} too long, left out)\npacked tokens         {tokens} an \
         epoch, {} epochs\nsteps                 {steps} of {} batches of up to {} tokens\nweights and optimizer {:.1} MB on {}",
        parameters / 1e6,
        examples.len(),
        settings.epochs,
        settings.accumulation,
        settings.tokens_per_batch,
        parameters * per_parameter / 1e6,
        if place.is_cuda() { "the GPU" } else { "the CPU" },
    ))
}
