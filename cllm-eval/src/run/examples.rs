//! The examples of a run: prompts to answer or texts to read, and the benchmark that they belong
//! to.

use std::path::{Path, PathBuf};

use cllm_core::progress::count;
use cllm_core::prompt_set::{self, PromptSet, ReadOptions, Sample};
use cllm_core::task::{Task, synthetic};
use cllm_core::{Error, Result};

use crate::config::RunSettings;
use crate::mt_bench_turns;
use crate::score::{AnswerScorer, expect_spider};

pub(super) struct Examples {
    /// The benchmark, which decides how answers are scored.
    pub(super) task: Task,
    /// `mixed` if the prompts come from several splits.
    pub(super) split: String,
    pub(super) samples: Vec<Sample>,
    /// Number of rows of the prompt set that could not be read.
    pub(super) num_set_aside: usize,
}

impl Examples {
    /// Loads the prompts of a file or of a benchmark's own files, or generates synthetic ones.
    ///
    /// # Errors
    /// When files are missing, no example is left, or prompts of several benchmarks are mixed.
    pub(super) fn load(settings: &RunSettings) -> Result<Self> {
        let (task, split) =
            (settings.benchmark.unwrap_or(Task::Synthetic), settings.split.as_deref().unwrap_or("test"));
        let file = prompt_file(settings);
        let file = file.as_deref();
        let PromptSet { mut samples, num_set_aside } = match file {
            Some(path) => prompt_set::read_with(path, &ReadOptions::default())?,
            None => PromptSet { samples: load_benchmark(settings, task, split)?, num_set_aside: 0 },
        };
        prompt_set::apply_limit(&mut samples, settings.limit, "limit");
        let (task, split) = match (file, samples.first()) {
            (Some(path), _) => infer_from_sources(path, settings, &samples)?,
            (None, Some(_)) => (task, split.to_owned()),
            (None, None) => {
                let problem = format!("split `{split}` of {} has no examples", task.name());
                return Err(settings.in_prompts(Error::usage(problem)));
            }
        };
        if let Some(scorer) = settings.scorer {
            if task != Task::Jsonl {
                let name = task.name();
                return Err(Error::usage(format!("`scorer` is for jsonl only; {name} has its own: leave it out")));
            }
            samples.iter_mut().for_each(|sample| scorer.set_default(sample));
        }
        if settings.keep_distinct {
            expect_spider(task, "keep_distinct")?;
        }
        if task == Task::MtBench {
            samples = mt_bench_turns::both_turns(samples).map_err(|error| settings.in_prompts(error))?;
        }
        if let Some(system) = &settings.system {
            prompt_set::insert_system_message(&mut samples, system);
        }
        if task != Task::Perplexity {
            expect_full_batches(settings, samples.len())?;
        }
        Ok(Examples { task, split, samples, num_set_aside })
    }

    /// Refuses prompts whose answers could not be scored.
    ///
    /// # Errors
    /// As [`AnswerScorer::check`].
    pub(super) fn expect_scorable(&self, settings: &RunSettings, scorer: AnswerScorer<'_>) -> Result<()> {
        self.samples.iter().try_for_each(|sample| scorer.check(sample)).map_err(|error| settings.in_prompts(error))
    }
}

/// The prompt set to answer, if there is one. The data of the benchmark `jsonl` is a prompt set
/// too.
fn prompt_file(settings: &RunSettings) -> Option<PathBuf> {
    let jsonl = || settings.data.as_deref().filter(|_| settings.benchmark == Some(Task::Jsonl));
    settings.prompts.clone().or_else(|| jsonl().map(|data| Task::Jsonl.locate(data)))
}

fn load_benchmark(settings: &RunSettings, task: Task, split: &str) -> Result<Vec<Sample>> {
    match (task, &settings.data) {
        (Task::Synthetic, _) => synthetic::load(settings.seed, split, settings.num_problems),
        (_, Some(data)) => task.load(data, split),
        (_, None) => Err(Error::usage(format!("{} needs `data`: {}", task.name(), task.expected_data()))),
    }
}

/// Finds benchmark and split of a file's prompts from their sources. These must agree with each
/// other and with the settings, because scoring an answer by another task means nothing.
fn infer_from_sources(path: &Path, settings: &RunSettings, samples: &[Sample]) -> Result<(Task, String)> {
    let first = samples.first().map_or("", |sample| &sample.source);
    let task = settings.benchmark.unwrap_or(Task::from_source(first));
    let split = settings.split.as_deref().unwrap_or(split_of(first));
    let mut is_mixed = false;
    for sample in samples {
        let refuse = |contradiction: &str, advice: &str| {
            let Sample { id, source, .. } = sample;
            Err(Error::file(path, format!("prompt `{id}`: its source is `{source}`, {contradiction}: {advice}")))
        };
        if Task::from_source(&sample.source) != task {
            let contradiction = match settings.benchmark {
                Some(_) => format!("but `benchmark` is {}", task.name()),
                None => format!("but the first prompt is of {}", task.name()),
            };
            let advice = match Task::from_name(&sample.source) {
                Some(named) if named == task => "a source names a benchmark with a split, such as gsm8k/test",
                _ => "one run evaluates one benchmark; keep each in a file of its own",
            };
            return refuse(&contradiction, advice);
        }
        if split_of(&sample.source) != split {
            if settings.split.is_some() {
                return refuse(&format!("but `split` is {split}"), "leave `split` out, or these prompts");
            }
            is_mixed = true;
        }
    }
    Ok((task, if is_mixed { "mixed" } else { split }.to_owned()))
}

/// Refuses more rows than there are examples to time: the batch would never be full.
fn expect_full_batches(settings: &RunSettings, num_examples: usize) -> Result<()> {
    let num_timed = settings.num_speed_examples.min(num_examples);
    let Some(rows) = settings.concurrency.iter().find(|&&rows| rows > num_timed) else { return Ok(()) };
    let advice = match num_timed < num_examples {
        true => {
            format!("raise num_speed_examples (there are {}), or lower concurrency", count(num_examples, "example"))
        }
        false => "lower concurrency, or answer more examples".to_owned(),
    };
    let timed = count(num_timed, "example");
    Err(Error::usage(format!("concurrency={rows}: only {timed} would be timed, which leave rows empty: {advice}")))
}

/// The split in a source such as `gsm8k/test`; a source without one is its own split.
fn split_of(source: &str) -> &str {
    source.split_once('/').map_or(source, |(_, split)| split)
}
