//! The losses on held-out trajectories, during training.

use cllm_core::model::ModelConfig;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, interrupt, progress};
use serde_json::{Value, json};

use crate::data::dataset::{self as examples, Example};
use crate::data::loader::Packer;
use crate::data::packing::Counts;
use crate::data::schedule::Schedule;
use crate::settings::Settings;
use crate::step::{Models, weights};

/// Trajectories that are not trained on, in batches.
pub struct HeldOut {
    examples: Vec<Example>,
    batches: Vec<Vec<usize>>,
}

impl HeldOut {
    /// Reads those of a run, if it has some.
    ///
    /// # Errors
    /// Bad data sets, and one of which no response fits a batch.
    pub fn of(settings: &Settings, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<Option<Self>> {
        let labels = settings.consistency.labels;
        let Some(path) = &settings.validation.trajectories else { return Ok(None) };
        let mut examples = examples::trajectories(path, tokenizer, config, labels, settings.validation.num_examples)?;
        let all = examples.len();
        examples.retain(|example| example.prompt.len() + example.response.len() <= config.max_positions);
        if examples.is_empty() {
            let message = "holds no responses to probe with: leave probe.trajectories out, or fill it";
            return Err(Error::file(path, message));
        }
        let once = Settings { epochs: 1, max_steps: None, ..settings.clone() };
        let schedule = Schedule::new(&examples, &once)?;
        let left_out = all - examples.len() + schedule.left_out;
        if left_out > 0 {
            progress::log(format!("{}: {left_out} of {all} responses are too long for the probe", path.display()));
        }
        Ok(Some(HeldOut { batches: schedule.batches(0), examples }))
    }

    /// The losses, as lines of metrics name them: each a mean over its tokens in all batches. Blocks and states are the
    /// same each time.
    ///
    /// # Errors
    /// A signal that asks to stop.
    pub fn losses(&self, models: &Models, settings: &Settings) -> Result<Value> {
        let packer = Packer::new(settings, &self.examples, models.student.config());
        let mut sums = [0.0; 4];
        let mut all = Counts::default();
        for batch in &self.batches {
            interrupt::check()?;
            let batch = packer.batch(batch, 0);
            sums.iter_mut().zip(models.sums(settings, &batch)?).for_each(|(sum, more)| *sum += more);
            all.add(batch.counts);
        }
        let tokens = all.divisors();
        let means: Vec<f64> = sums.iter().zip(tokens).map(|(sum, tokens)| sum / (tokens as f64).max(1.0)).collect();
        let loss: f64 = means.iter().zip(weights(settings)).map(|(mean, weight)| mean * weight).sum();
        Ok(json!({
            "held_out_loss": loss, "held_out_ar_loss": means[0], "held_out_consistency_loss": means[1],
            "held_out_local_loss": means[2], "held_out_anchor_loss": means[3],
        }))
    }
}
