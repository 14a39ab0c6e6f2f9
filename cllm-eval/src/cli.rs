//! The command line.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use clap::builder::TypedValueParser;
use clap::{CommandFactory, Parser, Subcommand};
use cllm_core::program::{Outcome, SettingsArgs, print, print_completions, print_json};
use cllm_core::task::Task;
use cllm_core::{Error, Result, atomic_file, progress};
use serde_json::json;

use crate::bench::{BenchSettings, bench, summary};
use crate::compare::compare;
use crate::config::RunSettings;
use crate::generate::{GenerateOptions, visible};
use crate::profile::profile;
use crate::suite::{SuiteSettings, suite};
use crate::{doctor, generate, report, run, score, table, tradeoff};

/// Measures what consistency training gained and what it cost.
#[derive(Debug, Parser)]
#[command(
    name = "cllm-eval",
    version,
    after_help = "Example:\n  cllm-eval run teacher=configs/tiny-teacher student=runs/student/final \\\n    \
    benchmark=synthetic output=runs/eval\n  cllm-eval report runs/eval"
)]
pub struct Cli {
    /// Shows no progress.
    #[arg(long, short, global = true)]
    quiet: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Measures accuracy and speed of a teacher and a student; goes on where an interrupted run stopped.
    #[command(
        after_help = "Example:\n  cllm-eval run teacher=configs/tiny-teacher student=runs/student/final \\\n    \
        num_problems=100 'strategies=[ar, {jacobi: {n: 16}}]' output=runs/first-100"
    )]
    Run(SettingsArgs),
    /// Runs every benchmark whose data is there and draws one report; goes on where an interrupted suite stopped.
    #[command(
        after_help = "Example:\n  cllm-eval suite teacher=configs/tiny-teacher data=benchmarks limit=3 output=runs/suite"
    )]
    Suite(SettingsArgs),
    /// Scores the saved answers of a run again; needs no model and no GPU.
    #[command(after_help = "Example:\n  cllm-eval score runs/eval --json")]
    Score {
        /// Folder of a run, with samples.jsonl.
        folder: PathBuf,
        /// Folder of the benchmark's files, in place of the run's own: where Spider's databases are on this machine.
        #[arg(long)]
        data: Option<PathBuf>,
        /// Runs the Python code in answers to humaneval and mbpp, which a model wrote, in a sandbox; without this they are unscored.
        #[arg(long)]
        execute_code: bool,
        /// Prints results.json on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Compares two results example by example: accuracy with what chance alone would do, tokens, speed.
    #[command(
        after_help = "Examples:\n  cllm-eval compare runs/eval\n  cllm-eval compare runs/first runs/second --a student/ar --b \
        'student/rolling n=16' --json"
    )]
    Compare {
        /// Folder of a run, or its results.json; alone, its student is compared with its teacher.
        #[arg(value_name = "A")]
        first: PathBuf,
        /// What is compared with it.
        #[arg(value_name = "B")]
        second: Option<PathBuf>,
        /// Model and strategy of A, or one of the two: teacher/ar, student, rolling, student/jacobi n=16. Without it, the
        /// fastest strategy of the student that takes several tokens a forward, and of a run alone the teacher's AR.
        #[arg(long = "a", value_name = "MODEL/STRATEGY")]
        take_a: Option<String>,
        /// The same of B; without it, the fastest strategy of the student (or teacher, where there is no student).
        #[arg(long = "b", value_name = "MODEL/STRATEGY")]
        take_b: Option<String>,
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Puts checkpoints and strategies of several results beside each other: accuracy, parallelism, Pareto front, AUP.
    #[command(
        after_help = "Examples:\n  cllm-eval tradeoff runs/sweep\n  cllm-eval tradeoff runs/first/results.json runs/second --json"
    )]
    Tradeoff {
        /// results.json files, or the folders that hold them, all of the same examples.
        #[arg(required = true)]
        results: Vec<PathBuf>,
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Profiles trajectories as the paper's table 3 does: fast-forwarded and stationary tokens of a block.
    #[command(
        after_help = "Example:\n  cllm-eval profile teacher=runs/trajectories student=runs/student-trajectories \
                            -o runs/profile.json"
    )]
    Profile {
        /// Folders of `cllm-data collect`, or NAME=FOLDER; each but the first gets its ratios to the first.
        #[arg(required = true, value_name = "TRAJECTORIES")]
        sets: Vec<String>,
        /// File to write the JSON document to.
        #[arg(long, short)]
        output: Option<PathBuf>,
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Draws report.html, report.md, report.tex and model-card.md from one or several runs.
    #[command(after_help = "Example:\n  cllm-eval report runs/eval --output runs/report")]
    Report {
        /// results.json files, or the folders that hold them.
        #[arg(required = true)]
        results: Vec<PathBuf>,
        /// Folder for the report; without it, the folder of the first results.
        #[arg(long, short)]
        output: Option<PathBuf>,
        /// Prints the paths of what was written as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Measures how fast a model decodes: steps by their tokens, prefill, batches, strategies, collection, memory.
    #[command(
        after_help = "Examples:\n  cllm-eval bench model=configs/tiny-teacher 'steps=[1, 16]' 'batches=[8]' repeats=2 \\\n    \
        output=runs/bench.json\n  cllm-eval bench -c configs/bench.yaml \\\n    \
        'strategies=[{jacobi: {n: 16}}, {rolling: {n: 16, pool: 4}}, {lookahead: {}}]'"
    )]
    Bench(SettingsArgs),
    /// Answers a prompt autoregressively and by Jacobi decoding, showing tokens as they become final; without a prompt, a chat with both
    /// side by side.
    #[command(after_help = "Examples:\n  cllm-eval generate --model runs/student/final --n 16 \\\n    \
        \"Mia fills 3 packs with 5 cards each and sells 2 cards. How many cards does Mia keep?\"\n  \
        cllm-eval generate --model runs/student/final")]
    Generate {
        /// The prompt; without it, a chat in the terminal.
        prompt: Option<String>,
        /// Model folder or id.
        #[arg(long, short)]
        model: String,
        /// Takes the prompt as it is, without the model's chat template.
        #[arg(long)]
        raw: bool,
        /// Tokens of a Jacobi block.
        #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(2..=1024).map(|n| n as usize))]
        n: usize,
        /// Most tokens of the answer.
        #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..).map(|n| n as usize))]
        max_new_tokens: usize,
        /// Ids that end the answer, in place of the model's own: 2 or 0,2.
        #[arg(long, value_delimiter = ',', num_args = 1)]
        eos_ids: Option<Vec<i32>>,
        /// auto, cpu, cuda or cuda:N.
        #[arg(long, default_value = "auto")]
        device: String,
        /// Seed of the first guesses.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        /// Prints one JSON document on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Lists the benchmarks and what each needs.
    #[command(after_help = "Example:\n  cllm-eval ls")]
    Ls {
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Says what works on this machine and why the rest does not.
    #[command(after_help = "Example:\n  cllm-eval doctor --json")]
    Doctor {
        /// Prints one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Prints every setting of every verb as Markdown: type, default, what is allowed, what it does.
    #[command(after_help = "Example:\n  cllm-eval settings")]
    Settings,
    /// Prints a shell's completions.
    #[command(after_help = "Example:\n  cllm-eval completions bash > cllm-eval.bash")]
    Completions {
        /// Which shell.
        shell: clap_complete::Shell,
    },
}

impl Cli {
    /// Does what was asked.
    ///
    /// # Errors
    /// What the verb fails with.
    pub fn execute(self) -> Result<Outcome> {
        progress::set_quiet(self.quiet);
        let done = match self.verb {
            Verb::Run(given) => results(&run::run(&given.load()?)?, given.json),
            Verb::Suite(given) => {
                let found = suite(&given.load()?)?;
                if given.json { print_json(&found) } else { print(&found.text()) }?;
                return Ok(if found.failed() { Outcome::Negative } else { Outcome::Done });
            }
            Verb::Score { folder, data, execute_code, json } => {
                results(&score::score(&folder, data, execute_code)?, json)
            }
            Verb::Compare { first, second, take_a, take_b, json } => {
                let found = compare(&first, second.as_deref(), take_a.as_deref(), take_b.as_deref())?;
                if json { print_json(&found) } else { print(&found.text()) }
            }
            Verb::Tradeoff { results, json } => {
                let found = tradeoff::read(&results)?;
                if json { print_json(&found) } else { print(&found.text()) }
            }
            Verb::Profile { sets, output, json } => {
                let found = profile(&sets)?;
                if let Some(file) = output {
                    atomic_file::write_json(&file, &found)?;
                }
                if json { print_json(&found) } else { print(&found.text()) }
            }
            Verb::Report { results, output, json } => draw(&results, output.as_deref(), json),
            Verb::Generate { prompt, model, raw, n, max_new_tokens, eos_ids, device, seed, json } => {
                let how = GenerateOptions { model, raw, n, max_new_tokens, eos_ids, device, seed };
                match prompt {
                    Some(prompt) => {
                        let found = generate::generate(&prompt, &how, !self.quiet)?;
                        let text = found["strategies"][1]["text"].as_str().unwrap_or("");
                        match json {
                            true => print_json(&found),
                            false if std::io::stdout().is_terminal() => print(&visible(text)),
                            false => print(text),
                        }
                    }
                    None if json => Err(Error::usage("--json needs a prompt: without one this is a chat")),
                    None => generate::chat(&how),
                }
            }
            Verb::Bench(given) => {
                let found = bench(&given.load::<BenchSettings>()?)?;
                if given.json { print_json(&found) } else { print(&summary(&found)) }
            }
            Verb::Ls { json } => list(json),
            Verb::Doctor { json } => {
                let findings = doctor::examine();
                if json { print_json(&findings) } else { print(&findings.text()) }
            }
            Verb::Settings => print(&all_settings()),
            Verb::Completions { shell } => print_completions(shell, Cli::command()),
        };
        done.map(|()| Outcome::Done)
    }
}

/// The settings of a run, as docs/configuration.md holds them.
fn all_settings() -> String {
    cllm_core::settings::reference::<RunSettings>("cllm-eval run")
        + "\n"
        + &cllm_core::settings::reference::<SuiteSettings>("cllm-eval suite")
        + "\n"
        + &BenchSettings::reference()
}

fn results(results: &crate::results::Results, json: bool) -> Result<()> {
    if json { print_json(results) } else { print(&table::summary(results)) }
}

fn draw(results: &[PathBuf], output: Option<&Path>, json: bool) -> Result<()> {
    let written = report::report(results, output)?;
    if json {
        return print_json(&json!({ "schema_version": 1, "written": written }));
    }
    print(&written.iter().map(|path| format!("{}\n", path.display())).collect::<String>())
}

fn list(json: bool) -> Result<()> {
    if json {
        let benchmarks: Vec<_> =
            Task::ALL.iter().map(|task| json!({ "name": task.name(), "needs": task.expected_data() })).collect();
        return print_json(&json!({ "schema_version": 1, "benchmarks": benchmarks }));
    }
    let lines: String =
        Task::ALL.iter().map(|task| format!("{:<13} needs {}\n", task.name(), task.expected_data())).collect();
    print(&lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_example_of_the_help_is_a_command_line() {
        for words in cllm_testing::help::example_commands(Cli::command()) {
            let loaded = match Cli::try_parse_from(&words).unwrap().verb {
                Verb::Run(given) => given.load::<RunSettings>().map(drop),
                Verb::Suite(given) => given.load::<SuiteSettings>().map(drop),
                Verb::Bench(given) => given.load::<BenchSettings>().map(drop),
                _ => Ok(()),
            };
            loaded.unwrap_or_else(|error| panic!("{words:?}: {error}"));
        }
    }

    #[test]
    fn the_configuration_reference_is_up_to_date() {
        cllm_testing::help::assert_documented(&all_settings());
    }
}
