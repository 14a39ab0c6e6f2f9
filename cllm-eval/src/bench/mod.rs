//! `bench`: how fast a model decodes, and how close its steps come to what the memory bandwidth
//! allows.
//!
//! Steps, prefill and batches are timed on synthetic prompts, because their time does not depend on
//! the tokens. Strategies and collection need real prompts, because their gain does.

mod measure;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cllm_core::bench_results::{BenchRecord, BenchResults};
use cllm_core::checkpoint::{self, hub};
use cllm_core::cuda::libtorch;
use cllm_core::decode::Strategy;
use cllm_core::model::{ModelPreset, Transformer};
use cllm_core::prompt_set::{self, Sample};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device, progress, settings, text_file};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tch::Device;

use measure::Bench;

/// Settings of `cllm-eval bench`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BenchSettings {
    /// Folder or id of the model to measure.
    #[garde(skip)]
    pub model: Option<String>,
    /// Measure random weights in the shape of a known model, instead of `model`.
    #[garde(skip)]
    pub preset: Option<ModelPreset>,
    /// Name of the model in the results. Default: the last part of its folder, or its preset.
    #[garde(skip)]
    pub name: Option<String>,
    /// Prompt set to measure strategies and collection on. Without one they are left out, because
    /// random prompts would say nothing about them.
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
    #[garde(range(min = 1))]
    pub num_prompt_tokens: usize,
    /// Number of tokens to decode for each timing of a step.
    #[garde(range(min = 2))]
    pub num_new_tokens: usize,
    /// Number of repetitions of each timing, after two that warm up; the median is reported.
    #[garde(range(min = 1))]
    pub num_repeats: usize,
    /// Measure the autoregressive throughput of these batch sizes.
    #[garde(inner(range(min = 1)))]
    pub batch_sizes: Vec<usize>,
    /// Batch size of a collection over all prompts, which is then measured too; `null` measures
    /// none.
    #[garde(range(min = 1))]
    pub collect_batch_size: Option<usize>,
    /// Block size of the collection, in tokens.
    #[garde(range(min = 2, max = 1024))]
    pub collect_n: usize,
    /// Maximum number of tokens in an answer to a prompt.
    #[garde(range(min = 1))]
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
}

impl Default for BenchSettings {
    fn default() -> Self {
        BenchSettings {
            model: None,
            preset: None,
            name: None,
            prompts: None,
            num_examples: 50,
            strategies: vec![Strategy::Jacobi { n: 16 }, Strategy::rolling(16), Strategy::rolling(32)],
            step_tokens: vec![1, 2, 4, 8, 16, 32, 64],
            num_prompt_tokens: 200,
            num_new_tokens: 128,
            num_repeats: 5,
            batch_sizes: vec![8, 64, 256],
            collect_batch_size: None,
            collect_n: 16,
            max_new_tokens: 256,
            baseline: None,
            device: "auto".to_owned(),
            output: PathBuf::from("runs/bench.json"),
        }
    }
}

impl BenchSettings {
    /// The reference of the settings, in Markdown.
    pub fn reference() -> String {
        settings::reference::<BenchSettings>("cllm-eval bench")
    }
}

/// The output file: one record per model.
pub type DecodeBenchResults = BenchResults<DecodeBench>;

/// Measurements of a model. Times are medians; a step is one forward with everything around it,
/// including the host's work.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DecodeBench {
    pub name: String,
    /// Number of weights.
    pub parameters: i64,
    /// Autoregressive decoding at batch 1, excluding prefill.
    pub ar_tokens_per_second: f64,
    /// The same with `transformers`, from the baseline file.
    pub transformers_ar_tokens_per_second: Option<f64>,
    /// Milliseconds of a step at batch 1, by its number of tokens.
    pub step_ms: BTreeMap<usize, f64>,
    /// `step_ms` over that of a step of one token.
    pub relative_step_time: BTreeMap<usize, f64>,
    /// Milliseconds of the prefill of `num_prompt_tokens` tokens at batch 1.
    pub prefill_ms: f64,
    /// Autoregressive tokens per second of the whole batch, by batch size.
    pub batch_tokens_per_second: BTreeMap<usize, f64>,
    pub memory_floor: MemoryFloor,
    /// Peak GPU memory while steps were timed, excluding what was in use before the model was
    /// loaded; null on the CPU.
    pub peak_memory_bytes: Option<u64>,
    /// On the prompts; the first is autoregressive. Empty without prompts.
    pub strategies: Vec<StrategyBench>,
    /// Null unless `collect_batch_size` is set.
    pub collection: Option<CollectionBench>,
    pub settings: BenchSettings,
}

impl BenchRecord for DecodeBench {
    fn name(&self) -> &str {
        &self.name
    }
}

/// The shortest time in which the memory can deliver what a step of one token reads.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct MemoryFloor {
    /// Weights, keys and values that the step reads.
    pub bytes: u64,
    /// Bandwidth of a large copy on the device, counting bytes read and bytes written; measured in
    /// the same run.
    pub bandwidth_bytes_per_second: f64,
    /// `bytes` at that bandwidth, in milliseconds.
    pub ms: f64,
    /// `ms` over the measured step.
    pub fraction_of_step: f64,
}

/// A strategy on the prompts at batch 1.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StrategyBench {
    pub strategy: Strategy,
    /// Number of answers.
    pub examples: usize,
    /// Answers that reached the length limit.
    pub unfinished: usize,
    pub tokens_per_forward: f64,
    /// Excluding prefill.
    pub tokens_per_second: f64,
    /// Tokens per second over those of autoregressive decoding.
    pub speedup_vs_ar: f64,
    /// Fraction of the answers that equal the autoregressive ones, token for token.
    pub exact_match_vs_ar: f64,
    /// Peak GPU memory, excluding what was in use before the model was loaded; null on the CPU.
    pub peak_memory_bytes: Option<u64>,
}

/// A collection over all prompts: trajectories are recorded but not written.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CollectionBench {
    /// Number of responses.
    pub responses: usize,
    pub tokens_per_forward: f64,
    /// Response tokens per second.
    pub tokens_per_second: f64,
}

/// Measures a model and adds it to the output file.
///
/// # Errors
/// When settings contradict each other, a file is missing, or the output holds results of another machine.
pub fn bench(settings: &BenchSettings) -> Result<DecodeBenchResults> {
    let device = device::parse(&settings.device)?;
    let other_memory_bytes = libtorch::gpu_memory(device).map_or(0, |(current, _)| current);
    let (model, name, tokenizer) = load_model(settings, device)?;
    let mut results = DecodeBenchResults::open(&settings.output, device)?;
    let prompts = load_prompts(settings, tokenizer)?;
    let baseline = settings.baseline.as_deref().map(read_baseline).transpose()?;
    let bench = Bench { model: &model, settings, other_memory_bytes };
    let mut record = bench.measure_steps(settings.name.clone().unwrap_or(name))?;
    record.transformers_ar_tokens_per_second = baseline;
    if let Some((samples, tokenizer)) = prompts {
        bench.measure_prompts(&samples, &tokenizer, &mut record)?;
    }
    results.put(&settings.output, record)?;
    progress::log(format!("wrote {}", settings.output.display()));
    Ok(results)
}

/// The model with its name, and its tokenizer unless it is a preset.
fn load_model(settings: &BenchSettings, device: Device) -> Result<(Transformer, String, Option<Tokenizer>)> {
    let dtype = device::default_kind(device);
    match (&settings.model, settings.preset) {
        (Some(model), None) => {
            let folder = hub::locate(model)?;
            let name = folder.file_name().map_or(model.clone(), |name| name.to_string_lossy().into_owned());
            Ok((checkpoint::load(&folder, device, dtype)?, name, Some(Tokenizer::load(&folder)?)))
        }
        (None, Some(preset)) => {
            let model = Transformer::random_on_device(preset.config(None)?, device, dtype);
            Ok((model, preset.name().to_owned(), None))
        }
        _ => Err(Error::usage("set either `model` (a folder or id) or `preset` (135M, 1.7B or 7B)")),
    }
}

fn load_prompts(settings: &BenchSettings, tokenizer: Option<Tokenizer>) -> Result<Option<(Vec<Sample>, Tokenizer)>> {
    match (&settings.prompts, tokenizer) {
        (Some(path), Some(tokenizer)) => Ok(Some((prompt_set::read(path)?, tokenizer))),
        (Some(_), None) => {
            Err(Error::usage("a preset has no tokenizer for `prompts`: leave `prompts` out, or set `model` instead"))
        }
        (None, _) => Ok(None),
    }
}

fn read_baseline(path: &Path) -> Result<f64> {
    let value: serde_json::Value =
        serde_json::from_str(&text_file::read(path)?).map_err(|error| Error::file(path, error.to_string()))?;
    value["ar_tokens_per_second"]
        .as_f64()
        .ok_or_else(|| Error::file(path, "has no `ar_tokens_per_second`: create it with scripts/bench-transformers"))
}

/// The results as the terminal shows them.
pub fn summary(results: &DecodeBenchResults) -> String {
    let models = results.models.iter().map(model_summary).collect::<Vec<_>>().join("\n");
    format!("{}\n\n{models}", results.hardware.summary())
}

fn model_summary(model: &DecodeBench) -> String {
    let transformers = model.transformers_ar_tokens_per_second;
    let mut text = format!(
        "{}: {:.1} tokens/s autoregressive{}, {:.0} % of what the memory bandwidth allows; prefill {:.2} ms\n",
        model.name,
        model.ar_tokens_per_second,
        transformers.map_or_else(String::new, |speed| format!(" (transformers: {speed:.1})")),
        100.0 * model.memory_floor.fraction_of_step,
        model.prefill_ms
    );
    for (num_tokens, ms) in &model.step_ms {
        let (plural, relative) = (if *num_tokens == 1 { "" } else { "s" }, model.relative_step_time[num_tokens]);
        text += &format!("  step of {num_tokens:>3} token{plural}: {ms:8.3} ms, {relative:.2}x\n");
    }
    for (batch_size, speed) in &model.batch_tokens_per_second {
        text += &format!("  batch of {batch_size:>4}: {speed:.0} tokens/s\n");
    }
    for result in &model.strategies {
        text += &format!(
            "  {}: {:.2} tokens/forward, {:.1} tokens/s, {:.2}x, {:.1} % same tokens as AR\n",
            result.strategy,
            result.tokens_per_forward,
            result.tokens_per_second,
            result.speedup_vs_ar,
            100.0 * result.exact_match_vs_ar
        );
    }
    if let Some(collection) = &model.collection {
        text += &format!("  collection: {:.0} response tokens/s\n", collection.tokens_per_second);
    }
    text
}
