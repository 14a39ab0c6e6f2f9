//! `collect`: decodes prompts with a teacher and records every Jacobi state.
//!
//! Rows are written in the order of the prompts, whatever the batching, and all randomness is drawn
//! from (seed, sample, block). So in float32 on the CPU the same seed gives the same files, even
//! after an interruption.

mod decoding;
mod prompts;
mod settings;
mod shard_buffer;
mod stats;
mod teacher;

use std::path::PathBuf;
use std::time::Instant;

use cllm_core::chat_template::{Date, today};
use cllm_core::checkpoint::{self, hub};
use cllm_core::cuda::libtorch;
use cllm_core::distributed::ProcessEnv;
use cllm_core::model::Transformer;
use cllm_core::progress::Progress;
use cllm_core::prompt_set::PromptSet;
use cllm_core::trajectory::{self, Provenance, Writer, rank_folder};
use cllm_core::{Result, device, fingerprint, output_folder, progress};
use serde::Serialize;

use crate::dataset_card::finish_with_card;
use crate::scoring::Scorer;
use prompts::RenderedPrompt;
use shard_buffer::ShardBuffer;
use stats::Counts;
use teacher::Teacher;

pub use settings::Settings;
pub use stats::ResponseStats;

/// The result of `collect`, which `--json` prints.
#[derive(Serialize)]
pub struct Summary {
    schema_version: u32,
    /// Number of prompts to answer.
    prompts: usize,
    #[serde(flatten)]
    left_out: LeftOut,
    /// Responses of earlier runs.
    resumed: usize,
    /// All responses in the data set.
    pub total: ResponseStats,
    /// Responses of this run.
    run: RunStats,
}

/// What has no response.
#[derive(Serialize)]
struct LeftOut {
    /// Number of rows of the prompt set that could not be read.
    set_aside: usize,
    /// Number of prompts that were empty or too long for the context.
    skipped: usize,
}

#[derive(Serialize)]
struct RunStats {
    #[serde(flatten)]
    responses: ResponseStats,
    /// Seconds of decoding and writing.
    seconds: f64,
    /// Null if the data set was complete already.
    tokens_per_second: Option<f64>,
    /// The most GPU memory that tensors used at a time; null on the CPU.
    peak_memory_bytes: Option<u64>,
}

/// Collects a data set, or resumes where an earlier run stopped.
///
/// # Errors
/// Bad models, prompts and folders. An interrupted run keeps the answers that have finished.
pub fn collect(settings: &Settings) -> Result<Summary> {
    collect_on(settings, today())
}

/// As [`collect`], started on this date. A collection that is resumed keeps the date on which it
/// was started.
///
/// # Errors
/// As [`collect`].
pub fn collect_on(settings: &Settings, today: Date) -> Result<Summary> {
    let process = ProcessEnv::from_env(|name| std::env::var(name).ok())?;
    trajectory::check_world_size(&settings.output, process.as_ref().map_or(1, |process| process.world_size))?;
    let output = output_of_process(settings, process.as_ref());
    let _lock = output_folder::lock(&output)?;
    let started_on = trajectory::stored_date(&settings.output)?;
    let rendering = settings.rendering.resolve(started_on.unwrap_or(today))?;
    let device = device::for_process(&settings.device, process.as_ref())?;
    let teacher = Teacher::find(settings, &rendering)?;
    let PromptSet { samples, num_set_aside } = prompts::read(settings)?;
    let provenance = provenance(settings, &teacher, samples.len())?;
    let (samples, others) = prompts::divide(samples, process.as_ref());
    let num_samples = samples.len();

    let writer = Writer::open(&output, provenance)?;
    let (prompts, skipped) = prompts::render(samples, &teacher, settings)?;
    let scorer = Scorer {
        data_set: &output,
        tokenizer: &teacher.tokenizer,
        data: settings.data.as_deref(),
        thought_tokens: teacher.thought_tokens.as_ref(),
    };
    let (resumed, decoded, seconds) = if writer.manifest().complete {
        (Counts::from_shards(&writer, scorer)?, Counts::default(), 0.0)
    } else {
        prompts::save_skipped(&skipped, &output)?;
        if prompts.is_empty() {
            prompts::expect_answerable(&others, &teacher, settings)?;
        }
        let model = checkpoint::load(&teacher.folder, device, device::default_kind(device))?;
        let (buffer, resumed) = ShardBuffer::open(writer, &prompts, settings.rows_per_shard, scorer)?;
        let (decoded, seconds) = collect_missing(settings, &teacher, &model, &prompts, buffer)?;
        (resumed, decoded, seconds)
    };

    let left_out = LeftOut { set_aside: num_set_aside, skipped: skipped.len() };
    let run = RunStats {
        responses: decoded.stats(),
        seconds,
        tokens_per_second: (seconds > 0.0).then(|| decoded.num_decoded_tokens() as f64 / seconds),
        peak_memory_bytes: libtorch::gpu_memory(device).map(|(_, peak)| peak),
    };
    let summary = summarize(num_samples, left_out, resumed, decoded, run);
    let (total, output) = (&summary.total, output.display());
    let already = if decoded.num_rows() == 0 { "already complete: " } else { "" };
    progress::log(format!("{already}{total}, in {output}"));
    Ok(summary)
}

/// Collects the responses that are missing, and completes the data set. Returns their counts and the
/// seconds of decoding and writing.
fn collect_missing(
    settings: &Settings,
    teacher: &Teacher,
    model: &Transformer,
    prompts: &[RenderedPrompt],
    mut buffer: ShardBuffer<'_>,
) -> Result<(Counts, f64)> {
    let mut progress = Progress::new("collect", buffer.num_rows() as u64, prompts.len() as u64);
    let started = Instant::now();
    libtorch::reset_peak_gpu_memory(model.device());
    let decoded = decoding::decode_missing(teacher, model, prompts, settings, &mut buffer, &mut progress);
    // Finished answers are kept, whatever failed after them.
    let writer = buffer.close(decoded.is_ok())?;
    let decoded = decoded?;
    finish_with_card(writer)?;
    let seconds = started.elapsed().as_secs_f64();
    if decoded.num_rows() > 0 {
        progress.finish();
    }
    Ok((decoded, seconds))
}

/// Folder in which this process collects: that of the data set, or a folder in it.
fn output_of_process(settings: &Settings, process: Option<&ProcessEnv>) -> PathBuf {
    match process {
        Some(process) => settings.output.join(rank_folder(process.rank, process.world_size)),
        None => settings.output.clone(),
    }
}

fn provenance(settings: &Settings, teacher: &Teacher, num_prompts: usize) -> Result<Provenance> {
    Ok(Provenance {
        teacher: checkpoint::fingerprint(&teacher.folder)?,
        teacher_name: Some(hub::name(&teacher.folder)),
        teacher_base: hub::fine_tuned_from(&teacher.folder),
        tokenizer: teacher.tokenizer.fingerprint().to_owned(),
        vocab_size: teacher.vocab_size(),
        n: settings.n,
        max_new_tokens: settings.max_new_tokens,
        thought_closing: teacher.thought_limit.as_ref().map(|limit| limit.closing.clone()),
        eos_ids: teacher.tokenizer.eos_ids().to_vec(),
        seed: settings.seed,
        prompts: fingerprint::hash_contents(&settings.prompts)?,
        rendering: teacher.tokenizer.rendering_record(),
        toolkit: cllm_core::VERSION.to_owned(),
        steps: vec![format!("collect: {num_prompts} prompts, shards of {}", settings.rows_per_shard)],
    })
}

fn summarize(prompts: usize, left_out: LeftOut, resumed: Counts, decoded: Counts, run: RunStats) -> Summary {
    let mut total = resumed;
    total += decoded;
    Summary { schema_version: 1, prompts, left_out, resumed: resumed.num_rows(), total: total.stats(), run }
}
