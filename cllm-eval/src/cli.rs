//! The command line.

use std::path::{Path, PathBuf};

use clap::builder::TypedValueParser;
use clap::{Args, CommandFactory, Parser, Subcommand};
use cllm_core::chat_template::RenderSettings;
use cllm_core::program::{Outcome, SettingsArgs, print, print_completions, print_json, print_settings};
use cllm_core::task::Task;
use cllm_core::{Error, Result, atomic_file, output_folder, progress};
use serde::Serialize;
use serde_json::json;

use crate::bench::{BenchSettings, bench, summary};
use crate::compare::{Comparison, compare};
use crate::config::RunSettings;
use crate::doctor::Findings;
use crate::generate::GenerateOptions;
use crate::profile::{Profiles, profile};
use crate::results::Results;
use crate::serve::{ServeSettings, serve};
use crate::suite::{Suite, SuiteSettings, suite};
use crate::tradeoff::Tradeoff;
use crate::{doctor, generate, report, run, score, terminal, tradeoff};

/// Measure what consistency training gained and what it cost.
#[derive(Debug, Parser)]
#[command(
    name = "cllm-eval",
    version,
    after_help = "Example:\n  cllm-eval run teacher=configs/tiny-teacher student=runs/student/final \\\n    \
    benchmark=synthetic output=runs/eval\n  cllm-eval report runs/eval"
)]
pub struct Cli {
    /// Show no progress on stderr.
    #[arg(long, short, global = true)]
    quiet: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Measure accuracy and speed of a teacher and a student; resume where an interrupted run
    /// stopped.
    #[command(
        after_help = "Example:\n  cllm-eval run teacher=configs/tiny-teacher student=runs/student/final \\\n    \
        num_problems=100 'strategies=[ar, {jacobi: {n: 16}}]' output=runs/first-100"
    )]
    Run(SettingsArgs),
    /// Run every benchmark whose files are present and draw one report; resume where an interrupted
    /// suite stopped.
    #[command(
        after_help = "Example:\n  cllm-eval suite teacher=configs/tiny-teacher data=benchmarks limit=3 \\\n    output=runs/suite"
    )]
    Suite(SettingsArgs),
    /// Score the saved answers of a run again, without a model or a GPU.
    #[command(after_help = "Example:\n  cllm-eval score runs/eval --json")]
    Score {
        /// Folder of the run, with samples.jsonl.
        folder: PathBuf,
        /// Folder of the benchmark's files, if not the run's own: where Spider's databases are on
        /// this machine.
        #[arg(long)]
        data: Option<PathBuf>,
        /// For spider: compare the results of the queries with their `DISTINCT`, or without. Default:
        /// as the run did.
        #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
        keep_distinct: Option<bool>,
        /// Run the Python code in answers to humaneval and mbpp, which a model wrote, in a sandbox;
        /// otherwise they stay unscored.
        #[arg(long)]
        execute_code: bool,
        /// Print results.json on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Compare two results example by example: accuracy (and whether its difference is
    /// significant), tokens, speed.
    #[command(
        after_help = "Examples:\n  cllm-eval compare runs/eval\n  cllm-eval compare runs/first runs/second \\\n    \
        --a student/ar --b 'student/rolling n=16'"
    )]
    Compare {
        /// Folder of a run, or its results.json. Without B, its student is compared with its
        /// teacher.
        #[arg(value_name = "A")]
        first: PathBuf,
        /// Folder of the run to compare with it, or its results.json.
        #[arg(value_name = "B")]
        second: Option<PathBuf>,
        /// Model and strategy of A, or one of the two: teacher/ar, student, rolling, student/jacobi
        /// n=16. Default: the fastest strategy of the student that accepts several tokens per
        /// forward; without B, the teacher's AR.
        #[arg(long = "a", value_name = "MODEL/STRATEGY")]
        select_a: Option<String>,
        /// Model and strategy of B. Default: the fastest strategy of the student, or of the teacher
        /// if there is no student.
        #[arg(long = "b", value_name = "MODEL/STRATEGY")]
        select_b: Option<String>,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Compare checkpoints and strategies of several results: accuracy, parallelism, Pareto front,
    /// AUP.
    #[command(
        after_help = "Examples:\n  cllm-eval tradeoff runs/sweep\n  cllm-eval tradeoff runs/first/results.json runs/second --json"
    )]
    Tradeoff {
        /// results.json files of the same examples, or the folders that hold them.
        #[arg(required = true)]
        results: Vec<PathBuf>,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Profile trajectories as table 3 of the paper does: fast-forwarded and stationary tokens per
    /// block.
    #[command(after_help = "Example:\n  cllm-eval profile teacher=runs/trajectories student=runs/of-student \\\n    \
        -o runs/profile.json")]
    Profile {
        /// Folders of `cllm-data collect`, or NAME=FOLDER. All others are compared with the first.
        #[arg(required = true, value_name = "TRAJECTORIES")]
        sets: Vec<String>,
        /// Also write the JSON document to this file.
        #[arg(long, short)]
        output: Option<PathBuf>,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Draw report.html, report.md, report.tex, model-card.md and pictures (tradeoff.svg,
    /// example.svg) from one or several runs.
    #[command(after_help = "Example:\n  cllm-eval report runs/eval --output runs/report")]
    Report {
        /// results.json files, or the folders that hold them.
        #[arg(required = true)]
        results: Vec<PathBuf>,
        /// Folder to write the report to. Default: the folder of the first results.
        #[arg(long, short)]
        output: Option<PathBuf>,
        /// Print the paths of the files as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Draw one example as an animated SVG: teacher and student side by side, paced by measured
    /// time.
    #[command(after_help = "Example:\n  cllm-eval animate runs/eval --output answers.svg")]
    Animate {
        /// Folder of a run, or its samples.jsonl.
        run: PathBuf,
        /// File for the SVG.
        #[arg(long, short)]
        output: PathBuf,
        /// Id of the example. Default: the first that both models answer correctly.
        #[arg(long, value_name = "ID")]
        example: Option<String>,
    },
    /// Measure how fast a model decodes: forwards by their number of tokens, prefill, batches,
    /// strategies, collection, memory.
    #[command(after_help = "Examples:\n  cllm-eval bench model=configs/tiny-teacher 'step_tokens=[1, 16]' \\\n    \
        batch_sizes=8 num_repeats=2 output=runs/bench.json\n  cllm-eval bench -c configs/bench.yaml \\\n    \
        'strategies=[jacobi, {rolling: {n: 16, pool: 4}}, lookahead]'")]
    Bench(SettingsArgs),
    /// Answer a prompt autoregressively and with drafts, showing tokens as they are accepted; without
    /// a prompt, chat with both side by side.
    #[command(after_help = "Examples:\n  cllm-eval generate --model runs/student/final --n 16 \\\n    \
        \"Mia fills 3 packs with 5 cards each. How many cards does Mia have?\"\n  \
        cllm-eval generate --model runs/student/final")]
    Generate {
        /// The prompt. Without it, a chat in the terminal begins.
        prompt: Option<String>,
        /// Model folder or id.
        #[arg(long, short)]
        model: String,
        /// Use the prompt as it is, without the model's chat template.
        #[arg(long, conflicts_with = "system")]
        raw: bool,
        /// System message before the prompt.
        #[arg(long, value_name = "TEXT")]
        system: Option<String>,
        /// How the second answer is decoded, such as jacobi or '{rolling: {n: 32}}' [default: rolling, or gated with
        /// adapters for draft tokens].
        #[arg(long, conflicts_with = "n")]
        strategy: Option<String>,
        /// 0 chooses the likeliest token; above 0, tokens are sampled.
        #[arg(long, value_name = "T", default_value = "0")]
        temperature: String,
        /// Tokens of the window.
        #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u64).range(2..=1024).map(|n| n as usize))]
        n: usize,
        /// Maximum number of tokens of the answer.
        #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(1..).map(|n| n as usize))]
        max_new_tokens: usize,
        /// Ids that end the answer, instead of the model's own: 2 or 0,2.
        #[arg(long, value_delimiter = ',', num_args = 1)]
        eos_ids: Option<Vec<i32>>,
        /// auto, cpu, cuda or cuda:N.
        #[arg(long, default_value = "auto")]
        device: String,
        /// Seed of the first draft tokens.
        #[arg(long, default_value_t = 0)]
        seed: u64,
        #[command(flatten)]
        rendering: RenderingArgs,
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Answer requests of OpenAI's protocol, and show two ways of decoding side by side on a page.
    #[command(
        after_help = "Example:\n  cllm-eval serve model=runs/student/final teacher=configs/tiny-teacher \\\n    \
        'strategy={rolling: {n: 16}}' port=8000"
    )]
    Serve(SettingsArgs),
    /// List the benchmarks and the data that each needs.
    #[command(after_help = "Example:\n  cllm-eval ls")]
    Ls {
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Show what works on this machine, and why the rest does not.
    #[command(after_help = "Example:\n  cllm-eval doctor --json")]
    Doctor {
        /// Print one JSON document.
        #[arg(long)]
        json: bool,
    },
    /// Print every setting as Markdown, of all verbs or of one: type, default, allowed values, meaning.
    #[command(after_help = "Examples:\n  cllm-eval settings\n  cllm-eval settings run")]
    Settings {
        /// The verb.
        verb: Option<String>,
    },
    /// Print completions for a shell.
    #[command(after_help = "Example:\n  cllm-eval completions bash > cllm-eval.bash")]
    Completions { shell: clap_complete::Shell },
}

/// How prompts are rendered, as the settings of the other verbs say it.
#[derive(Debug, Args)]
struct RenderingArgs {
    /// Variables of the chat template, such as '{enable_thinking: false}'.
    #[arg(long, value_name = "VARIABLES")]
    chat_template_kwargs: Option<String>,
    /// File with a chat template to use instead of the model's own.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<String>,
    /// The date for chat templates that print it, such as 2026-11-28. Default: today.
    #[arg(long)]
    date: Option<String>,
}

impl RenderingArgs {
    fn load(&self) -> Result<RenderSettings> {
        let given = [
            ("chat_template_kwargs", &self.chat_template_kwargs),
            ("chat_template", &self.chat_template),
            ("date", &self.date),
        ];
        let set = given.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value.as_ref()?)));
        cllm_core::settings::load(None, &set.collect::<Vec<_>>())
    }
}

impl Cli {
    /// # Errors
    /// Those of the verb.
    pub fn execute(self) -> Result<Outcome> {
        progress::set_quiet(self.quiet);
        match self.verb {
            Verb::Run(args) => print_results(&run::run(&args.load()?)?, args.json),
            Verb::Suite(args) => {
                let suite = suite(&args.load()?)?;
                show(&suite, args.json, Suite::text)?;
                return Ok(if suite.has_failed() { Outcome::Negative } else { Outcome::Done });
            }
            Verb::Score { folder, data, keep_distinct, execute_code, json } => {
                print_results(&score::score(&folder, data, keep_distinct, execute_code)?, json)
            }
            Verb::Compare { first, second, select_a, select_b, json } => {
                let comparison = compare(&first, second.as_deref(), select_a.as_deref(), select_b.as_deref())?;
                show(&comparison, json, Comparison::text)
            }
            Verb::Tradeoff { results, json } => show(&tradeoff::read(&results)?, json, Tradeoff::text),
            Verb::Profile { sets, output, json } => show_profiles(&sets, output.as_deref(), json),
            Verb::Report { results, output, json } => draw_report(&results, output.as_deref(), json),
            Verb::Animate { run, output, example } => animate(&run, example.as_deref(), &output),
            Verb::Generate {
                prompt,
                model,
                raw,
                system,
                strategy,
                temperature,
                n,
                max_new_tokens,
                eos_ids,
                device,
                seed,
                rendering,
                json,
            } => {
                let rendering = rendering.load()?;
                let strategy = strategy.map(|text| generate::parse_strategy(&text)).transpose()?;
                let temperature = generate::parse_temperature(&temperature)?;
                let options = GenerateOptions {
                    model,
                    raw,
                    system,
                    strategy,
                    n,
                    temperature,
                    max_new_tokens,
                    eos_ids,
                    device,
                    seed,
                    rendering,
                };
                generate_or_chat(prompt.as_deref(), &options, json, self.quiet)
            }
            Verb::Bench(args) => show(&bench(&args.load::<BenchSettings>()?)?, args.json, summary),
            Verb::Serve(args) => return serve(&args.load()?, args.json),
            Verb::Ls { json } => list(json),
            Verb::Doctor { json } => show(&doctor::examine(), json, Findings::text),
            Verb::Settings { verb } => print_settings(&all_settings(), verb.as_deref()),
            Verb::Completions { shell } => print_completions(shell, Cli::command(), &all_settings()),
        }?;
        Ok(Outcome::Done)
    }
}

/// Prints a document as JSON or as text.
fn show<D: Serialize>(document: &D, json: bool, text: impl Fn(&D) -> String) -> Result<()> {
    if json { print_json(document) } else { print(&text(document)) }
}

fn print_results(results: &Results, json: bool) -> Result<()> {
    show(results, json, terminal::summary)
}

fn generate_or_chat(prompt: Option<&str>, options: &GenerateOptions, json: bool, quiet: bool) -> Result<()> {
    let Some(prompt) = prompt else {
        let no_prompt = || Err(Error::usage("--json needs a prompt: without one, generate is a chat"));
        return if json { no_prompt() } else { generate::chat(options) };
    };
    let document = generate::generate(prompt, options, !quiet)?;
    let text = &document.strategies[1].text;
    if json { print_json(&document) } else { print(text) }
}

/// The reference of all settings, as in docs/configuration.md.
fn all_settings() -> String {
    cllm_core::settings::reference::<RunSettings>("cllm-eval run")
        + "\n"
        + &cllm_core::settings::reference::<SuiteSettings>("cllm-eval suite")
        + "\n"
        + &BenchSettings::reference()
        + "\n"
        + &cllm_core::settings::reference::<ServeSettings>("cllm-eval serve")
}

fn draw_report(results: &[PathBuf], output: Option<&Path>, json: bool) -> Result<()> {
    let _lock = output_folder::lock(&report::output_of(results, output))?;
    let written = report::report(results, output, &[])?;
    if json {
        return print_json(&json!({ "schema_version": 1, "written": written }));
    }
    print(&written.iter().map(|path| format!("{}\n", path.display())).collect::<String>())
}

fn show_profiles(sets: &[String], output: Option<&Path>, json: bool) -> Result<()> {
    let profiles = profile(sets)?;
    if let Some(file) = output {
        atomic_file::write_json(file, &profiles)?;
    }
    show(&profiles, json, Profiles::text)
}

fn animate(run: &Path, example: Option<&str>, output: &Path) -> Result<()> {
    report::animate(run, example, output)?;
    print(&output.display().to_string())
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
                Verb::Run(args) => args.load::<RunSettings>().map(drop),
                Verb::Suite(args) => args.load::<SuiteSettings>().map(drop),
                Verb::Bench(args) => args.load::<BenchSettings>().map(drop),
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
