//! `run`: measures every model with every strategy.

pub mod margins;
pub mod measure;
pub mod perplexity;

use std::path::{Path, PathBuf};
use std::rc::Rc;

use cllm_core::decode::Strategy;
use cllm_core::environment::{Hardware, Toolkit};
use cllm_core::prompt_set::{self, Sample};
use cllm_core::task::{ScoreContext, Task, synthetic};
use cllm_core::{Error, Result, atomic_file, device, fingerprint, progress, settings};
use tch::Device;

use crate::config::RunSettings;
use crate::fastchat;
use crate::mt_bench_turns;
use crate::records::{Header, Journal, ModelEntry, Records, SAMPLES, SCHEMA_VERSION};
use crate::results::{RESULTS, Results};
use crate::role::Role;
use crate::score;
use measure::{Prompts, Subject, identify};
use perplexity::Texts;

/// Runs an evaluation, or goes on with an interrupted one, and writes its files.
///
/// # Errors
/// Settings that do not fit together, missing files, a device that is not there, interruption.
pub fn run(settings: &RunSettings) -> Result<Results> {
    let named: Vec<(Role, &str)> = [(Role::Teacher, &settings.teacher), (Role::Student, &settings.student)]
        .into_iter()
        .filter_map(|(role, name)| Some((role, name.as_deref()?)))
        .collect();
    if named.is_empty() {
        return Err(Error::usage("nothing to evaluate: set `teacher`, `student` or both to a model folder or id"));
    }
    if let Some(&strategy) = settings.strategies.iter().find(|strategy| strategy.needs_draft_model() && named.len() < 2)
    {
        return Err(Error::usage(format!(
            "strategies: `{strategy}` has the student guess for its teacher: set `teacher` and `student`"
        )));
    }
    let device = device::parse(&settings.device)?;
    let Examples { task, split, samples } = examples(settings)?;
    let sandbox = score::sandbox(task, settings.execute_code, "set `execute_code=true`")?;
    let judge = ScoreContext { data: settings.data.as_deref(), sandbox: sandbox.as_ref() };
    expect_scorable(settings, task, judge, &samples)?;
    let found: Vec<(PathBuf, ModelEntry)> =
        named.iter().map(|&(role, name)| identify(role, name)).collect::<Result<_>>()?;
    let (folders, models): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    let input = Input::prepare(task, &folders, &samples, settings)?;
    let used = used(settings, task);
    let header = Header {
        schema_version: SCHEMA_VERSION,
        identity: identity(&used, &models, &samples)?,
        benchmark: task,
        split,
        examples: samples.len(),
        hardware: Hardware::detect(device),
        toolkit: Toolkit::current(),
        sandbox: sandbox.as_ref().map(|sandbox| sandbox.layers().to_vec()),
        models,
        settings: used.clone(),
    };
    let output = &settings.output;
    std::fs::create_dir_all(output).map_err(Error::write(output))?;
    let (mut journal, mut records) = Journal::open(&output.join(SAMPLES), header)?;
    atomic_file::write(&output.join("config.yaml"), settings::to_yaml(settings)?.as_bytes())?;
    let roles = named.into_iter().map(|(role, _)| role).zip(folders).collect();
    let measurement = Measurement { settings: &used, samples: &samples, models: roles, device };
    match input {
        Input::Prompts(prompts) => measurement.answer(prompts, (task, judge), &mut records, &mut journal)?,
        Input::Texts(texts) => measurement.read(&texts, &mut records, &mut journal)?,
    }
    // Batches ran by length; the file ends up in the order of the prompt set.
    let order =
        |role: Role, strategy| (role == Role::Student, settings.strategies.iter().position(|&other| other == strategy));
    records.answers.sort_by_key(|answer| (order(answer.role, answer.strategy), answer.index));
    records.speeds.sort_by_key(|speed| (order(speed.role, speed.strategy), speed.index));
    records.write(&output.join(SAMPLES))?;
    if task == Task::MtBench {
        fastchat::write(&output.join(fastchat::FOLDER), &records)?;
    }
    let results = Results::of(&records);
    atomic_file::write_json(&output.join(RESULTS), &results)?;
    progress::log(format!("wrote {}", output.join(RESULTS).display()));
    Ok(results)
}

/// What of the settings has a part in a run: texts are read, not answered, so that nothing is decoded or timed.
fn used(settings: &RunSettings, task: Task) -> RunSettings {
    match task {
        Task::Perplexity => RunSettings { strategies: Vec::new(), num_speed_examples: 0, ..settings.clone() },
        _ => settings.clone(),
    }
}

/// The examples as each model reads them.
enum Input {
    /// To answer.
    Prompts(Vec<Prompts>),
    /// To read.
    Texts(Vec<Texts>),
}

impl Input {
    fn prepare(task: Task, folders: &[PathBuf], samples: &[Sample], settings: &RunSettings) -> Result<Self> {
        let folders = folders.iter();
        Ok(match task {
            Task::Perplexity => {
                Input::Texts(folders.map(|folder| Texts::tokenize(folder, samples)).collect::<Result<_>>()?)
            }
            _ => {
                Input::Prompts(folders.map(|folder| Prompts::render(folder, samples, settings)).collect::<Result<_>>()?)
            }
        })
    }
}

/// What every model is measured on.
struct Measurement<'a> {
    settings: &'a RunSettings,
    samples: &'a [Sample],
    /// The models and their folders.
    models: Vec<(Role, PathBuf)>,
    device: Device,
}

impl Measurement<'_> {
    fn answer(
        &self,
        prompts: Vec<Prompts>,
        scoring: (Task, ScoreContext<'_>),
        records: &mut Records,
        journal: &mut Journal,
    ) -> Result<()> {
        let Self { settings, samples, device, .. } = *self;
        let timed = measure::timed(settings.num_speed_examples, samples.len());
        let drafted: Vec<_> =
            settings.strategies.iter().copied().filter(|strategy| strategy.needs_draft_model()).collect();
        let mut subjects = Vec::new();
        for ((role, folder), prompts) in self.models.iter().zip(prompts) {
            let mut subject = Subject::load(*role, folder, prompts, device)?;
            let alone: Vec<_> =
                settings.strategies_of(*role).filter(|strategy| !strategy.needs_draft_model()).collect();
            self.answer_with(&mut subject, &alone, &timed, scoring, records, journal)?;
            if !timed.is_empty() || !drafted.is_empty() {
                subjects.push(subject);
            }
        }
        if let ([teacher, student], false) = (&mut subjects[..], drafted.is_empty()) {
            teacher.draft_model = Some(Rc::clone(&student.model));
            self.answer_with(teacher, &drafted, &timed, scoring, records, journal)?;
        }
        measure::time_all(&subjects, settings, &timed, records, journal)
    }

    /// Everything about a model and some strategies but the timing.
    fn answer_with(
        &self,
        subject: &mut Subject,
        strategies: &[Strategy],
        timed: &[usize],
        scoring: (Task, ScoreContext<'_>),
        records: &mut Records,
        journal: &mut Journal,
    ) -> Result<()> {
        let Self { settings, samples, .. } = *self;
        for &strategy in strategies {
            subject.answer_all(samples, strategy, settings, scoring, records, journal)?;
        }
        subject.fill_second_turns(samples, reference_strategy(&settings.strategies), records)?;
        // Of logits with noise on them a margin says nothing.
        if settings.sampling().is_greedy() {
            margins::add(subject, &mut records.answers)?;
        }
        subject.measure_memory(strategies, settings, timed)
    }

    fn read(&self, texts: &[Texts], records: &mut Records, journal: &mut Journal) -> Result<()> {
        for ((role, folder), texts) in self.models.iter().zip(texts) {
            perplexity::measure(*role, folder, texts, self.samples, self.device, records, journal)?;
        }
        Ok(())
    }
}

/// The strategy whose first answers stand in the second turns that are timed and looked at for margins: the same for all.
fn reference_strategy(strategies: &[Strategy]) -> Strategy {
    strategies
        .iter()
        .find(|&&strategy| strategy == Strategy::Ar)
        .or(strategies.first())
        .copied()
        .unwrap_or(Strategy::Ar)
}

/// What is answered.
struct Examples {
    /// What scores the answers.
    task: Task,
    split: String,
    samples: Vec<Sample>,
}

fn examples(settings: &RunSettings) -> Result<Examples> {
    let RunSettings { data, prompts, seed, num_problems, .. } = settings;
    let task = settings.benchmark.unwrap_or(Task::Synthetic);
    let split = settings.split.as_deref().unwrap_or("test");
    // The benchmark jsonl is a prompt set by another name.
    let file = prompts.as_deref().or(data.as_deref().filter(|_| task == Task::Jsonl));
    let mut samples = match file {
        Some(path) => prompt_set::read(path)?,
        None if task == Task::Synthetic => synthetic::generate(*seed, split, *num_problems),
        None => {
            let needed = || Error::usage(format!("{} needs `data`: {}", task.name(), task.expected_data()));
            task.load(data.as_deref().ok_or_else(needed)?, split)?
        }
    };
    samples.truncate(settings.limit.unwrap_or(usize::MAX));
    let (task, split) = match (file, samples.first()) {
        (Some(path), Some(first)) => told_by_sources(path, settings, first, &samples)?,
        (Some(path), None) => {
            return Err(Error::file(path, "holds no prompts: make it anew with `cllm-data prepare`"));
        }
        (None, Some(_)) => (task, split.to_owned()),
        (None, None) => return Err(Error::usage(format!("split `{split}` of {} has no examples", task.name()))),
    };
    if let Some(scorer) = settings.scorer {
        if task != Task::Jsonl {
            return Err(Error::usage(format!("`scorer` is of jsonl; {} has its own: leave it out", task.name())));
        }
        samples.iter_mut().for_each(|sample| scorer.note(sample));
    }
    if task == Task::MtBench {
        samples = mt_bench_turns::both_turns(samples)?;
    }
    Ok(Examples { task, split, samples })
}

/// Refuses what could not be scored, by its row where it comes from a file of the user's own.
fn expect_scorable(settings: &RunSettings, task: Task, judge: ScoreContext<'_>, samples: &[Sample]) -> Result<()> {
    let file = settings.prompts.as_ref().or(settings.data.as_ref()).filter(|_| task == Task::Jsonl);
    samples.iter().enumerate().try_for_each(|(index, sample)| {
        task.check_scorable(judge, sample).map_err(|error| match file {
            Some(path) => Error::file(path, format!("row {}: {error}", index + 1)),
            None => error,
        })
    })
}

/// Benchmark and split as the sources of a file's prompts name them. They must agree with one another and with the
/// settings: answers scored by another task than their own would look wrong, or right, for nothing.
fn told_by_sources(path: &Path, settings: &RunSettings, first: &Sample, samples: &[Sample]) -> Result<(Task, String)> {
    let task = settings.benchmark.unwrap_or(Task::from_source(&first.source));
    let split_of =
        |sample: &Sample| sample.source.split_once('/').map_or(sample.source.clone(), |(_, split)| split.into());
    let (split, mut mixed): (String, _) = (settings.split.clone().unwrap_or_else(|| split_of(first)), false);
    for (index, sample) in samples.iter().enumerate() {
        let refuse = |wanted: &str, advice: &str| {
            let (row, Sample { id, source, .. }) = (index + 1, sample);
            Err(Error::file(path, format!("row {row}, `{id}`: its source is `{source}`, {wanted}: {advice}")))
        };
        if Task::from_source(&sample.source) != task {
            let wanted = match settings.benchmark {
                Some(_) => format!("but `benchmark` is {}", task.name()),
                None => format!("but row 1 is of {}", task.name()),
            };
            return refuse(&wanted, "one evaluation measures one benchmark; keep each in a file of its own");
        }
        if split_of(sample) != split {
            if let Some(wanted) = &settings.split {
                return refuse(&format!("but `split` is {wanted}"), "leave `split` out, or these prompts");
            }
            mixed = true;
        }
    }
    Ok((task, if mixed { "mixed".to_owned() } else { split }))
}

/// What must be the same for a run to go on; where it writes is not part of it.
fn identity(settings: &RunSettings, models: &[ModelEntry], samples: &[Sample]) -> Result<String> {
    let settings = RunSettings { output: PathBuf::new(), ..settings.clone() };
    let text = serde_json::to_vec(&(settings, models, samples))
        .map_err(|error| Error::usage(format!("settings and prompts as JSON: {error}")))?;
    Ok(fingerprint::hash_bytes(&text))
}
