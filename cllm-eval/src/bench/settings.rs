//! Settings of `bench`.

use std::collections::BTreeSet;
use std::path::PathBuf;

use cllm_core::chat_template::RenderSettings;
use cllm_core::decode::{MAX_GATED_TOKENS, Strategy};
use cllm_core::model::{LoraTarget, ModelShape};
use cllm_core::{Error, Result, progress, settings};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Settings of `cllm-eval bench`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BenchSettings {
    /// Folder or id of the model to measure.
    #[garde(skip)]
    pub model: Option<String>,
    /// Measure random weights in the shape of a published model, instead of `model`.
    #[garde(skip)]
    pub shape: Option<ModelShape>,
    /// Name of the model in the results. Default: the last part of its folder, or its shape.
    #[garde(skip)]
    pub name: Option<String>,
    /// Prompt set to measure strategies and collection on. Without one, strategies are left out,
    /// because random prompts would say nothing about them, and collection is measured on synthetic
    /// prompts.
    #[garde(skip)]
    pub prompts: Option<PathBuf>,
    /// Use the first N prompts to compare strategies, one at a time.
    #[garde(range(min = 1))]
    pub num_examples: usize,
    /// Strategies to compare with autoregressive decoding.
    #[garde(custom(crate::config::valid_strategies))]
    pub strategies: Vec<Strategy>,
    /// Time steps of these numbers of tokens; a step of one token is always timed.
    #[garde(length(min = 1), inner(range(min = 1, max = 1024)))]
    pub step_tokens: Vec<usize>,
    /// Length of the synthetic prompts, which is also the length of the timed prefill.
    #[garde(range(min = 1, max = 1_048_576))]
    pub num_prompt_tokens: usize,
    /// Number of tokens to decode for each timing of a step.
    #[garde(range(min = 2, max = 1_048_576))]
    pub num_new_tokens: usize,
    /// Number of repetitions of each timing, after two that warm up; the median is reported.
    #[garde(range(min = 1, max = 10_000))]
    pub num_repeats: usize,
    /// Measure the autoregressive throughput of these batch sizes.
    #[garde(inner(range(min = 1, max = 65_536)))]
    pub batch_sizes: Vec<usize>,
    /// With each of these batch sizes, also time steps in which every row has these numbers of
    /// tokens.
    #[garde(inner(range(min = 1, max = 1024)))]
    pub batch_step_tokens: Vec<usize>,
    /// Also time steps of strategy `gated`, with random adapters for draft tokens, and a window of each
    /// of `step_tokens` from 2 to 32.
    #[garde(dive)]
    pub gated: Option<GatedBenchSettings>,
    /// Measure a collection over all prompts with these batch sizes.
    #[garde(inner(range(min = 1, max = 65_536)))]
    pub collect_batch_sizes: Vec<usize>,
    /// Block size of the collection, in tokens.
    #[garde(range(min = 2, max = 1024))]
    pub collect_n: usize,
    /// Maximum number of tokens in an answer to a prompt.
    #[garde(range(min = 1, max = 1_048_576))]
    pub max_new_tokens: usize,
    /// Output of `scripts/bench-transformers`, to report beside the results.
    #[garde(skip)]
    pub baseline: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
    /// File for the results. It keeps the results of other models if they were measured on the same
    /// machine.
    #[garde(skip)]
    pub output: PathBuf,
    /// How prompts are rendered.
    #[garde(dive)]
    #[serde(flatten)]
    pub rendering: RenderSettings,
}

/// Adapters for draft tokens to measure with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GatedBenchSettings {
    /// Rank of the adapters.
    #[garde(range(min = 1, max = 65536))]
    pub rank: i64,
    /// The projections that get an adapter in each layer from `first_layer` on.
    #[serde(default = "every_projection")]
    #[garde(length(min = 1))]
    pub targets: BTreeSet<LoraTarget>,
    /// The first layer that gets adapters, counted from 0.
    #[serde(default)]
    #[garde(skip)]
    pub first_layer: usize,
}

pub(super) fn every_projection() -> BTreeSet<LoraTarget> {
    LoraTarget::ALL.into()
}

impl Default for BenchSettings {
    fn default() -> Self {
        BenchSettings {
            model: None,
            shape: None,
            name: None,
            prompts: None,
            num_examples: 50,
            strategies: vec![Strategy::Jacobi { n: 16 }, Strategy::rolling(16), Strategy::rolling(32)],
            step_tokens: vec![1, 2, 4, 8, 16, 32, 64],
            num_prompt_tokens: 200,
            num_new_tokens: 128,
            num_repeats: 5,
            batch_sizes: vec![8, 64, 256],
            batch_step_tokens: Vec::new(),
            gated: None,
            collect_batch_sizes: Vec::new(),
            collect_n: 16,
            max_new_tokens: 256,
            baseline: None,
            device: "auto".to_owned(),
            output: PathBuf::from("runs/bench.json"),
            rendering: RenderSettings::default(),
        }
    }
}

impl BenchSettings {
    /// The windows to time steps of strategy `gated` with: those of `step_tokens` that it may have.
    pub(super) fn gated_windows(&self) -> impl Iterator<Item = usize> + '_ {
        self.step_tokens.iter().copied().filter(|n| (2..=MAX_GATED_TOKENS).contains(n))
    }

    /// Says which steps strategy `gated` leaves out, if it is timed.
    ///
    /// # Errors
    /// [`Error::Usage`] if it leaves out all of them.
    pub(super) fn check_gated_windows(&self) -> Result<()> {
        if self.gated.is_none() {
            return Ok(());
        }
        if self.gated_windows().next().is_none() {
            return Err(Error::usage(format!(
                "gated times windows of 2 to {MAX_GATED_TOKENS} tokens, and step_tokens has none: add one, such as 16"
            )));
        }
        let too_large: Vec<String> =
            self.step_tokens.iter().filter(|&&n| n > MAX_GATED_TOKENS).map(usize::to_string).collect();
        if !too_large.is_empty() {
            progress::log(format!(
                "gated: windows have at most {MAX_GATED_TOKENS} tokens, so it has no steps of {}",
                too_large.join(", ")
            ));
        }
        Ok(())
    }

    /// The reference of the settings, in Markdown.
    pub fn reference() -> String {
        settings::reference::<BenchSettings>("cllm-eval bench")
    }
}
