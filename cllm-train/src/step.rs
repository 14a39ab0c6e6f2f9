//! The models of a run, and the gradients of a step.

use std::path::Path;

use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device};
use tch::{Device, Tensor};

use crate::loss::{Backward, losses};
use crate::packing::{Batch, Counts};
use crate::settings::{Objective, Reduction, Settings};
use crate::trainer::random_config;

/// What a run trains, and what it holds on to.
pub struct Models {
    /// Learns.
    pub student: Transformer,
    /// The model that the run started from, where the student is anchored to it.
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
            None => Transformer::load(folder, place, kind)?,
            Some(init) => Transformer::random(random_config(init, tokenizer)?, settings.seed, place, kind),
        };
        if let Some(lora) = &settings.lora {
            student.adapt(lora, settings.seed);
        }
        let teacher = match (settings.anchored(), &settings.lora) {
            (false, _) => None,
            // The weights that it starts from are still there, frozen.
            (true, Some(_)) => Some(student.base()),
            (true, None) => Some(Transformer::load(folder, place, kind)?),
        };
        Ok(Models { student, teacher })
    }

    /// Random weights of a shape, drawn on the device, to measure speed with.
    ///
    /// # Errors
    /// [`cllm_core::Error::Usage`] where an anchor is asked for, which such weights are none of.
    pub fn noise(config: ModelConfig, settings: &Settings, place: Device) -> Result<Self> {
        if settings.anchored() {
            return Err(Error::usage("consistency.anchor_weight: random weights have no teacher; leave it at 0"));
        }
        let mut student = Transformer::noise(config, place, device::default_kind(place));
        if let Some(lora) = &settings.lora {
            student.adapt(lora, settings.seed);
        }
        Ok(Models { student, teacher: None })
    }

    /// Adds up the gradients of some batches, each loss a mean over its tokens in all of them. Returns what they held and
    /// the losses, still on the device: nothing here waits for it.
    ///
    /// # Errors
    /// [`cllm_core::Error::Torch`], such as memory that ran out.
    pub fn gradients(&self, settings: &Settings, batches: &[Batch]) -> Result<(Counts, Means)> {
        let mut counts = Counts::default();
        batches.iter().for_each(|batch| counts.add(batch.counts));
        let divisors = match settings.consistency.reduction {
            Reduction::TokenMean => [counts.clean, counts.noisy, counts.local, counts.clean],
        };
        let divisors = divisors.map(|count| (count as f64).max(1.0));
        let weights = weights(settings);
        let scale = std::array::from_fn(|loss| weights[loss] / divisors[loss]);
        let backward = Backward { scale, recomputed: settings.recompute };
        let mut means = Means::default();
        for batch in batches {
            let sums = losses(&self.student, self.teacher.as_ref(), batch, &settings.consistency, Some(backward))?;
            for (index, sum) in sums.into_iter().enumerate() {
                means.0[index].push(sum / divisors[index]);
            }
        }
        Ok((counts, means))
    }
}

/// Losses of a step on the device, a term for each of its batches: autoregressive, global, local, anchor.
#[derive(Default)]
pub struct Means([Vec<Tensor>; 4]);

impl Means {
    /// The losses as numbers. Waits for the device.
    pub fn read(&self) -> [f64; 4] {
        self.0.each_ref().map(|terms| terms.iter().map(|term| term.double_value(&[])).sum())
    }
}

/// Weights of the losses, in the order of [`Means`].
pub fn weights(settings: &Settings) -> [f64; 4] {
    let consistency = &settings.consistency;
    match settings.objective {
        Objective::Sft => [1.0, 0.0, 0.0, 0.0],
        Objective::Consistency => {
            [consistency.ar_weight, consistency.weight, consistency.local_weight, consistency.anchor_weight]
        }
    }
}
