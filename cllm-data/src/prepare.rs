//! `prepare`: a benchmark's files, or problems made from a seed, as a prompt set.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use cllm_core::program::Outcome;
use cllm_core::task::{Task, synthetic};
use cllm_core::{Error, Result, progress, prompt_set};

/// Tasks by their names on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum TaskName {
    Gsm8k,
    Spider,
    Humaneval,
    Mbpp,
    Jsonl,
    Synthetic,
}

/// Command line of `prepare`.
#[derive(Args)]
pub struct Arguments {
    /// The benchmark.
    task: TaskName,
    /// Its folder (for jsonl: the file).
    #[arg(long)]
    data: Option<PathBuf>,
    /// The split.
    #[arg(long, default_value = "train")]
    split: String,
    /// The prompt set to write.
    #[arg(long, short)]
    output: PathBuf,
    /// Only the first so many.
    #[arg(long)]
    limit: Option<usize>,
    /// Seed of synthetic problems.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of synthetic problems.
    #[arg(long, default_value_t = synthetic::DEFAULT_COUNT)]
    count: usize,
}

/// Writes the prompt set.
///
/// # Errors
/// Missing or broken files.
pub fn run(arguments: &Arguments) -> Result<Outcome> {
    let task = match arguments.task {
        TaskName::Gsm8k => Task::Gsm8k,
        TaskName::Spider => Task::Spider,
        TaskName::Humaneval => Task::Humaneval,
        TaskName::Mbpp => Task::Mbpp,
        TaskName::Jsonl => Task::Jsonl,
        TaskName::Synthetic => Task::Synthetic,
    };
    let mut samples = if task == Task::Synthetic {
        synthetic::generate(arguments.seed, &arguments.split, arguments.count)
    } else {
        let needed = || Error::usage(format!("{} needs --data: {}", task.name(), task.needs()));
        task.load(arguments.data.as_deref().ok_or_else(needed)?, &arguments.split)?
    };
    samples.truncate(arguments.limit.unwrap_or(usize::MAX));
    prompt_set::write(&arguments.output, &samples)?;
    progress::say(format!("{} prompts in {}", samples.len(), arguments.output.display()));
    Ok(Outcome::Done)
}
