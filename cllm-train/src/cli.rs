//! The command line.

use std::path::{Path, PathBuf};

use clap::builder::RangedU64ValueParser;
use clap::{CommandFactory, Parser, Subcommand};
use cllm_core::program::{Outcome, SettingsArgs, print, print_completions, print_json, print_settings};
use cllm_core::settings::{reference, to_yaml};
use cllm_core::{Result, device, output_folder, progress, prompt_set, text_file};
use serde_json::json;

use crate::bench::{self, BenchSettings};
use crate::export::{self, ExportArgs};
use crate::random_model::{self, RandomModelSettings};
use crate::rounds::{self, RoundsSettings};
use crate::settings::Settings;
use crate::summary::SUMMARY_FILE;
use crate::{gguf, plan, processes, prune, template, tokenizer_training, trainer};

/// Maximum number of ids, because training a tokenizer reserves memory for all of them.
const MAX_VOCAB_SIZE: u64 = 10_000_000;

/// Train teachers and consistency models.
#[derive(Parser)]
#[command(
    name = "cllm-train",
    version,
    after_help = "Example:
  cllm-train run -c configs/quickstart-student.yaml datasets=runs/clean \\
    output=runs/student"
)]
pub struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Show no progress on stderr.
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Verb {
    /// Train a model; resume where an interrupted run stopped.
    #[command(after_help = "Example:\n  cllm-train run -c configs/quickstart-student.yaml datasets=runs/clean \\
    output=runs/student")]
    Run(SettingsArgs),
    /// Show the size, memory, steps and duration of a run, without writing anything.
    #[command(after_help = "Example:\n  cllm-train plan -c configs/quickstart-student.yaml datasets=runs/clean")]
    Plan {
        #[command(flatten)]
        settings: SettingsArgs,
        /// Skip the timing of steps: load no model and estimate no duration.
        #[arg(long)]
        no_timing: bool,
    },
    /// Measure the speed of training: tokens and blocks per second, fraction of the device's peak,
    /// memory.
    #[command(
        after_help = "Example:\n  cllm-train bench model=configs/tiny-teacher datasets=runs/clean num_steps=5 \\\n    \
        train.max_batch_tokens=4096 output=runs/bench-train.json"
    )]
    Bench(SettingsArgs),
    /// Collect, augment, clean and train in rounds, each starting from the student of the round
    /// before; resume where interrupted rounds stopped.
    #[command(after_help = "Example:\n  cllm-train rounds -c configs/rounds.yaml output=runs/rounds")]
    Rounds(SettingsArgs),
    /// Check the settings of a run and print all of them.
    #[command(after_help = "Example:\n  cllm-train validate -c configs/quickstart-student.yaml")]
    Validate(SettingsArgs),
    /// Write a model with random weights in the shape of a published one, to rehearse a job without
    /// the weights.
    #[command(after_help = "Example:\n  cllm-train init shape=qwen3-8b output=models/random-qwen3-8b")]
    Init(SettingsArgs),
    /// Train a small tokenizer on the prompts and references of a prompt set, for a model with
    /// random weights.
    #[command(after_help = "Example:\n  cllm-train tokenizer runs/prompts.jsonl --vocab-size 512 -o runs/tokenizer")]
    Tokenizer {
        /// The prompt set.
        prompts: PathBuf,
        /// Maximum number of ids.
        #[arg(long, default_value_t = 512, value_parser = RangedU64ValueParser::<usize>::new().range(1..=MAX_VOCAB_SIZE))]
        vocab_size: usize,
        /// Folder to write the tokenizer's files to.
        #[arg(long, short)]
        output: PathBuf,
    },
    /// Convert a checkpoint to a model folder with weights of another type; an adapter is merged
    /// into its model.
    #[command(after_help = "Example:\n  cllm-train export runs/student/final --dtype bf16 --output runs/student-bf16")]
    Export(ExportArgs),
    /// Remove the training state of finished runs: what they could be resumed from, several times as
    /// large as a model. Their models stay.
    #[command(after_help = "Example:\n  cllm-train prune runs/teacher runs/student --dry-run")]
    Prune {
        /// Folders of runs.
        #[arg(required = true)]
        runs: Vec<PathBuf>,
        /// Include runs that are not finished. They cannot be resumed afterwards.
        #[arg(long)]
        force: bool,
        /// Only say how much would be freed.
        #[arg(long)]
        dry_run: bool,
    },
    /// Convert a GGUF file to a Hugging Face folder: bfloat16 weights, config and tokenizer.
    #[command(
        after_help = "Example:\n  cllm-train convert SmolLM2-135M-Instruct.Q4_1.gguf \\\n    models/SmolLM2-135M-Instruct"
    )]
    Convert {
        /// The file; its architecture must be llama or qwen2.
        gguf: PathBuf,
        /// Folder to write; it must not exist yet.
        folder: PathBuf,
    },
    /// Print a settings file with comments, to begin with: every setting at its default, or a recipe.
    #[command(
        after_help = "Examples:\n  cllm-train template > run.yaml\n  cllm-train template spider-student > student.yaml"
    )]
    Template {
        /// The name of a file in configs/, without its ending.
        #[arg(default_value = "run")]
        recipe: String,
    },
    /// Print every setting as Markdown, of all verbs or of one: type, default, allowed values, meaning.
    #[command(after_help = "Examples:\n  cllm-train settings\n  cllm-train settings rounds")]
    Settings {
        /// The verb.
        verb: Option<String>,
    },
    /// Print completions for a shell.
    #[command(after_help = "Example:\n  cllm-train completions bash > cllm-train.bash")]
    Completions { shell: clap_complete::Shell },
}

impl Cli {
    /// Runs the verb.
    ///
    /// # Errors
    /// Those of the verb.
    pub fn execute(self) -> Result<Outcome> {
        progress::set_quiet(self.quiet);
        match self.verb {
            Verb::Run(args) => {
                let summary = processes::run_together(|| {
                    let settings = load(&args)?;
                    let summary = settings.output.join(SUMMARY_FILE);
                    trainer::run(settings).map(|()| summary)
                })?;
                print_file(&summary, args.json)?;
            }
            Verb::Plan { settings, no_timing } => plan::run(&load(&settings)?, no_timing, settings.json)?,
            Verb::Bench(args) => processes::run_together(|| bench::run(&args.load()?, args.json))?,
            Verb::Rounds(args) => {
                let report = rounds::run(&load_rounds(&args)?)?;
                print_file(&report, args.json)?;
            }
            Verb::Validate(args) => {
                let settings = load(&args)?;
                device::check_name(&settings.device)?;
                if args.json {
                    print_json(&json!({ "schema_version": 1, "settings": settings }))?;
                } else {
                    print(&to_yaml(&settings)?)?;
                }
            }
            Verb::Init(args) => {
                let written = random_model::write(&args.load()?)?;
                if args.json {
                    print_json(&written)?;
                }
            }
            Verb::Tokenizer { prompts, vocab_size, output } => train_tokenizer(&prompts, vocab_size, &output)?,
            Verb::Export(args) => export::run(&args)?,
            Verb::Prune { runs, force, dry_run } => prune::prune(&runs, force, dry_run)?,
            Verb::Convert { gguf, folder } => {
                gguf::convert(&gguf, &folder)?;
                progress::log(format!("the model is in {}", folder.display()));
            }
            Verb::Template { recipe } => print(&template::recipe(&recipe)?)?,
            Verb::Settings { verb } => print_settings(&settings_reference(), verb.as_deref())?,
            Verb::Completions { shell } => print_completions(shell, Cli::command(), &settings_reference())?,
        }
        Ok(Outcome::Done)
    }
}

fn load(args: &SettingsArgs) -> Result<Settings> {
    let settings: Settings = args.load()?;
    settings.check()?;
    Ok(settings)
}

fn load_rounds(args: &SettingsArgs) -> Result<RoundsSettings> {
    let settings: RoundsSettings = args.load()?;
    settings.check()?;
    Ok(settings)
}

/// Prints the document of a verb, if `--json` asks for it.
fn print_file(path: &Path, json: bool) -> Result<()> {
    if json { print(&text_file::read(path)?) } else { Ok(()) }
}

/// The settings of every verb, as in docs/configuration.md.
fn settings_reference() -> String {
    let verbs = [
        reference::<Settings>("cllm-train run, plan, validate"),
        reference::<BenchSettings>("cllm-train bench"),
        reference::<RoundsSettings>("cllm-train rounds"),
        reference::<RandomModelSettings>("cllm-train init"),
    ];
    verbs.join("\n")
}

fn train_tokenizer(prompts: &Path, vocab_size: usize, output: &Path) -> Result<()> {
    let mut texts = Vec::new();
    for sample in prompt_set::read(prompts)? {
        match sample.prompt {
            prompt_set::Prompt::Text(text) => texts.push(text),
            prompt_set::Prompt::Conversation(conversation) => {
                texts.extend(conversation.messages.into_iter().map(|message| message.content))
            }
        }
        texts.extend(sample.reference);
    }
    let _lock = output_folder::lock(output)?;
    tokenizer_training::train(&texts, vocab_size, output)?;
    progress::log(format!("the tokenizer is in {}", output.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_of_the_help_is_a_command_line() {
        for words in cllm_testing::help::example_commands(Cli::command()) {
            let settings = match Cli::try_parse_from(&words).unwrap().verb {
                Verb::Run(args) | Verb::Plan { settings: args, .. } | Verb::Validate(args) => load(&args).map(drop),
                Verb::Bench(args) => args.load::<BenchSettings>().and_then(|settings| settings.training()).map(drop),
                Verb::Rounds(args) => load_rounds(&args).map(drop),
                Verb::Init(args) => args.load::<RandomModelSettings>().map(drop),
                _ => Ok(()),
            };
            settings.unwrap_or_else(|error| panic!("{words:?}: {error}"));
        }
    }

    #[test]
    fn the_configuration_reference_is_up_to_date() {
        cllm_testing::help::assert_documented(&settings_reference());
    }
}
