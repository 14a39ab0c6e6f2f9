//! Measurements on held-out data during training: answers to prompts (speed and accuracy), losses
//! on trajectories, and the choice of the best checkpoint from them.

pub mod best_checkpoint;
mod generation_probe;
mod losses;
pub mod metrics;

use cllm_core::Result;
use cllm_core::model::ModelConfig;
use cllm_core::tokenizer::Tokenizer;

use crate::losses::Losses;
use crate::models::Models;
use crate::settings::Settings;
use generation_probe::GenerationProbe;
pub use generation_probe::ProbeSize;
use losses::ValidationLosses;
use metrics::GenerationMetrics;

/// The held-out data of a run: prompts to answer and trajectories to compute losses on.
pub struct Validator<'t> {
    probe: Option<GenerationProbe<'t>>,
    losses: Option<ValidationLosses>,
}

/// The results of a validation.
pub struct ValidationOutput {
    /// `None` without prompts to answer.
    pub generation: Option<GenerationMetrics>,
    /// `None` without trajectories.
    pub losses: Option<Losses<f64>>,
}

impl<'t> Validator<'t> {
    /// Reads and checks all validation data, so that a bad prompt stops a run before its first step
    /// and not midway. `None` if the settings name no data.
    pub fn load(settings: &Settings, tokenizer: &'t Tokenizer, config: &ModelConfig) -> Result<Option<Self>> {
        let probe = GenerationProbe::load(settings, tokenizer, config)?;
        let losses = ValidationLosses::load(settings, tokenizer, config)?;
        Ok((probe.is_some() || losses.is_some()).then_some(Validator { probe, losses }))
    }

    /// The size of the prompts to answer; `None` without any.
    pub fn probe_size(&self) -> Option<ProbeSize> {
        self.probe.as_ref().map(GenerationProbe::size)
    }

    pub fn run(&self, models: &Models, settings: &Settings) -> Result<ValidationOutput> {
        let generation = self.probe.as_ref().map(|probe| probe.run(&models.student)).transpose()?;
        let losses = self.losses.as_ref().map(|losses| losses.evaluate(models, settings)).transpose()?;
        Ok(ValidationOutput { generation, losses })
    }
}
