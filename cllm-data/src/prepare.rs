//! `prepare`: converts a benchmark's files into a prompt set, or generates synthetic problems from
//! a seed.

use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use cllm_core::program::Outcome;
use cllm_core::progress::{self, count};
use cllm_core::prompt_set::Sample;
use cllm_core::task::{Task, synthetic};
use cllm_core::{Error, Result, interrupt, prompt_set};

use crate::variants::variants;

/// Synthetic problems are generated in memory.
const MAX_SYNTHETIC_PROBLEMS: u64 = 10_000_000;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The benchmark.
    #[arg(value_parser = PossibleValuesParser::new(Task::ALL.map(Task::name)).map(|name| Task::from_source(&name)))]
    task: Task,
    /// Folder of the benchmark's files (for jsonl: the file).
    #[arg(long)]
    data: Option<PathBuf>,
    /// The split [default: train, or test for benchmarks that have no other].
    #[arg(long)]
    split: Option<String>,
    /// The prompt set to write: Parquet if the name ends in .parquet, otherwise JSONL.
    #[arg(long, short)]
    output: PathBuf,
    /// Use only the first N prompts.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// Add N variants of each prompt, without answers, for a teacher to answer (gsm8k: other
    /// numbers; spider: the schemas of other databases).
    #[arg(long, value_name = "N", default_value_t = 0)]
    variants: usize,
    /// Seed of synthetic problems and of variants.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of synthetic problems.
    #[arg(
        long,
        value_name = "N",
        default_value_t = synthetic::DEFAULT_NUM_PROBLEMS,
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_SYNTHETIC_PROBLEMS)
    )]
    num_problems: usize,
}

/// Writes the prompt set.
///
/// # Errors
/// When a file of the benchmark is missing or broken, or the split has no prompts.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    let mut samples = load(arguments)?;
    samples.truncate(arguments.limit.unwrap_or(usize::MAX));
    if arguments.variants > 0 {
        samples.extend(variants(arguments.task, &samples, arguments.variants, arguments.seed)?);
    }
    interrupt::check()?;
    prompt_set::write(&arguments.output, &samples)?;
    progress::log(format!("{} in {}", count(samples.len(), "prompt"), arguments.output.display()));
    Ok(Outcome::Done)
}

fn load(arguments: &Arguments) -> Result<Vec<Sample>> {
    let task = arguments.task;
    let default_split = if task.has_only_test_split() { "test" } else { "train" };
    let split = arguments.split.as_deref().unwrap_or(default_split);
    if task == Task::Synthetic {
        return Ok(synthetic::generate(arguments.seed, split, arguments.num_problems));
    }
    let no_data = || Error::usage(format!("{} needs --data: {}", task.name(), task.expected_data()));
    let data = arguments.data.as_deref().ok_or_else(no_data)?;
    let samples = task.load(data, split)?;
    if samples.is_empty() {
        let message = format!("holds no prompts of the split `{split}` of {}: choose another split", task.name());
        return Err(Error::file(data, message));
    }
    Ok(samples)
}
