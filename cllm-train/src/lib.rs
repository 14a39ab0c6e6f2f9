//! Trains teachers (supervised) and students (consistency).

mod checkpoint;
pub mod examples;
mod export;
pub mod loss;
mod metrics;
pub mod optimizer;
pub mod packing;
mod plan;
pub mod schedule;
pub mod settings;
pub mod tensorboard;
pub mod trainer;

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand};
use cllm_core::program::Outcome;
use cllm_core::{Error, Result, progress, prompt_set, tokenizer_training};

use settings::Settings;

/// Trains teachers and consistency models.
#[derive(Parser)]
#[command(
    name = "cllm-train",
    version,
    about,
    after_help = "Example:
  cllm-train run -c configs/quickstart-student.yaml output=runs/student"
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
    /// Settings that win over the file: `section.key=value`.
    overrides: Vec<String>,
}

#[derive(Subcommand)]
enum Verb {
    /// Train; the same command again goes on where it was stopped.
    #[command(after_help = "Example:\n  cllm-train run -c configs/quickstart-student.yaml output=runs/student")]
    Run(Configured),
    /// Show parameters, steps, tokens and memory before anything starts.
    #[command(after_help = "Example:\n  cllm-train plan -c configs/quickstart-student.yaml")]
    Plan(Configured),
    /// Check a settings file and print the settings in full.
    #[command(after_help = "Example:\n  cllm-train validate -c configs/quickstart-student.yaml")]
    Validate(Configured),
    /// Train a small tokenizer on the prompts and references of a prompt set, for a model made from nothing.
    #[command(
        after_help = "Example:\n  cllm-train tokenizer runs/prompts.jsonl --vocab-size 512 --output runs/tokenizer"
    )]
    Tokenizer {
        /// The prompt set.
        prompts: PathBuf,
        /// Most ids.
        #[arg(long, default_value_t = 512)]
        vocab_size: usize,
        /// Folder of the tokenizer's files.
        #[arg(long, short)]
        output: PathBuf,
    },
    /// Write a checkpoint as a model folder with weights of another type.
    #[command(
        after_help = "Example:\n  cllm-train export runs/student/checkpoints/best --dtype bf16 --output runs/best"
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
    /// Print the completions of a shell.
    #[command(
        after_help = "Example:\n  cllm-train completions bash > ~/.local/share/bash-completion/completions/cllm-train"
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
        Verb::Run(given) => trainer::run(load(&given)?)?,
        Verb::Plan(given) => plan::run(&load(&given)?)?,
        Verb::Validate(given) => cllm_core::program::print(&cllm_core::settings::to_yaml(&load(&given)?)?)?,
        Verb::Tokenizer { prompts, vocab_size, output } => train_tokenizer(&prompts, vocab_size, &output)?,
        Verb::Export(arguments) => export::run(&arguments)?,
        Verb::Convert { gguf, folder } => {
            cllm_core::gguf::convert(&gguf, &folder)?;
            progress::say(format!("model in {}", folder.display()));
        }
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "cllm-train", &mut script);
            cllm_core::program::print(&String::from_utf8_lossy(&script))?;
        }
    }
    Ok(Outcome::Done)
}

fn load(given: &Configured) -> Result<Settings> {
    let settings: Settings = cllm_core::settings::load(given.config.as_deref(), &given.overrides)?;
    settings.check()?;
    Ok(settings)
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
    progress::say(format!("tokenizer in {}", output.display()));
    Ok(())
}
