//! `prepare`: a benchmark's files, or problems made from a seed, as a prompt set.

use std::path::PathBuf;

use crate::variants::variants;
use clap::Args;
use clap::builder::{PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use cllm_core::program::Outcome;
use cllm_core::task::{Task, synthetic};
use cllm_core::{Error, Result, interrupt, progress, prompt_set};

/// Most synthetic problems: they are made in memory.
const MOST: u64 = 10_000_000;

/// Command line of `prepare`.
#[derive(Args)]
pub struct Arguments {
    /// The benchmark.
    #[arg(value_parser = PossibleValuesParser::new(Task::ALL.map(Task::name)).map(|name| Task::from_source(&name)))]
    task: Task,
    /// Its folder (for jsonl: the file).
    #[arg(long)]
    data: Option<PathBuf>,
    /// The split; without it train, or test of the benchmarks that have no other.
    #[arg(long)]
    split: Option<String>,
    /// The prompt set to write: Parquet where the name ends in .parquet, else JSONL.
    #[arg(long, short)]
    output: PathBuf,
    /// Only the first so many.
    #[arg(long)]
    limit: Option<usize>,
    /// So many variants of each prompt beside it, without answers: for a teacher to answer (gsm8k: other numbers; spider: other databases'
    /// schemas).
    #[arg(long, default_value_t = 0)]
    variants: usize,
    /// Seed of synthetic problems and of variants.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of synthetic problems.
    #[arg(long, default_value_t = synthetic::DEFAULT_NUM_PROBLEMS, value_parser = RangedU64ValueParser::<usize>::new().range(1..=MOST))]
    count: usize,
}

/// Writes the prompt set.
///
/// # Errors
/// Missing or broken files.
pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let task = arguments.task;
    let split = arguments.split.as_deref().unwrap_or(if task.has_only_test_split() { "test" } else { "train" });
    let mut samples = if task == Task::Synthetic {
        synthetic::generate(arguments.seed, split, arguments.count)
    } else {
        let needed = || Error::usage(format!("{} needs --data: {}", task.name(), task.expected_data()));
        let data = arguments.data.as_deref().ok_or_else(needed)?;
        let found = task.load(data, split)?;
        if found.is_empty() {
            let (data, name) = (data.display(), task.name());
            return Err(Error::usage(format!(
                "{data} holds no prompts of the split `{split}` of {name}: name another"
            )));
        }
        found
    };
    samples.truncate(arguments.limit.unwrap_or(usize::MAX));
    if arguments.variants > 0 {
        samples.extend(variants(task, &samples, arguments.variants, arguments.seed)?);
    }
    interrupt::check()?;
    prompt_set::write(&arguments.output, &samples)?;
    progress::log(format!("{} prompts in {}", samples.len(), arguments.output.display()));
    Ok(Outcome::Done)
}
