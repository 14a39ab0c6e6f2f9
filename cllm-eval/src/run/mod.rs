//! `run`: measures accuracy and speed of a teacher, a student or both.
//!
//! A run is a session of stages, in the order of [`run`]. Bad input is refused before any weights
//! are loaded. From then on every answer, timing and text window goes to a journal as soon as it
//! exists, so an interrupted run resumes where it stopped.

mod answers;
mod concurrency;
mod examples;
mod logit_gaps;
mod memory;
mod models;
mod perplexity;
mod prompts;
mod session;
mod timing;

use std::path::{Path, PathBuf};

use cllm_core::chat_template::{Date, today};
use cllm_core::decode::Strategy;
use cllm_core::task::Task;
use cllm_core::{Error, Result, device, output_folder, progress};

use crate::config::RunSettings;
use crate::fastchat;
use crate::records::{Header, SAMPLES};
use crate::results::{RESULTS, Results};
use crate::role::Role;
use crate::score::{AnswerScorer, open_sandbox};
use examples::Examples;
use models::{IdentifiedModel, LoadedModel};
use perplexity::Texts;
use prompts::Prompts;
use session::Session;

/// Runs an evaluation, or resumes an interrupted one, and writes its files.
///
/// # Errors
/// Settings that contradict each other, missing files, a device that does not exist, interruption.
pub fn run(settings: &RunSettings) -> Result<Results> {
    run_on(settings, today())
}

/// As [`run`], started on this date. A run that is resumed keeps the date on which it was started.
///
/// # Errors
/// As [`run`].
pub fn run_on(settings: &RunSettings, today: Date) -> Result<Results> {
    let settings = &with_date(settings, today)?;
    let names = model_names(settings)?;
    let device = device::parse(&settings.device)?;
    let _lock = output_folder::lock(&settings.output)?;
    let examples = Examples::load(settings)?;
    let sandbox = open_sandbox(examples.task, settings.execute_code, "set `execute_code=true`")?;
    let scorer = AnswerScorer::new(examples.task, settings, sandbox.as_ref());
    examples.expect_scorable(settings, scorer)?;
    let mut models: Vec<IdentifiedModel> =
        names.into_iter().map(|(role, name)| IdentifiedModel::locate(role, name)).collect::<Result<_>>()?;
    models.iter().try_for_each(|model| model.check_adapters(&settings.strategies))?;
    let input = Input::prepare(settings, &examples, &mut models, today)?;
    if let ([teacher, student], Input::Prompts(prompts)) = (&mut models[..], &input) {
        let are_used = settings.strategies.iter().any(|strategy| strategy.needs_draft_adapters());
        student.entry.adapts_teacher = are_used && prompts[0].equal(&prompts[1]) && student.adapts(teacher)?;
    }
    let settings = &recorded_settings(settings, &input);
    let mut session = Session::open(settings, &examples, scorer, sandbox.as_ref(), &models, device)?;
    match input {
        Input::Prompts(_) if session.is_complete() => {
            progress::log(format!("already complete: {}", settings.output.join(RESULTS).display()));
            return Results::read(&settings.output);
        }
        Input::Prompts(prompts) => answer_prompts(&mut session, models, prompts)?,
        Input::Texts(texts) => {
            for (model, texts) in models.iter().zip(&texts) {
                perplexity::measure(&mut session, model, texts)?;
            }
        }
    }
    finish(session, settings)
}

/// The settings with the date that is in force: the one that they set, or that of the interrupted
/// run in the output folder, or today's.
fn with_date(settings: &RunSettings, today: Date) -> Result<RunSettings> {
    let mut settings = settings.clone();
    if settings.rendering.date.is_none() {
        settings.rendering.date = stored_date(&settings.output)?.or(Some(today));
    }
    Ok(settings)
}

/// The date of the run in a folder; `None` if there is no run, or no chat template printed the date.
pub(crate) fn stored_date(folder: &Path) -> Result<Option<Date>> {
    Ok(Header::read(&folder.join(SAMPLES))?.and_then(|header| header.settings.rendering.date))
}

/// The settings to store: a date that no chat template prints is no part of the run.
fn recorded_settings(settings: &RunSettings, input: &Input) -> RunSettings {
    let mut settings = settings.clone();
    settings.rendering.date = match input {
        Input::Prompts(models) => models.iter().find_map(|prompts| prompts.tokenizer.rendering_record().date),
        Input::Texts(_) => None,
    };
    settings
}

/// The models to evaluate, by role.
fn model_names(settings: &RunSettings) -> Result<Vec<(Role, &str)>> {
    let names: Vec<(Role, &str)> = [(Role::Teacher, &settings.teacher), (Role::Student, &settings.student)]
        .into_iter()
        .filter_map(|(role, name)| Some((role, name.as_deref()?)))
        .collect();
    if names.is_empty() {
        return Err(Error::usage("nothing to evaluate: set `teacher`, `student` or both to a model folder or id"));
    }
    if settings.student.is_none()
        && let Some(strategy) = settings.strategies.iter().find(|strategy| strategy.needs_draft_adapters())
    {
        return Err(Error::usage(format!(
            "strategies: `{strategy}` decodes with the student's adapters for draft tokens: set `student` to their folder"
        )));
    }
    let drafted = settings.strategies.iter().find(|strategy| strategy.needs_draft_model());
    match drafted {
        Some(strategy) if names.len() < 2 => Err(Error::usage(format!(
            "strategies: `{strategy}` uses the student as the draft model of its teacher: set `teacher` and `student`"
        ))),
        _ => Ok(names),
    }
}

/// The examples as each model reads them.
enum Input {
    /// Prompts to answer.
    Prompts(Vec<Prompts>),
    /// Texts to read, for the benchmark `perplexity`.
    Texts(Vec<Texts>),
}

impl Input {
    /// Renders the examples for each model, whose entry then names its chat template.
    fn prepare(
        settings: &RunSettings,
        examples: &Examples,
        models: &mut [IdentifiedModel],
        today: Date,
    ) -> Result<Self> {
        let samples = &examples.samples;
        if examples.task == Task::Perplexity {
            let texts = models.iter().map(|model| Texts::tokenize(&model.folder, samples));
            return Ok(Input::Texts(texts.collect::<Result<_>>()?));
        }
        let rendering = settings.rendering.resolve(today)?;
        let render = |model: &mut IdentifiedModel| {
            let prompts = Prompts::render(&model.folder, samples, settings, &rendering)?;
            model.entry.chat_template = prompts.tokenizer.rendering_record().chat_template;
            Ok(prompts)
        };
        Ok(Input::Prompts(models.iter_mut().map(render).collect::<Result<_>>()?))
    }
}

/// Measures one model after the other, then what needs both models: strategies with a draft model,
/// and timing.
fn answer_prompts(session: &mut Session<'_>, models: Vec<IdentifiedModel>, prompts: Vec<Prompts>) -> Result<()> {
    let drafted: Vec<Strategy> =
        session.settings.strategies.iter().copied().filter(|strategy| strategy.needs_draft_model()).collect();
    let is_needed_later = !session.timed.is_empty() || !drafted.is_empty();
    let mut kept = Vec::new();
    for (model, prompts) in models.into_iter().zip(prompts) {
        let mut model = LoadedModel::load(model, prompts, session.device)?;
        let alone: Vec<Strategy> =
            session.strategies_of(model.role).filter(|strategy| !strategy.needs_draft_model()).collect();
        measure_strategies(session, &mut model, &alone)?;
        if is_needed_later {
            kept.push(model);
        }
    }
    if let ([teacher, student], false) = (&mut kept[..], drafted.is_empty()) {
        teacher.draft_with(student);
        measure_strategies(session, teacher, &drafted)?;
    }
    timing::time_strategies(session, &kept)?;
    concurrency::measure_throughput(session, &kept)
}

/// Measures everything except the timing of one model with some strategies.
fn measure_strategies(session: &mut Session<'_>, model: &mut LoadedModel, strategies: &[Strategy]) -> Result<()> {
    for &strategy in strategies {
        answers::answer_examples(session, model, strategy)?;
    }
    let records = session.journal.records();
    let ar_role = records.header.autoregressive_role(model.role);
    let (role, strategy) = reference_answers(&records.header, model.role);
    model.prompts.fill_second_turns(session.samples, records.answers_of(role, strategy))?;
    if session.settings.sampling().is_greedy() {
        logit_gaps::add(model, ar_role, session.journal.answers_mut())?;
    }
    memory::measure_batch1(session, model, strategies)
}

/// The model and the strategy that provide the first answers in a model's second turns, where these
/// are timed or compared for logit gaps: the same for all its strategies, so that they get equal
/// prompts.
fn reference_answers(header: &Header, role: Role) -> (Role, Strategy) {
    if header.settings.strategies.contains(&Strategy::Ar) {
        return (header.autoregressive_role(role), Strategy::Ar);
    }
    (role, header.strategies_of(role).next().unwrap_or(Strategy::Ar))
}

fn finish(session: Session<'_>, settings: &RunSettings) -> Result<Results> {
    let output: &PathBuf = &settings.output;
    let records = session.journal.finish()?;
    if records.header.benchmark == Task::MtBench {
        fastchat::write(&output.join(fastchat::FOLDER), &records)?;
    }
    let results = Results::from_records(&records);
    let path = results.write(output)?;
    if results.benchmark == Task::Spider && settings.data.is_none() {
        progress::log("no answer was scored: name Spider's folder with data=FOLDER");
    }
    progress::log(format!("wrote {}", path.display()));
    Ok(results)
}
