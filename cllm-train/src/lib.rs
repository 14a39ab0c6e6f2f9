//! Trains teachers (supervised) and students (consistency).

mod bench;
mod checkpoint;
pub mod data;
mod ema;
mod export;
pub mod gguf;
pub mod loss;
mod memory;
mod metrics;
pub mod optimizer;
mod plan;
pub mod rounds;
pub mod settings;
mod step;
pub mod tensorboard;
pub mod tokenizer_training;
pub mod trainer;
mod validation;

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{CommandFactory, Parser, Subcommand};
use cllm_core::program::{Outcome, SettingsArgs, print, print_completions, print_json};
use cllm_core::settings::reference;
use cllm_core::{Error, Result, progress, prompt_set, text_file};

use serde_json::json;
use settings::Settings;

/// Most ids of a tokenizer: training sets aside room for all.
const MOST_IDS: u64 = 10_000_000;

/// Trains teachers and consistency models.
#[derive(Parser)]
#[command(
    name = "cllm-train",
    version,
    about,
    after_help = "Example:
  cllm-train run -c configs/quickstart-student.yaml 'datasets=[runs/clean]' output=runs/student"
)]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
    /// No progress on stderr.
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Verb {
    /// Train; the same command again goes on where it was stopped.
    #[command(
        after_help = "Example:\n  cllm-train run -c configs/quickstart-student.yaml 'datasets=[runs/clean]' output=runs/student"
    )]
    Run(SettingsArgs),
    /// Show parameters, memory, steps, tokens and about how long it takes, before anything is written.
    #[command(after_help = "Example:\n  cllm-train plan -c configs/quickstart-student.yaml 'datasets=[runs/clean]'")]
    Plan {
        #[command(flatten)]
        given: SettingsArgs,
        /// Time no steps: nothing is loaded, and no duration is estimated.
        #[arg(long)]
        no_timing: bool,
    },
    /// Time some steps of a run: tokens and blocks a second, share of the device's peak, memory against the plan.
    #[command(
        after_help = "Example:\n  cllm-train bench -c configs/quickstart-student.yaml 'datasets=[runs/clean]' --steps 5"
    )]
    Bench(bench::Arguments),
    /// Collect, augment, clean and train, round by round, each from the student of the round before; the same command again goes
    /// on where it was stopped.
    #[command(after_help = "Example:\n  cllm-train rounds -c configs/rounds.yaml output=runs/rounds")]
    Rounds(SettingsArgs),
    /// Check a settings file and print the settings in full.
    #[command(after_help = "Example:\n  cllm-train validate -c configs/quickstart-student.yaml")]
    Validate(SettingsArgs),
    /// Train a small tokenizer on the prompts and references of a prompt set, for a model made from nothing.
    #[command(
        after_help = "Example:\n  cllm-train tokenizer runs/prompts.jsonl --vocab-size 512 --output runs/tokenizer"
    )]
    Tokenizer {
        /// The prompt set.
        prompts: PathBuf,
        /// Most ids.
        #[arg(long, default_value_t = 512, value_parser = RangedU64ValueParser::<usize>::new().range(1..=MOST_IDS))]
        vocab_size: usize,
        /// Folder of the tokenizer's files.
        #[arg(long, short)]
        output: PathBuf,
    },
    /// Write a checkpoint as a model folder with weights of another type; an adapter is merged into its model.
    #[command(
        after_help = "Example:\n  cllm-train export runs/student/checkpoints/latest --dtype bf16 --output runs/student-bf16"
    )]
    Export(export::Arguments),
    /// Write the model of a GGUF file as a Hugging Face folder: bf16 weights, config and tokenizer.
    #[command(
        after_help = "Example:\n  cllm-train convert SmolLM2-135M-Instruct.Q4_1.gguf models/SmolLM2-135M-Instruct"
    )]
    Convert {
        /// The file: architecture llama or qwen2.
        gguf: PathBuf,
        /// Folder to write; must not exist yet.
        folder: PathBuf,
    },
    /// Print every setting of every verb as Markdown: type, default, what is allowed, what it does.
    #[command(after_help = "Example:\n  cllm-train settings")]
    Settings,
    /// Print the completions of a shell.
    #[command(after_help = "Example:\n  cllm-train completions bash > cllm-train.bash")]
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// Runs the program.
///
/// # Errors
/// What the verb meets.
pub fn run(arguments: Arguments) -> Result<Outcome> {
    progress::set_quiet(arguments.quiet);
    match arguments.verb {
        Verb::Run(given) => {
            let settings = load(&given)?;
            let summary = settings.output.join("summary.json");
            trainer::run(settings)?;
            if given.json {
                print(&text_file::read(&summary)?)?;
            }
        }
        Verb::Bench(arguments) => bench::run(&arguments, &load(&arguments.given)?)?,
        Verb::Rounds(given) => {
            let report = rounds::run(&load_rounds(&given)?)?;
            if given.json {
                print(&text_file::read(&report)?)?;
            }
        }
        Verb::Plan { given, no_timing } => plan::run(&load(&given)?, !no_timing, given.json)?,
        Verb::Validate(given) => {
            let settings = load(&given)?;
            if given.json {
                print_json(&json!({ "schema_version": 1, "settings": settings }))?;
            } else {
                print(&cllm_core::settings::to_yaml(&settings)?)?;
            }
        }
        Verb::Tokenizer { prompts, vocab_size, output } => train_tokenizer(&prompts, vocab_size, &output)?,
        Verb::Export(arguments) => export::run(&arguments)?,
        Verb::Convert { gguf, folder } => {
            gguf::convert(&gguf, &folder)?;
            progress::log(format!("model in {}", folder.display()));
        }
        Verb::Settings => print(&all_settings())?,
        Verb::Completions { shell } => print_completions(shell, Arguments::command())?,
    }
    Ok(Outcome::Done)
}

fn load(given: &SettingsArgs) -> Result<Settings> {
    let settings: Settings = given.load()?;
    settings.check()?;
    Ok(settings)
}

fn load_rounds(given: &SettingsArgs) -> Result<rounds::Settings> {
    let settings: rounds::Settings = given.load()?;
    settings.check()?;
    Ok(settings)
}

/// The settings of every verb that has some, as docs/configuration.md holds them.
fn all_settings() -> String {
    let verbs =
        [reference::<Settings>("cllm-train run, plan, validate"), reference::<rounds::Settings>("cllm-train rounds")];
    verbs.join("\n")
}

fn train_tokenizer(prompts: &std::path::Path, vocab_size: usize, output: &std::path::Path) -> Result<()> {
    let mut texts = Vec::new();
    for sample in prompt_set::read(prompts)? {
        match sample.prompt {
            prompt_set::Prompt::Text(text) => texts.push(text),
            prompt_set::Prompt::Messages(messages) => texts.extend(messages.into_iter().map(|message| message.content)),
        }
        texts.extend(sample.reference);
    }
    if texts.is_empty() {
        return Err(Error::file(prompts, "holds no prompts to train a tokenizer on"));
    }
    tokenizer_training::train(&texts, vocab_size, output)?;
    progress::log(format!("tokenizer in {}", output.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_of_the_help_is_a_command_line() {
        for words in cllm_testing::help::example_commands(Arguments::command()) {
            let settings = match Arguments::try_parse_from(&words).unwrap().verb {
                Verb::Run(given) | Verb::Plan { given, .. } | Verb::Validate(given) => load(&given).map(drop),
                Verb::Bench(arguments) => load(&arguments.given).map(drop),
                Verb::Rounds(given) => load_rounds(&given).map(drop),
                _ => Ok(()),
            };
            settings.unwrap_or_else(|error| panic!("{words:?}: {error}"));
        }
    }

    #[test]
    fn the_configuration_reference_is_up_to_date() {
        cllm_testing::help::assert_documented(&all_settings());
    }
}
