//! Prepares prompts, collects Jacobi trajectories, augments, cleans, checks and describes them.

pub mod augment;
pub mod clean;
pub mod collect;
mod copying;
pub mod export;
pub mod import;
pub mod inspect;
pub mod prepare;
mod reference_format;
pub mod repetition;
pub mod stats;
pub mod validate;

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};
use cllm_core::program::Outcome;
use cllm_core::{Result, progress, settings};

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

/// A YAML file and `section.key=value` over it.
#[derive(Args)]
struct Configured {
    /// Settings in YAML.
    #[arg(long, short)]
    config: Option<PathBuf>,
    /// Settings that win over the file: `key=value`.
    overrides: Vec<String>,
    /// Print the summary as one JSON document on stdout.
    #[arg(long)]
    json: bool,
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
        after_help = "Example:\n  cllm-data collect model=configs/tiny-teacher prompts=runs/prompts.jsonl output=runs/trajectories n=16"
    )]
    Collect(Configured),
    /// Correct a random part of the wrong tokens of the states.
    #[command(after_help = "Example:\n  cllm-data augment input=runs/trajectories output=runs/augmented")]
    Augment(Configured),
    /// Drop responses that would teach loops, with counts per rule.
    #[command(
        after_help = "Example:\n  cllm-data clean input=runs/augmented output=runs/clean model=configs/tiny-teacher"
    )]
    Clean(Configured),
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
    /// Read a JSON trajectory file of the CLLM reference implementation.
    #[command(
        after_help = "Example:\n  cllm-data import cleaned_gsm8k.json --model models/teacher --output runs/trajectories"
    )]
    Import(import::Arguments),
    /// Write a JSON trajectory file for the CLLM reference implementation.
    #[command(after_help = "Example:\n  cllm-data export runs/trajectories --output trajectories.json")]
    Export(export::Arguments),
    /// Print the completions of a shell.
    #[command(
        after_help = "Example:\n  cllm-data completions bash > ~/.local/share/bash-completion/completions/cllm-data"
    )]
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
        Verb::Collect(given) => collect::run(&settings::load(given.config.as_deref(), &given.overrides)?, given.json),
        Verb::Augment(given) => augment::run(&settings::load(given.config.as_deref(), &given.overrides)?, given.json),
        Verb::Clean(given) => clean::run(&settings::load(given.config.as_deref(), &given.overrides)?, given.json),
        Verb::Validate(arguments) => validate::run(&arguments),
        Verb::Stats { data, json } => stats::run(&data, json),
        Verb::Inspect(arguments) => inspect::run(&arguments),
        Verb::Import(arguments) => import::run(&arguments),
        Verb::Export(arguments) => export::run(&arguments),
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "cllm-data", &mut script);
            cllm_core::program::print(&String::from_utf8_lossy(&script))?;
            Ok(Outcome::Done)
        }
    }
}
