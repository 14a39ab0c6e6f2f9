//! Prepares prompts, collects Jacobi trajectories, augments, cleans, checks and describes them.

pub mod augment;
pub mod clean;
pub mod collect;
pub mod export;
pub mod import;
pub mod inspect;
pub mod prepare;
mod reference_format;
pub mod repetition;
pub mod rewrite;
mod scoring;
pub mod stats;
pub mod validate;
mod variants;

use std::path::PathBuf;

use clap::{CommandFactory, Parser, Subcommand};
use cllm_core::program::{Outcome, SettingsArgs, print, print_completions};
use cllm_core::settings::reference;
use cllm_core::{Result, progress};

/// Prepares prompts and trajectories for consistency training.
#[derive(Parser)]
#[command(
    name = "cllm-data",
    version,
    about,
    after_help = "Example:
  cllm-data prepare synthetic --split train --count 500 --output runs/prompts.jsonl
  cllm-data collect model=configs/tiny-teacher prompts=runs/prompts.jsonl output=runs/trajectories"
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
    /// Make a prompt set of a benchmark's files.
    #[command(
        after_help = "Example:\n  cllm-data prepare synthetic --split train --count 500 --output runs/prompts.jsonl"
    )]
    Prepare(prepare::Arguments),
    /// Record how Jacobi decoding converges on a teacher's answers; goes on where it was stopped.
    #[command(
        after_help = "Example:\n  cllm-data collect model=configs/tiny-teacher prompts=runs/prompts.jsonl \\\n    output=runs/trajectories n=16"
    )]
    Collect(SettingsArgs),
    /// Correct a random part of the wrong tokens of the states.
    #[command(after_help = "Example:\n  cllm-data augment input=runs/trajectories output=runs/augmented")]
    Augment(SettingsArgs),
    /// Drop responses that would teach loops, with counts per rule.
    #[command(
        after_help = "Example:\n  cllm-data clean input=runs/augmented output=runs/clean model=configs/tiny-teacher"
    )]
    Clean(SettingsArgs),
    /// Check a data set against its contract; exit code 1 when a row breaks it.
    #[command(after_help = "Example:\n  cllm-data validate runs/trajectories --model configs/tiny-teacher")]
    Validate(validate::Arguments),
    /// Tokens, blocks, states, fast-forwarded and stationary tokens.
    #[command(after_help = "Example:\n  cllm-data stats runs/trajectories --json")]
    Stats {
        /// The data set.
        data: PathBuf,
        /// Print them as JSON on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Show one response's trajectory in colour: final, right early, wrong.
    #[command(after_help = "Example:\n  cllm-data inspect runs/trajectories --model configs/tiny-teacher")]
    Inspect(inspect::Arguments),
    /// Write a JSON trajectory file for the CLLM reference implementation.
    #[command(after_help = "Example:\n  cllm-data export runs/trajectories --output runs/trajectories.json")]
    Export(export::Arguments),
    /// Read a JSON trajectory file of the CLLM reference implementation.
    #[command(
        after_help = "Example:\n  cllm-data import runs/trajectories.json --model configs/tiny-teacher --output runs/imported"
    )]
    Import(import::Arguments),
    /// Print every setting of every verb as Markdown: type, default, what is allowed, what it does.
    #[command(after_help = "Example:\n  cllm-data settings")]
    Settings,
    /// Print the completions of a shell.
    #[command(after_help = "Example:\n  cllm-data completions bash > cllm-data.bash")]
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
        Verb::Prepare(arguments) => prepare::run(&arguments),
        Verb::Collect(given) => collect::run(&given.load()?, given.json),
        Verb::Augment(given) => augment::run(&given.load()?, given.json),
        Verb::Clean(given) => clean::run(&given.load()?, given.json),
        Verb::Validate(arguments) => validate::run(&arguments),
        Verb::Stats { data, json } => stats::run(&data, json),
        Verb::Inspect(arguments) => inspect::run(&arguments),
        Verb::Import(arguments) => import::run(&arguments),
        Verb::Export(arguments) => export::run(&arguments),
        Verb::Settings => print(&all_settings()).map(|()| Outcome::Done),
        Verb::Completions { shell } => print_completions(shell, Arguments::command()).map(|()| Outcome::Done),
    }
}

/// The settings of every verb that has some, as docs/configuration.md holds them.
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
    fn every_example_of_the_help_is_a_command_line() {
        for words in cllm_testing::help::example_commands(Arguments::command()) {
            let settings = match Arguments::try_parse_from(&words).unwrap().verb {
                Verb::Collect(given) => given.load::<collect::Settings>().map(drop),
                Verb::Augment(given) => given.load::<augment::Settings>().map(drop),
                Verb::Clean(given) => given.load::<clean::Settings>().map(drop),
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
