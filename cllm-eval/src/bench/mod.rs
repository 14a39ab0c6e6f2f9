//! `bench`: how fast one model decodes, and how near that is to what memory allows.

mod measure;

use std::collections::BTreeMap;
use std::path::PathBuf;

use cllm_core::bench_results::{BenchRecord, BenchResults};
use cllm_core::checkpoint::{self, hub};
use cllm_core::cuda::libtorch;
use cllm_core::decode::Strategy;
use cllm_core::model::{ModelPreset, Transformer};
use cllm_core::prompt_set;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device, progress, settings};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use measure::Bench;

/// Settings of `cllm-eval bench`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct BenchSettings {
    /// Folder or id of the model; or set `shape`.
    #[garde(skip)]
    pub model: Option<String>,
    /// Random weights of a known shape instead of a model.
    #[garde(skip)]
    pub shape: Option<ModelPreset>,
    /// What the model is called in the results; without it, the last part of its folder or its shape.
    #[garde(skip)]
    pub name: Option<String>,
    /// A prompt set, for strategies, equality and collection. Without it these are left out: they say nothing about noise.
    #[garde(skip)]
    pub prompts: Option<PathBuf>,
    /// Prompts (the first) that every strategy answers at batch 1.
    #[garde(range(min = 1))]
    pub examples: usize,
    /// Strategies beside autoregressive decoding.
    #[garde(custom(crate::config::valid_strategies))]
    pub strategies: Vec<Strategy>,
    /// Tokens of the steps to time.
    #[garde(length(min = 1), inner(range(min = 1, max = 1024)))]
    pub steps: Vec<usize>,
    /// Tokens of the prompt before the timed steps, and of the timed prefill.
    #[garde(range(min = 1))]
    pub prompt_tokens: usize,
    /// Tokens that are decoded to time a step.
    #[garde(range(min = 2))]
    pub new_tokens: usize,
    /// Repetitions of each timing, after two that warm up; the median counts.
    #[garde(range(min = 1))]
    pub repeats: usize,
    /// Rows decoded at once, one token a row, for the throughput of batches.
    #[garde(inner(range(min = 1)))]
    pub batches: Vec<usize>,
    /// Rows of a collection over all prompts; 0 leaves it out.
    #[garde(skip)]
    pub collect_rows: usize,
    /// Tokens of a collection's block.
    #[garde(range(min = 2, max = 1024))]
    pub collect_n: usize,
    /// Most tokens of an answer to a prompt.
    #[garde(range(min = 1))]
    pub max_new_tokens: usize,
    /// What `scripts/bench-transformers` wrote, to stand beside.
    #[garde(skip)]
    pub baseline: Option<PathBuf>,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
    /// File of the results. Other models that it holds of the same machine are kept.
    #[garde(skip)]
    pub output: PathBuf,
}

impl Default for BenchSettings {
    fn default() -> Self {
        BenchSettings {
            model: None,
            shape: None,
            name: None,
            prompts: None,
            examples: 50,
            strategies: vec![Strategy::Jacobi { n: 16 }, Strategy::rolling(16), Strategy::rolling(32)],
            steps: vec![1, 2, 4, 8, 16, 32, 64],
            prompt_tokens: 200,
            new_tokens: 128,
            repeats: 5,
            batches: vec![8, 64, 256],
            collect_rows: 0,
            collect_n: 16,
            max_new_tokens: 256,
            baseline: None,
            device: "auto".to_owned(),
            output: PathBuf::from("runs/bench.json"),
        }
    }
}

/// The file that is written.
pub type DecodeBenchResults = BenchResults<ModelBench>;

impl BenchRecord for ModelBench {
    fn name(&self) -> &str {
        &self.name
    }
}

/// Figures of a model. Times are medians; a step is one forward with everything around it, the host's part included.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModelBench {
    /// Its name.
    pub name: String,
    /// Number of weights.
    pub parameters: i64,
    /// Tokens per second of autoregressive decoding at batch 1, without prefill.
    pub ar_tokens_per_second: f64,
    /// The same of `transformers`, from the baseline's file.
    pub transformers_ar_tokens_per_second: Option<f64>,
    /// Milliseconds of a step by its number of tokens, batch 1.
    pub step_ms: BTreeMap<usize, f64>,
    /// The same over a step of one token.
    pub step_over_one: BTreeMap<usize, f64>,
    /// Milliseconds of the prefill of `prompt_tokens` tokens, batch 1.
    pub prefill_ms: f64,
    /// Autoregressive tokens per second of all rows, by the number of rows.
    pub batch_tokens_per_second: BTreeMap<usize, f64>,
    /// What a step of one token must read, and how near it comes.
    pub floor: Floor,
    /// Bytes of GPU memory at most, while steps were timed.
    pub peak_memory_bytes: Option<u64>,
    /// Per strategy, on the prompts; the first is autoregressive.
    pub strategies: Vec<StrategyBench>,
    /// Response tokens per second of a collection over all prompts, trajectories recorded, without writing them.
    pub collect_tokens_per_second: Option<f64>,
    /// Its tokens per forward.
    pub collect_tokens_per_forward: Option<f64>,
    /// Its responses.
    pub collect_responses: Option<usize>,
    /// The resolved configuration.
    pub settings: BenchSettings,
}

/// The least that memory allows.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Floor {
    /// Weights, keys and values that a step of one token reads.
    pub bytes: u64,
    /// Bytes per second of a large copy on the device, read and written ones counted; measured in the same run.
    pub bandwidth: f64,
    /// Milliseconds that reading the bytes takes at that rate.
    pub ms: f64,
    /// The floor over the measured step.
    pub share: f64,
}

/// A strategy on the prompts at batch 1.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StrategyBench {
    /// Which.
    pub strategy: Strategy,
    /// Answers.
    pub examples: usize,
    /// Those that reached the length limit.
    pub unfinished: usize,
    /// Tokens over forwards.
    pub tokens_per_forward: f64,
    /// Tokens over seconds, without prefill.
    pub tokens_per_second: f64,
    /// Tokens per second over those of autoregressive decoding.
    pub speedup_vs_ar: f64,
    /// Share of answers equal to the autoregressive ones, token for token.
    pub exact_match_vs_ar: f64,
    /// Bytes of GPU memory at most.
    pub peak_memory_bytes: Option<u64>,
}

/// Measures a model and puts it into the file.
///
/// # Errors
/// Settings that do not fit together, missing files, a file of another machine.
pub fn bench(settings: &BenchSettings) -> Result<DecodeBenchResults> {
    let place = device::parse(&settings.device)?;
    let kind = device::default_kind(place);
    let others = libtorch::gpu_memory(place).map_or(0, |(current, _)| current);
    let (model, name, tokenizer) = match (&settings.model, settings.shape) {
        (Some(model), None) => {
            let folder = hub::locate(model)?;
            let name = folder.file_name().map_or(model.clone(), |name| name.to_string_lossy().into_owned());
            (checkpoint::load(&folder, place, kind)?, name, Some(Tokenizer::load(&folder)?))
        }
        (None, Some(shape)) => {
            (Transformer::random_on_device(shape.config(None)?, place, kind), shape.name().to_owned(), None)
        }
        _ => return Err(Error::usage("set either `model`, a folder or id, or `shape`: 135M, 1.7B or 7B")),
    };
    let mut results = DecodeBenchResults::open(&settings.output, place)?;
    let prompts = match (&settings.prompts, &tokenizer) {
        (Some(path), Some(tokenizer)) => Some((prompt_set::read(path)?, tokenizer)),
        (Some(_), None) => {
            return Err(Error::usage("prompts need a model with a tokenizer: leave `prompts` out, or set `model`"));
        }
        (None, _) => None,
    };
    let baseline = settings.baseline.as_deref().map(baseline).transpose()?;
    let bench = Bench { model: &model, settings, others };
    let mut found = bench.steps(settings.name.clone().unwrap_or(name))?;
    if let Some((samples, tokenizer)) = prompts {
        bench.prompts(&samples, tokenizer, &mut found)?;
    }
    found.transformers_ar_tokens_per_second = baseline;
    results.put(&settings.output, found)?;
    progress::log(format!("wrote {}", settings.output.display()));
    Ok(results)
}

/// The figures of a bench.
pub fn summary(results: &DecodeBenchResults) -> String {
    let mut text = format!("{}\n", results.hardware.summary());
    for model in &results.models {
        let baseline = model
            .transformers_ar_tokens_per_second
            .map_or_else(String::new, |other| format!(" (transformers: {other:.1})"));
        text += &format!(
            "\n{}: {:.1} tokens/s autoregressive{baseline}, {:.0} % of what the memory allows; prefill {:.2} ms\n",
            model.name,
            model.ar_tokens_per_second,
            100.0 * model.floor.share,
            model.prefill_ms
        );
        for (tokens, ms) in &model.step_ms {
            text += &format!("  a step of {tokens:>3}: {ms:8.3} ms, {:.2}x\n", model.step_over_one[tokens]);
        }
        for (rows, rate) in &model.batch_tokens_per_second {
            text += &format!("  {rows:>4} rows: {rate:.0} tokens/s\n");
        }
        for found in &model.strategies {
            text += &format!(
                "  {}: {:.2} tokens/forward, {:.1} tokens/s, {:.2}x, {:.1} % equal to AR\n",
                found.strategy.to_string(),
                found.tokens_per_forward,
                found.tokens_per_second,
                found.speedup_vs_ar,
                100.0 * found.exact_match_vs_ar
            );
        }
        if let Some(rate) = model.collect_tokens_per_second {
            text += &format!("  collection: {rate:.0} response tokens/s\n");
        }
    }
    text
}

fn baseline(path: &std::path::Path) -> Result<f64> {
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| Error::file(path, error.to_string()))?;
    value["ar_tokens_per_second"]
        .as_f64()
        .ok_or_else(|| Error::file(path, "has no `ar_tokens_per_second`: make it with scripts/bench-transformers"))
}

impl BenchSettings {
    /// The reference of the settings.
    pub fn reference() -> String {
        settings::reference::<BenchSettings>("cllm-eval bench")
    }
}
