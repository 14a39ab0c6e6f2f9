//! The models of a run, and the gradients of a step.

use std::path::Path;

use cllm_core::checkpoint::hub;
use cllm_core::distributed::ProcessGroup;
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device};
use tch::{Device, Kind, Tensor};

use crate::data::loader::StepBatches;
use crate::data::packing::Batch;
use crate::loss::{Backward, losses};
use crate::settings::{Objective, Settings};
use crate::trainer::random_config;

/// What a run trains, and what it holds on to.
pub struct Models {
    /// Learns.
    pub student: Transformer,
    /// The frozen model that the student is anchored to, if it is.
    teacher: Option<Transformer>,
}

impl Models {
    /// Loads them, or makes random weights.
    ///
    /// # Errors
    /// Bad model folders and shapes.
    pub fn load(settings: &Settings, tokenizer: &Tokenizer, folder: &Path, place: Device) -> Result<Self> {
        let kind = device::default_kind(place);
        let mut student = match &settings.init {
            None => cllm_core::checkpoint::load(folder, place, kind)?,
            Some(init) => Transformer::random(random_config(init, tokenizer)?, settings.seed, place, kind),
        };
        if let Some(lora) = &settings.lora {
            student.add_adapters(lora, settings.seed);
        }
        let teacher = match (settings.is_anchored(), &settings.consistency.anchor, &settings.lora) {
            (false, ..) => None,
            (true, Some(name), _) => Some(anchor(name, student.config(), place)?),
            // The weights that it starts from are still there, frozen.
            (true, None, Some(_)) => Some(student.without_adapters()),
            (true, None, None) => Some(cllm_core::checkpoint::load(folder, place, kind)?),
        };
        Ok(Models { student, teacher })
    }

    /// Random weights of a shape, drawn on the device, to measure speed with.
    ///
    /// # Errors
    /// [`cllm_core::Error::Usage`] where an anchor is asked for, which such weights are none of.
    pub fn noise(config: ModelConfig, settings: &Settings, place: Device) -> Result<Self> {
        if settings.is_anchored() {
            return Err(Error::usage("consistency.anchor_weight: random weights have no teacher; leave it at 0"));
        }
        let mut student = Transformer::random_on_device(config, place, device::default_kind(place));
        if let Some(lora) = &settings.lora {
            student.add_adapters(lora, settings.seed);
        }
        Ok(Models { student, teacher: None })
    }

    /// Adds up the gradients of this process's batches of a step, each loss a mean over its tokens in those of all processes.
    /// Returns this process's part of the losses, still on the device: nothing here waits for it.
    ///
    /// # Errors
    /// [`cllm_core::Error::Torch`], such as memory that ran out.
    pub fn gradients(&self, settings: &Settings, step: &StepBatches) -> Result<Means> {
        let divisors = step.counts.divisors().map(|count| (count as f64).max(1.0));
        let weights = weights(settings);
        let scale = std::array::from_fn(|loss| weights[loss] / divisors[loss]);
        let backward = Backward { scale, recomputed: settings.checkpointed_layers };
        let mut means = [0; 4].map(|_| Tensor::zeros([], (Kind::Float, self.student.device())));
        for batch in &step.batches {
            let sums = losses(&self.student, self.teacher.as_ref(), batch, &settings.consistency, Some(backward))?;
            for (index, sum) in sums.into_iter().enumerate() {
                means[index] += sum / divisors[index];
            }
        }
        Ok(Means(means))
    }

    /// The sums of the losses of a batch, without gradients.
    ///
    /// # Errors
    /// [`cllm_core::Error::Torch`], such as memory that ran out.
    pub fn sums(&self, settings: &Settings, batch: &Batch) -> Result<[f64; 4]> {
        let sums = losses(&self.student, self.teacher.as_ref(), batch, &settings.consistency, None)?;
        Ok(sums.map(|sum| sum.double_value(&[])))
    }
}

/// A frozen model with the student's vocabulary.
fn anchor(name: &str, student: &ModelConfig, place: Device) -> Result<Transformer> {
    let folder = hub::locate(name)?;
    let (found, wanted) = (cllm_core::checkpoint::load_config(&folder)?.vocab_size, student.vocab_size);
    if found != wanted {
        let what = format!("has {found} tokens, the model of the run {wanted}: an anchor needs the same vocabulary");
        return Err(Error::file(folder, format!("consistency.anchor {what}")));
    }
    cllm_core::checkpoint::load(&folder, place, device::default_kind(place))
}

/// This process's part of the losses of a step, on the device: autoregressive, global, local, anchor.
pub struct Means([Tensor; 4]);

impl Means {
    /// The losses of all processes as numbers. Waits for the device.
    ///
    /// # Errors
    /// A process that is gone.
    pub fn read(&self, group: &ProcessGroup) -> Result<[f64; 4]> {
        let all = Tensor::f_stack(&self.0, 0)?;
        group.all_reduce(&all)?;
        Ok(std::array::from_fn(|loss| all.double_value(&[loss as i64])))
    }
}

/// Weights of the losses, in the order of [`Means`].
pub fn weights(settings: &Settings) -> [f64; 4] {
    let consistency = &settings.consistency;
    match settings.objective {
        Objective::Sft => [1.0, 0.0, 0.0, 0.0],
        Objective::Consistency => {
            [consistency.ar_weight, consistency.global_weight, consistency.local_weight, consistency.anchor_weight]
        }
    }
}
