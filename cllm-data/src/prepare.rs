//! `prepare`: converts a benchmark's files, or those of a user in any known form, into a prompt set,
//! or generates synthetic problems from a seed.

use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::{PossibleValuesParser, RangedU64ValueParser, TypedValueParser};
use cllm_core::program::Outcome;
use cllm_core::progress::{self, count};
use cllm_core::prompt_set::{FieldMap, ReadOptions, Sample, Turns};
use cllm_core::task::{Task, synthetic};
use cllm_core::{Error, Result, interrupt, prompt_set};

use crate::variants::variants;

/// Synthetic problems and variants are generated in memory.
const MAX_IN_MEMORY: usize = 10_000_000;

#[derive(Args)]
pub(crate) struct Arguments {
    /// The benchmark; jsonl reads your own files (JSON Lines, JSON or Parquet).
    #[arg(value_parser = PossibleValuesParser::new(Task::ALL.map(Task::name)).try_map(|name| Task::from_name(&name).ok_or("no task")))]
    task: Task,
    /// Folder of the benchmark's files (for jsonl: the file).
    #[arg(long)]
    data: Option<PathBuf>,
    /// The split [default: train, or test for benchmarks that have no other].
    #[arg(long)]
    split: Option<String>,
    /// The prompt set to write: Parquet if the name ends in .parquet, otherwise JSONL. Replaces a
    /// file of this name.
    #[arg(long, short)]
    output: PathBuf,
    /// Use only the first N prompts.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// System message to put before each conversation that has none.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// For jsonl: which fields hold the prompt and the reference, if their names are unknown.
    /// question=FIELD is a prompt for the chat template, prompt=FIELD text that is continued as it
    /// is; messages, id and source can be named too.
    #[arg(long, value_name = "prompt=FIELD,reference=FIELD")]
    map: Option<FieldMap>,
    /// For jsonl: the turns of a conversation that become prompts; all of them have the ids ID#1,
    /// ID#2 [default: last].
    #[arg(long)]
    turns: Option<Turns>,
    /// For jsonl: fail at the first row that cannot be read, instead of setting it aside.
    #[arg(long)]
    strict: bool,
    /// Add N variants of each prompt, without answers, for a teacher to answer (gsm8k: other
    /// numbers; spider: the schemas of other databases; codesearchnet: up to 2, in other words).
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
        value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_IN_MEMORY as u64)
    )]
    num_problems: usize,
}

impl Arguments {
    fn read_options(&self) -> ReadOptions {
        ReadOptions {
            fields: self.map.clone().unwrap_or_default(),
            turns: self.turns.unwrap_or_default(),
            strict: self.strict,
        }
    }
}

/// Writes the prompt set.
///
/// # Errors
/// When a file of the benchmark is missing or broken, or the split has no prompts.
pub(crate) fn run(arguments: &Arguments) -> Result<Outcome> {
    expect_other_output(arguments)?;
    let mut samples = load(arguments)?;
    prompt_set::apply_limit(&mut samples, arguments.limit, "--limit");
    if arguments.variants > 0 {
        if samples.len().saturating_mul(arguments.variants) > MAX_IN_MEMORY {
            let message = format!(
                "--variants {} would make more than {MAX_IN_MEMORY} prompts of {}: lower it, or --limit",
                arguments.variants,
                samples.len()
            );
            return Err(Error::usage(message));
        }
        samples.extend(variants(arguments.task, &samples, arguments.variants, arguments.seed)?);
    }
    if let Some(system) = &arguments.system {
        prompt_set::insert_system_message(&mut samples, system);
    }
    interrupt::check()?;
    prompt_set::write(&arguments.output, &samples)?;
    let num_answered = samples.iter().filter(|sample| sample.reference.is_some()).count();
    let prompts = count(samples.len(), "prompt");
    progress::log(format!("{prompts} in {}, {num_answered} with a reference", arguments.output.display()));
    Ok(Outcome::Done)
}

/// Refuses to write over the file that is read.
fn expect_other_output(arguments: &Arguments) -> Result<()> {
    let Some(Ok(data)) = arguments.data.as_deref().map(Path::canonicalize) else { return Ok(()) };
    if data.is_file() && arguments.output.canonicalize().is_ok_and(|output| output == data) {
        let message = format!("--output {} is the file that is read: name another", arguments.output.display());
        return Err(Error::usage(message));
    }
    Ok(())
}

fn load(arguments: &Arguments) -> Result<Vec<Sample>> {
    let task = arguments.task;
    if task != Task::Jsonl && (arguments.map.is_some() || arguments.turns.is_some() || arguments.strict) {
        let message =
            format!("--map, --turns and --strict are for jsonl; {} has one form: leave them out", task.name());
        return Err(Error::usage(message));
    }
    let default_split = if task.has_only_test_split() { "test" } else { "train" };
    let split = arguments.split.as_deref().unwrap_or(default_split);
    if task == Task::Synthetic {
        return synthetic::load(arguments.seed, split, arguments.num_problems);
    }
    let no_data = || Error::usage(format!("{} needs --data: {}", task.name(), task.expected_data()));
    let data = arguments.data.as_deref().ok_or_else(no_data)?;
    if task == Task::Jsonl {
        return prompt_set::read_with(&task.locate(data), &arguments.read_options()).map(|set| set.samples);
    }
    task.load(data, split)
}
