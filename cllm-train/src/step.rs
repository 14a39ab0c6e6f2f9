//! One training step: the gradients of its batches, then an update of the weights. `run`, `bench`
//! and `plan` all use it.

use cllm_core::Result;
use cllm_core::distributed::ProcessGroup;
use tch::{Kind, Tensor};

use crate::data::batch::Batch;
use crate::data::loader::StepBatches;
use crate::loss::{Backward, batch_losses};
use crate::losses::Losses;
use crate::models::Models;
use crate::optimizer::{Gradients, OptimizerState};
use crate::settings::Settings;

/// The results of a step. They stay on the device, so that a step does not wait for it.
pub struct StepOutput {
    pub losses: DeviceLosses,
    /// Norm of the gradient before clipping, float32 scalar.
    pub grad_norm: Tensor,
}

/// Trains on the batches of a step. `number` counts steps from 1.
///
/// # Errors
/// [`cllm_core::Error::Torch`], for example when memory runs out; a process that has died.
pub fn train_step(
    models: &Models,
    optimizer: &mut OptimizerState,
    settings: &Settings,
    step: &StepBatches,
    number: usize,
    lr: f64,
) -> Result<StepOutput> {
    let losses = accumulate_gradients(models, settings, step, optimizer.gradients())?;
    let grad_norm = optimizer.step(lr, number)?;
    Ok(StepOutput { losses, grad_norm })
}

/// Adds up the gradients of this process's batches. Each loss is a mean over its tokens in the
/// batches of all processes.
fn accumulate_gradients(
    models: &Models,
    settings: &Settings,
    step: &StepBatches,
    gradients: &Gradients,
) -> Result<DeviceLosses> {
    let divisors = step.counts.num_loss_tokens.divisors();
    let scale = settings.loss_weights().zip(divisors).map(|(weight, divisor)| weight / divisor);
    let backward = Backward { gradients: gradients.sink(), scale, checkpointed_layers: settings.checkpointed_layers };
    let zero = || Tensor::zeros([], (Kind::Float, models.student.device()));
    let mut means = Losses { ar: zero(), global: zero(), local: zero(), anchor: zero() };
    for batch in &step.batches {
        let sums = batch_losses(&models.student, models.anchor.as_ref(), batch, &settings.consistency, Some(backward))?;
        for (mean, (sum, divisor)) in means.as_mut().zip(sums.zip(divisors)).into_array() {
            *mean += sum / divisor;
        }
    }
    (step.batches.len()..step.max_batches).try_for_each(|_| gradients.add_nothing())?;
    Ok(DeviceLosses(means))
}

/// The sum of each loss over the tokens of a batch, without gradients.
///
/// # Errors
/// [`cllm_core::Error::Torch`], for example when memory runs out.
pub fn evaluate_batch(models: &Models, settings: &Settings, batch: &Batch) -> Result<Losses<f64>> {
    let sums = batch_losses(&models.student, models.anchor.as_ref(), batch, &settings.consistency, None)?;
    Ok(sums.map(|sum| sum.double_value(&[])))
}

/// The sums of a step's losses over the batches of this process, as float32 scalars on the device.
pub struct DeviceLosses(Losses<Tensor>);

impl DeviceLosses {
    /// Sums the losses over all processes and waits for the device.
    ///
    /// # Errors
    /// A process that has died.
    pub fn read(&self, group: &ProcessGroup) -> Result<Losses<f64>> {
        let stacked = Tensor::f_stack(&self.0.as_ref().into_array(), 0)?;
        group.all_reduce(&stacked)?;
        Ok(Losses::from_array(std::array::from_fn(|loss| stacked.double_value(&[loss as i64]))))
    }
}
