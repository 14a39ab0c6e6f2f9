//! The losses of training on held-out trajectories.

use cllm_core::model::ModelConfig;
use cllm_core::progress::count;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, interrupt, progress};

use crate::data::batch::BatchCounts;
use crate::data::dataset::{self, Example};
use crate::data::loader::BatchLoader;
use crate::data::schedule::Schedule;
use crate::losses::Losses;
use crate::models::Models;
use crate::settings::Settings;
use crate::step::evaluate_batch;

/// Held-out trajectories, in batches.
pub struct ValidationLosses {
    examples: Vec<Example>,
    /// Indices of the examples in each batch.
    batches: Vec<Vec<usize>>,
}

impl ValidationLosses {
    /// Reads the validation trajectories of a run, if it has any.
    ///
    /// # Errors
    /// Bad data sets, or a data set in which no example fits into a batch.
    pub fn load(settings: &Settings, tokenizer: &Tokenizer, config: &ModelConfig) -> Result<Option<Self>> {
        let Some(path) = &settings.validation.trajectories else { return Ok(None) };
        let (labels, num_examples) = (settings.consistency.labels, settings.validation.num_examples);
        let mut examples = dataset::read_trajectories(path, tokenizer, config, labels, num_examples)?;
        let num_read = examples.len();
        examples.retain(|example| example.num_clean_tokens() <= config.max_positions);
        if examples.is_empty() {
            let message = "holds no examples to validate with: add some, or leave validation.trajectories out";
            return Err(Error::file(path, message));
        }
        let one_epoch = Settings { epochs: 1, max_steps: None, ..settings.clone() };
        let schedule = Schedule::new(&examples, &one_epoch)?;
        let num_excluded = num_read - examples.len() + schedule.num_excluded;
        if num_excluded > 0 {
            let num_read = count(num_read, "example");
            progress::log(format!("{}: excluded {num_excluded} of {num_read}: too long", path.display()));
        }
        Ok(Some(ValidationLosses { batches: schedule.batches(0), examples }))
    }

    /// Each loss as a mean over its tokens in all batches. Blocks and states are the same every
    /// time.
    ///
    /// # Errors
    /// [`Error::Interrupted`]; [`Error::Torch`], for example when memory runs out.
    pub fn evaluate(&self, models: &Models, settings: &Settings) -> Result<Losses<f64>> {
        let loader = BatchLoader::new(settings, &self.examples, &models.student)?;
        let mut sums = Losses::<f64>::default();
        let mut counts = BatchCounts::default();
        for batch in &self.batches {
            interrupt::check()?;
            let batch = loader.batch(batch, 0);
            let batch_sums = evaluate_batch(models, settings, &batch)?;
            sums = sums.zip(batch_sums).map(|(total, sum)| total + sum);
            counts.add(batch.counts);
        }
        Ok(sums.zip(counts.num_loss_tokens.divisors()).map(|(sum, divisor)| sum / divisor))
    }
}
