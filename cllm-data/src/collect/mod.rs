//! `collect`: decodes prompts with a teacher and records every Jacobi state.

mod shard_buffer;
mod stats;

use std::path::PathBuf;
use std::sync::mpsc;
use std::time::Instant;

use cllm_core::checkpoint::hub;
use cllm_core::checkpoint::{self, fingerprint};
use cllm_core::decode::{Answer, DecodeOptions, Decoder, Request, StopConditions, Strategy, required_slots};
use cllm_core::distributed::ProcessEnv;
use cllm_core::model::Transformer;
use cllm_core::program::{Outcome, print_json};
use cllm_core::progress::Progress;
use cllm_core::prompt_set::{self, Sample};
use cllm_core::task::{ScoreContext, Task};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Provenance, Writer, rank_folder};
use cllm_core::{Error, Result, device, progress, settings};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::collect::shard_buffer::{Prepared, Shelf};
use crate::collect::stats::{Figures, Tally};

/// Answers that may wait to be scored and written before decoding waits for them.
const WAITING: usize = 4096;
/// Answers that are scored together where decoding and writing take turns.
const TOGETHER: usize = 64;

/// Settings of `collect`.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The teacher: a folder, or an id in the Hugging Face cache.
    #[garde(length(min = 1))]
    pub model: String,
    /// The prompt set.
    #[garde(custom(settings::required_path))]
    pub prompts: PathBuf,
    /// Folder of the data set.
    #[garde(custom(settings::required_path))]
    pub output: PathBuf,
    /// Folder of the benchmark's files, to score answers that need them: Spider's databases.
    #[garde(skip)]
    pub data: Option<PathBuf>,
    /// Tokens of a block.
    #[garde(range(min = 2, max = 1024))]
    pub n: usize,
    /// Most tokens of a response.
    #[garde(range(min = 1))]
    pub max_new_tokens: usize,
    /// Seed of the first guesses.
    #[garde(skip)]
    pub seed: u64,
    /// auto, cpu, cuda or cuda:N.
    #[garde(skip)]
    pub device: String,
    /// Responses decoded at once; what a run that is told to stop loses at most.
    #[garde(range(min = 1))]
    pub batch_size: usize,
    /// Responses of a shard.
    #[garde(range(min = 1))]
    pub rows_per_shard: usize,
    /// Use only the first N prompts.
    #[garde(range(min = 1))]
    pub limit: Option<usize>,
    /// Ids that end a response, in place of the model's own.
    #[garde(length(min = 1))]
    pub eos_ids: Option<Vec<i32>>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            model: String::new(),
            prompts: PathBuf::new(),
            output: PathBuf::new(),
            data: None,
            n: 16,
            max_new_tokens: 256,
            seed: 0,
            device: "auto".to_owned(),
            batch_size: 64,
            rows_per_shard: 1024,
            limit: None,
            eos_ids: None,
        }
    }
}

/// What a run of `collect` did; what `--json` prints.
#[derive(Serialize)]
pub struct Summary {
    /// Version of this document.
    schema_version: u32,
    /// Prompts that were asked for.
    wanted: usize,
    /// Those set aside because they and their answer do not fit the context.
    skipped: usize,
    /// Responses that earlier runs had left.
    resumed: usize,
    /// All that is in the data set.
    total: Figures,
    /// What this run added.
    run: RunFigures,
}

#[derive(Serialize)]
struct RunFigures {
    #[serde(flatten)]
    figures: Figures,
    /// Seconds of decoding and writing.
    seconds: f64,
    /// Tokens over seconds.
    tokens_per_second: f64,
}

/// Collects a data set and, with `json`, prints what that amounts to.
///
/// # Errors
/// As [`collect`].
pub fn run(settings: &Settings, json: bool) -> Result<Outcome> {
    let summary = collect(settings)?;
    if json {
        print_json(&summary)?;
    }
    Ok(Outcome::Done)
}

/// Collects a data set, or goes on with what is there of it.
///
/// # Errors
/// Bad models, prompts and folders; interruption after the last whole shard.
pub fn collect(settings: &Settings) -> Result<Summary> {
    let member = ProcessEnv::from_env(|name| std::env::var(name).ok())?;
    let place = device::for_process(&settings.device, member.as_ref())?;
    let folder = hub::locate(&settings.model)?;
    let tokenizer = Tokenizer::load(&folder)?.with_eos_ids(settings.eos_ids.as_deref());
    let model = checkpoint::load(&folder, place, device::default_kind(place))?;
    let vocab_size = model.config().vocab_size as usize;
    if let Some(id) = settings.eos_ids.iter().flatten().find(|&&id| id < 0 || id as usize >= vocab_size) {
        return Err(Error::usage(format!("eos_ids: {id} is no token of {}, which has {vocab_size}", settings.model)));
    }
    let mut samples = prompt_set::read(&settings.prompts)?;
    if samples.is_empty() {
        return Err(Error::file(&settings.prompts, "holds no prompts: make it anew with `cllm-data prepare`"));
    }
    samples.truncate(settings.limit.unwrap_or(usize::MAX));
    let judge = ScoreContext { data: settings.data.as_deref(), sandbox: None };
    let scorable = |sample: &Sample| Task::from_source(&sample.source).check_scorable(judge, sample);
    samples.iter().try_for_each(scorable)?;
    let all = samples.len();
    let mut output = settings.output.clone();
    if let Some(ProcessEnv { rank, world_size, .. }) = member {
        samples = samples.into_iter().skip(rank).step_by(world_size).collect();
        output.push(rank_folder(rank, world_size));
    }
    let (output, wanted) = (output.as_path(), samples.len());
    let data = settings.data.as_deref();
    let provenance = Provenance {
        teacher: fingerprint(&folder)?,
        tokenizer: tokenizer.fingerprint().to_owned(),
        vocab_size,
        n: settings.n,
        max_new_tokens: settings.max_new_tokens,
        eos_ids: tokenizer.eos_ids().to_vec(),
        seed: settings.seed,
        prompts: cllm_core::fingerprint::hash_contents(&settings.prompts)?,
        toolkit: cllm_core::VERSION.to_owned(),
        steps: vec![format!("collect: {all} prompts, shards of {}", settings.rows_per_shard)],
    };
    let writer = Writer::open(output, provenance)?;
    let (prepared, skipped) = fit(samples, &tokenizer, model.config().max_positions, settings.max_new_tokens)?;
    if !skipped.is_empty() {
        progress::log(format!("{} prompts are empty or too long for the context: see skipped.jsonl", skipped.len()));
        prompt_set::write(&output.join("skipped.jsonl"), &skipped)?;
    }
    // Of fewer prompts than processes some have none.
    if prepared.is_empty() && wanted > 0 {
        return Err(Error::usage(format!(
            "no prompt of {} fits the context: with max_new_tokens={} it may have at most {} tokens; lower max_new_tokens",
            settings.prompts.display(),
            settings.max_new_tokens,
            model.config().max_positions.saturating_sub(settings.max_new_tokens)
        )));
    }
    let (mut shelf, earlier) = Shelf::open(writer, &prepared, settings.rows_per_shard, &tokenizer, data)?;
    let mut bar = Progress::new("collect", shelf.rows() as u64, prepared.len() as u64);
    let started = Instant::now();
    let this_run = decode_open(&model, &tokenizer, &prepared, settings, &mut shelf, &mut bar);
    // What was answered is kept, whatever went wrong after it.
    let writer = shelf.close(this_run.is_ok())?;
    let this_run = this_run?;
    crate::rewrite::finish(writer, output)?;
    bar.finish();
    let seconds = started.elapsed().as_secs_f64();
    let mut total = earlier;
    total.add(this_run);
    let (total, figures) = (total.figures(), this_run.figures());
    progress::log(format!("{total}, in {}", output.display()));
    let tokens_per_second = figures.response_tokens as f64 / seconds;
    Ok(Summary {
        schema_version: 1,
        wanted,
        skipped: skipped.len(),
        resumed: earlier.rows(),
        total,
        run: RunFigures { figures, seconds, tokens_per_second },
    })
}

/// Renders the prompts and sets those aside that do not fit the context.
fn fit(
    samples: Vec<Sample>,
    tokenizer: &Tokenizer,
    max_positions: usize,
    max_new_tokens: usize,
) -> Result<(Vec<Prepared>, Vec<Sample>)> {
    let mut prepared = Vec::new();
    let mut skipped = Vec::new();
    for sample in samples {
        let (prompt, ids) = tokenizer.encode_prompt(&sample.prompt)?;
        if ids.is_empty() || ids.len().saturating_add(max_new_tokens) > max_positions {
            skipped.push(sample);
        } else {
            prepared.push(Prepared { sample, prompt, ids });
        }
    }
    Ok((prepared, skipped))
}

/// Decodes what the shelf lacks, in about the order of the prompts. On a GPU another thread scores and writes meanwhile.
fn decode_open(
    model: &Transformer,
    tokenizer: &Tokenizer,
    prepared: &[Prepared],
    settings: &Settings,
    shelf: &mut Shelf<'_>,
    bar: &mut Progress,
) -> Result<Tally> {
    let order = shelf.open_by_length();
    let Some(longest) = order.iter().map(|&index| prepared[index].ids.len()).max() else {
        return Ok(Tally::default());
    };
    let stop = StopConditions { max_new_tokens: settings.max_new_tokens, eos_ids: tokenizer.eos_ids().to_vec() };
    let strategy = Strategy::Jacobi { n: settings.n };
    let options = DecodeOptions { record_trajectory: true, ..DecodeOptions::greedy(strategy, settings.seed) };
    let rows = settings.batch_size.min(order.len());
    let mut decoder = Decoder::new(model, rows, required_slots(longest, &stop, strategy))?;
    let request = |&index: &usize| Request {
        sample_id: prepared[index].sample.id.clone(),
        prompt_ids: prepared[index].ids.clone(),
    };
    let mut tally = Tally::default();
    let mut put = |answers: Vec<(usize, Answer)>| -> Result<()> {
        let count = answers.len() as u64;
        tally.add(shelf.put(answers)?);
        bar.set_message(format!("{} tokens", tally.figures().response_tokens));
        bar.advance(count);
        Ok(())
    };
    let mut requests = order.iter().map(request);
    if model.device().is_cuda() {
        decode_beside(&mut decoder, &mut requests, &stop, options, &order, &mut put)?;
    } else {
        // On the CPU decoding wants every core: a thread beside it would only make it wait.
        let mut waiting = Vec::new();
        let decoded = decoder.stream(&mut requests, &stop, options, &mut |request, answer| {
            waiting.push((order[request], answer));
            if waiting.len() < TOGETHER.min(settings.rows_per_shard) {
                Ok(())
            } else {
                put(std::mem::take(&mut waiting))
            }
        });
        put(waiting)?;
        decoded?;
    }
    Ok(tally)
}

/// Decodes on this thread while another puts away the answers.
fn decode_beside(
    decoder: &mut Decoder<'_>,
    requests: &mut dyn Iterator<Item = Request>,
    stop: &StopConditions,
    options: DecodeOptions,
    order: &[usize],
    put: &mut (impl FnMut(Vec<(usize, Answer)>) -> Result<()> + Send),
) -> Result<()> {
    std::thread::scope(|scope| {
        let (sender, receiver) = mpsc::sync_channel::<(usize, Answer)>(WAITING);
        let writing = scope.spawn(move || -> Result<()> {
            while let Ok(first) = receiver.recv() {
                put(std::iter::once(first).chain(receiver.try_iter()).collect())?;
            }
            Ok(())
        });
        let decoded = decoder.stream(requests, stop, options, &mut |request, answer| {
            let gone = |_| Error::internal("the thread that writes has ended");
            sender.send((order[request], answer)).map_err(gone)
        });
        drop(sender);
        // Decoding fails too where writing did; the cause counts.
        writing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        decoded
    })
}
