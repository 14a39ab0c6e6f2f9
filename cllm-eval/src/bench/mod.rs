//! `bench`: how fast a model decodes, and how close its steps come to what the memory bandwidth
//! allows.
//!
//! Steps, prefill and batches are timed on synthetic prompts, because their time does not depend on
//! the tokens. Strategies need real prompts, because their gain does. So does the gain of a
//! collection, but not the fraction of the device's limits that it reaches.

mod measure;
mod record;
mod settings;

use std::path::Path;

use cllm_core::chat_template::today;
use cllm_core::checkpoint::{self, hub};
use cllm_core::cuda::libtorch;
use cllm_core::model::{LoraTarget, Transformer};
use cllm_core::prompt_set::{self, Sample};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::{Error, Result, device, progress, text_file};
use tch::Device;

use measure::Bench;
pub use record::{DecodeBench, DecodeBenchResults, GatedBench};
pub use settings::BenchSettings;

/// Measures a model and adds it to the output file.
///
/// # Errors
/// When settings contradict each other, a file is missing, or the output contains results of
/// another machine.
pub fn bench(settings: &BenchSettings) -> Result<DecodeBenchResults> {
    let mut settings = settings.clone();
    settings.rendering.date.get_or_insert_with(today);
    let settings = &settings;
    settings.check_gated_windows()?;
    let device = device::parse(&settings.device)?;
    let other_memory_bytes = libtorch::gpu_memory(device).map_or(0, |(current, _)| current);
    let (model, name, tokenizer) = load_model(settings, device)?;
    let mut results = DecodeBenchResults::open(&settings.output, device)?;
    let prompts = load_prompts(settings, tokenizer)?;
    let baseline = settings.baseline.as_deref().map(read_baseline).transpose()?;
    let bench = Bench { model: &model, settings, other_memory_bytes };
    let mut record = bench.measure_steps(settings.name.clone().unwrap_or(name))?;
    record.transformers_ar_tokens_per_second = baseline.as_ref().map(|baseline| baseline.ar_tokens_per_second);
    record.transformers_compiled_ar_tokens_per_second =
        baseline.and_then(|baseline| baseline.compiled_ar_tokens_per_second);
    bench.measure_prompts(prompts, &mut record)?;
    results.put(&settings.output, record)?;
    progress::log(format!("wrote {}", settings.output.display()));
    Ok(results)
}

/// The model with its name, and its tokenizer unless it is a shape.
fn load_model(settings: &BenchSettings, device: Device) -> Result<(Transformer, String, Option<Tokenizer>)> {
    let dtype = device::default_kind(device);
    match (&settings.model, settings.shape) {
        (Some(model), None) => {
            let folder = hub::locate(model)?;
            if settings.gated.is_some() {
                refuse_adapters(&folder)?;
            }
            let rendering = settings.rendering.resolve(today())?;
            let name = folder.file_name().map_or(model.clone(), |name| name.to_string_lossy().into_owned());
            Ok((checkpoint::load(&folder, device, dtype)?, name, Some(Tokenizer::load_for(&folder, &rendering)?)))
        }
        (None, Some(shape)) => {
            let model = Transformer::random_on_device(shape.config(None)?, device, dtype);
            Ok((model, shape.to_string(), None))
        }
        _ => Err(Error::usage("set either `model` (a folder or id) or `shape` (such as qwen3-8b)")),
    }
}

/// Adapters beside the random ones of `gated` would be in memory while these are measured, and while
/// steps without any are.
fn refuse_adapters(folder: &Path) -> Result<()> {
    if !checkpoint::adapts_drafts(folder)? {
        return Ok(());
    }
    let base = checkpoint::base_folder(folder)?;
    let message = format!(
        "has adapters for draft tokens, and `gated` measures random ones: set model={}, or leave `gated` out",
        base.display()
    );
    Err(Error::file(folder, message))
}

fn load_prompts(settings: &BenchSettings, tokenizer: Option<Tokenizer>) -> Result<Option<(Vec<Sample>, Tokenizer)>> {
    match (&settings.prompts, tokenizer) {
        (Some(path), Some(tokenizer)) => Ok(Some((prompt_set::read(path)?, tokenizer))),
        (Some(_), None) => {
            Err(Error::usage("a shape has no tokenizer for `prompts`: leave `prompts` out, or set `model` instead"))
        }
        (None, _) => Ok(None),
    }
}

/// What is read of the output of scripts/bench-transformers.
struct Baseline {
    ar_tokens_per_second: f64,
    /// `None` if compiling failed.
    compiled_ar_tokens_per_second: Option<f64>,
}

fn read_baseline(path: &Path) -> Result<Baseline> {
    let value: serde_json::Value = text_file::read_json(path)?;
    let refuse = |problem: &str| Error::file(path, format!("{problem}: create it with scripts/bench-transformers"));
    if let Some(engine) = value["engine"].as_str().filter(|&engine| engine != "transformers") {
        return Err(refuse(&format!("is a measurement of {engine}, not of transformers")));
    }
    Ok(Baseline {
        ar_tokens_per_second: value["ar_tokens_per_second"]
            .as_f64()
            .ok_or_else(|| refuse("has no `ar_tokens_per_second`"))?,
        compiled_ar_tokens_per_second: value["compiled_ar_tokens_per_second"].as_f64(),
    })
}

/// The results as the terminal shows them.
pub fn summary(results: &DecodeBenchResults) -> String {
    let models = results.models.iter().map(model_summary).collect::<Vec<_>>().join("\n");
    format!("{}\n\n{models}", results.hardware.summary())
}

fn model_summary(model: &DecodeBench) -> String {
    let compiled = model.transformers_compiled_ar_tokens_per_second;
    let compiled = compiled.map_or_else(String::new, |speed| format!(", compiled {speed:.1}"));
    let transformers = model.transformers_ar_tokens_per_second;
    let mut text = format!(
        "{}: {:.1} tokens/s autoregressive{}, {:.0} % of what the memory bandwidth allows; prefill {:.2} ms\n",
        model.name,
        model.ar_tokens_per_second,
        transformers.map_or_else(String::new, |speed| format!(" (transformers: {speed:.1}{compiled})")),
        100.0 * model.memory_floor.fraction_of_step,
        model.prefill_ms
    );
    for (num_tokens, ms) in &model.step_ms {
        let (plural, relative) = (if *num_tokens == 1 { "" } else { "s" }, model.relative_step_time[num_tokens]);
        let share = |attention_ms: &f64| format!(", attention {:.0} %", 100.0 * attention_ms / ms);
        let attention = model.attention_ms.get(num_tokens).map_or_else(String::new, share);
        text += &format!("  step of {num_tokens:>3} token{plural}: {ms:8.3} ms, {relative:.2}x{attention}\n");
    }
    if let Some(gated) = &model.gated {
        for (n, ms) in &gated.gated_step_ms {
            let relative = gated.relative_step_time[n];
            text += &format!("  gated step, n={n:>3}, {}: {ms:8.3} ms, {relative:.2}x\n", adapters_of(gated));
        }
        if let Some(ratio) = gated.memory_over_ar {
            text += &format!("  memory of gated decoding over autoregressive: {ratio:.3}x\n");
        }
    }
    for (batch_size, speed) in &model.batch_tokens_per_second {
        text += &format!("  batch of {batch_size:>4}: {speed:.0} tokens/s\n");
        for (num_tokens, ms) in model.batch_step_ms.get(batch_size).into_iter().flatten() {
            text += &format!("    {num_tokens:>4} tokens of each row in a step: {ms:8.3} ms\n");
        }
    }
    for result in &model.strategies {
        text += &format!(
            "  {}: {:.2} tokens per forward, {:.1} tokens/s, {:.2}x, {:.1} % of answers same as AR\n",
            result.strategy,
            result.tokens_per_forward,
            result.tokens_per_second,
            result.speedup_vs_ar,
            100.0 * result.exact_match_vs_ar
        );
    }
    for collection in &model.collections {
        let limit = |fraction: Option<f64>, what: &str| {
            fraction.map_or_else(String::new, |fraction| format!(", {:.0} % of {what}", 100.0 * fraction))
        };
        text += &format!(
            "  collection, {} rows, n={}: {:.0} response tokens/s, {:.2} tokens per forward{}{}\n",
            collection.batch_size,
            collection.n,
            collection.tokens_per_second,
            collection.tokens_per_forward,
            limit(collection.fraction_of_bandwidth, "what the memory bandwidth allows"),
            limit(collection.fraction_of_peak_flops, "the peak of the arithmetic"),
        );
    }
    text
}

/// The adapters of a measurement, in words.
fn adapters_of(gated: &GatedBench) -> String {
    let mut text = format!("rank {}", gated.rank);
    if gated.first_layer > 0 {
        text += &format!(" from layer {}", gated.first_layer);
    }
    if gated.targets.len() < LoraTarget::ALL.len() {
        text += &format!(" on {} of {} projections", gated.targets.len(), LoraTarget::ALL.len());
    }
    text
}
