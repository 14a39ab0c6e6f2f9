//! The models of a run, and the gradients of a step.

use std::path::Path;

use cllm_core::model::Transformer;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Result, device, fingerprint};
use tch::{Device, Kind, Tensor};

use crate::examples::Example;
use crate::loss::losses;
use crate::packing::{Batch, Counts};
use crate::settings::{Objective, Settings};
use crate::trainer::random_config;

/// What a run trains, and what it holds on to.
pub struct Models {
    /// Learns; its weights collect gradients.
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
        let student = match &settings.init {
            None => Transformer::load(folder, place, kind)?,
            Some(init) => Transformer::random(random_config(init, tokenizer)?, settings.seed, place, kind),
        };
        student.set_requires_grad(true);
        let teacher = settings.anchored().then(|| Transformer::load(folder, place, kind)).transpose()?;
        Ok(Models { student, teacher })
    }

    /// Adds up the gradients of some batches, each loss a mean over its tokens in all of them. Returns what they held and
    /// the losses, still on the device: nothing here waits for it.
    pub fn gradients(
        &self,
        settings: &Settings,
        examples: &[Example],
        group: &[Vec<usize>],
        epoch: usize,
    ) -> (Counts, Means) {
        self.each_loss(settings, examples, group, epoch, |total| total.backward())
    }

    /// The same losses without gradients.
    pub fn losses(
        &self,
        settings: &Settings,
        examples: &[Example],
        group: &[Vec<usize>],
        epoch: usize,
    ) -> (Counts, Means) {
        let _no_grad = tch::no_grad_guard();
        self.each_loss(settings, examples, group, epoch, |_| {})
    }

    /// Gives the weighted sum of the losses of each batch to `learn`.
    fn each_loss(
        &self,
        settings: &Settings,
        examples: &[Example],
        group: &[Vec<usize>],
        epoch: usize,
        learn: impl Fn(Tensor),
    ) -> (Counts, Means) {
        let pack = |&index: &usize| {
            let mut rng = fingerprint::rng(settings.seed, &examples[index].id, epoch as u64);
            examples[index].pack(&settings.consistency, &mut rng)
        };
        let batches: Vec<Batch> = group
            .iter()
            .map(|rows| Batch::new(&rows.iter().map(pack).collect::<Vec<_>>(), self.student.device()))
            .collect();
        let mut counts = Counts::default();
        batches.iter().for_each(|batch| counts.add(batch.counts));
        let divisors = counts.divisors(settings.consistency.reduction);
        let weights = weights(settings);
        let mut means = Means::default();
        for batch in &batches {
            let sums = losses(&self.student, self.teacher.as_ref(), batch, &settings.consistency);
            let mut total = Tensor::zeros([], (Kind::Float, self.student.device()));
            for (index, sum) in [sums.ar, sums.global, sums.local, sums.anchor].into_iter().enumerate() {
                let mean = sum / (divisors[index] as f64).max(1.0);
                means.0[index].push(mean.detach());
                total += mean * weights[index];
            }
            learn(total);
        }
        (counts, means)
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
