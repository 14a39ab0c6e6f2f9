//! The command line of `cllm-data`: its verbs, their help, and what they print.

use clap::{CommandFactory, Parser, Subcommand};
use cllm_core::program::{Outcome, SettingsArgs, print_completions, print_json, print_settings};
use cllm_core::settings::reference;
use cllm_core::{Result, progress};
use serde::Serialize;

use crate::{augment, clean, collect, export, import, inspect, prepare, stats, validate};

/// The command line of `cllm-data`; its help begins with the description in Cargo.toml.
#[derive(Parser)]
#[command(
    name = "cllm-data",
    version,
    about,
    after_help = "Example:
  cllm-data prepare synthetic --num-problems 500 -o runs/prompts.jsonl
  cllm-data collect model=configs/tiny-teacher prompts=runs/prompts.jsonl \\
    output=runs/trajectories"
)]
pub struct Arguments {
    #[command(subcommand)]
    verb: Verb,
    /// Show no progress on stderr.
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Verb {
    /// Convert a benchmark's files, or your own chats and prompts, into a prompt set.
    #[command(after_help = "Examples:\n  cllm-data prepare synthetic --num-problems 500 -o runs/prompts.jsonl\n  \
        cllm-data prepare jsonl --data chats.jsonl --turns all -o runs/prompts.jsonl\n  \
        cllm-data prepare jsonl --data rows.parquet \\\n    --map question=query,reference=solution -o runs/prompts.jsonl")]
    Prepare(prepare::Arguments),
    /// Record how Jacobi decoding converges on a teacher's answers; resume where an earlier run
    /// stopped.
    #[command(
        after_help = "Example:\n  cllm-data collect model=configs/tiny-teacher prompts=runs/prompts.jsonl \\\n    output=runs/trajectories n=16"
    )]
    Collect(SettingsArgs),
    /// Augment states: replace some of their wrong tokens with the correct ones.
    #[command(after_help = "Example:\n  cllm-data augment input=runs/trajectories output=runs/augmented")]
    Augment(SettingsArgs),
    /// Remove repetitive, unfinished or duplicate responses, and count them by rule.
    #[command(
        after_help = "Example:\n  cllm-data clean input=runs/augmented output=runs/clean \\\n    model=configs/tiny-teacher"
    )]
    Clean(SettingsArgs),
    /// Check every row of a data set; exit with code 1 if one is invalid.
    #[command(after_help = "Example:\n  cllm-data validate runs/trajectories --model configs/tiny-teacher")]
    Validate(validate::Arguments),
    /// Count tokens, blocks and states, and average fast-forwarded and stationary tokens.
    #[command(after_help = "Example:\n  cllm-data stats runs/trajectories --json")]
    Stats(stats::Arguments),
    /// Show one response's trajectory in colour: tokens that are final, early or wrong.
    #[command(after_help = "Example:\n  cllm-data inspect runs/trajectories --model configs/tiny-teacher")]
    Inspect(inspect::Arguments),
    /// Convert a data set into a JSON trajectory file of the CLLM reference implementation.
    #[command(after_help = "Example:\n  cllm-data export runs/trajectories --output runs/trajectories.json")]
    Export(export::Arguments),
    /// Convert a JSON trajectory file of the CLLM reference implementation into a data set.
    #[command(
        after_help = "Example:\n  cllm-data import runs/trajectories.json --model configs/tiny-teacher \\\n    --output runs/imported"
    )]
    Import(import::Arguments),
    /// Print every setting as Markdown, of all verbs or of one: type, default, allowed values, meaning.
    #[command(after_help = "Examples:\n  cllm-data settings\n  cllm-data settings collect")]
    Settings {
        /// The verb.
        verb: Option<String>,
    },
    /// Print completions for a shell.
    #[command(after_help = "Example:\n  cllm-data completions bash > cllm-data.bash")]
    Completions { shell: clap_complete::Shell },
}

/// Runs the verb that the command line names.
///
/// # Errors
/// Those of the verb.
pub fn run(arguments: Arguments) -> Result<Outcome> {
    progress::set_quiet(arguments.quiet);
    match arguments.verb {
        Verb::Prepare(arguments) => prepare::run(&arguments),
        Verb::Collect(arguments) => print_summary(&arguments, &collect::collect(&arguments.load()?)?),
        Verb::Augment(arguments) => print_summary(&arguments, &augment::augment(&arguments.load()?)?),
        Verb::Clean(arguments) => {
            let report = clean::clean(&arguments.load()?)?;
            print_summary(&arguments, &report)?;
            Ok(if report.has_rows() { Outcome::Done } else { Outcome::Negative })
        }
        Verb::Validate(arguments) => validate::run(&arguments),
        Verb::Stats(arguments) => stats::run(&arguments),
        Verb::Inspect(arguments) => inspect::run(&arguments),
        Verb::Export(arguments) => export::run(&arguments),
        Verb::Import(arguments) => import::run(&arguments),
        Verb::Settings { verb } => print_settings(&all_settings(), verb.as_deref()).map(|()| Outcome::Done),
        Verb::Completions { shell } => {
            print_completions(shell, Arguments::command(), &all_settings()).map(|()| Outcome::Done)
        }
    }
}

/// Prints the result of a verb if `--json` asks for it; the verb has logged it on stderr.
fn print_summary(arguments: &SettingsArgs, summary: &impl Serialize) -> Result<Outcome> {
    if arguments.json {
        print_json(summary)?;
    }
    Ok(Outcome::Done)
}

/// The reference of all settings, as in docs/configuration.md.
fn all_settings() -> String {
    let verbs = [
        reference::<collect::Settings>("cllm-data collect"),
        reference::<augment::Settings>("cllm-data augment"),
        reference::<clean::Settings>("cllm-data clean"),
    ];
    verbs.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_in_the_help_is_a_valid_command_line() {
        for words in cllm_testing::help::example_commands(Arguments::command()) {
            let settings = match Arguments::try_parse_from(&words).unwrap().verb {
                Verb::Collect(arguments) => arguments.load::<collect::Settings>().map(drop),
                Verb::Augment(arguments) => arguments.load::<augment::Settings>().map(drop),
                Verb::Clean(arguments) => arguments.load::<clean::Settings>().map(drop),
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
