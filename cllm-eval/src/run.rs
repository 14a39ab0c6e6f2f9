//! `run`: measures every model with every strategy.

use std::path::PathBuf;

use cllm_core::prompt_set::{self, Sample};
use cllm_core::task::{Task, synthetic};
use cllm_core::{Error, Result, VERSION, atomic_file, device, fingerprint, progress, settings};

use crate::config::RunSettings;
use crate::hardware::{Hardware, libtorch_version};
use crate::margins;
use crate::measure::{Prompts, Subject, identify, time_all};
use crate::records::{Header, Journal, ModelEntry, Role, SAMPLES, SCHEMA_VERSION, Toolkit};
use crate::results::{RESULTS, Results};

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
    let device = device::parse(&settings.device)?;
    let (task, samples) = examples(settings)?;
    let found: Vec<(PathBuf, ModelEntry)> =
        named.iter().map(|&(role, name)| identify(role, name)).collect::<Result<_>>()?;
    let (folders, models): (Vec<_>, Vec<_>) = found.into_iter().unzip();
    let prompts: Vec<Prompts> =
        folders.iter().map(|folder| Prompts::render(folder, &samples, settings)).collect::<Result<_>>()?;
    let header = Header {
        schema_version: SCHEMA_VERSION,
        identity: identity(settings, &models, &samples)?,
        benchmark: task,
        split: settings.split.clone(),
        examples: samples.len(),
        hardware: Hardware::of(device),
        toolkit: Toolkit { version: VERSION.to_owned(), libtorch: libtorch_version() },
        models,
        settings: settings.clone(),
    };
    let output = &settings.output;
    std::fs::create_dir_all(output).map_err(Error::write(output))?;
    let (mut journal, mut records) = Journal::open(&output.join(SAMPLES), header)?;
    atomic_file::write(&output.join("settings.yaml"), settings::to_yaml(settings)?.as_bytes())?;
    let mut subjects = Vec::new();
    for ((&(role, _), folder), prompts) in named.iter().zip(&folders).zip(prompts) {
        let subject = Subject::load(role, folder, prompts, device)?;
        for &strategy in &settings.strategies {
            subject.answer_all(&samples, strategy, settings, task, &mut records, &mut journal)?;
        }
        margins::add(&subject, &mut records.answers)?;
        if settings.speed_examples > 0 {
            subjects.push(subject);
        }
    }
    time_all(&subjects, settings, settings.speed_examples.min(samples.len()), &mut records, &mut journal)?;
    // Batches ran by length; the file ends up in the order of the prompt set.
    let order =
        |role: Role, strategy| (role == Role::Student, settings.strategies.iter().position(|&other| other == strategy));
    records.answers.sort_by_key(|answer| (order(answer.role, answer.strategy), answer.index));
    records.speeds.sort_by_key(|speed| (order(speed.role, speed.strategy), speed.index));
    records.write(&output.join(SAMPLES))?;
    let results = Results::of(&records);
    atomic_file::write_json(&output.join(RESULTS), &results)?;
    progress::say(format!("wrote {}", output.join(RESULTS).display()));
    Ok(results)
}

/// The examples, and the task that scores them.
fn examples(settings: &RunSettings) -> Result<(Task, Vec<Sample>)> {
    let (task, mut samples) = if let Some(path) = &settings.prompts {
        let samples = prompt_set::read(path)?;
        let task = samples.first().map_or(Task::Jsonl, |sample| Task::of_source(&sample.source));
        (task, samples)
    } else if settings.benchmark == Task::Synthetic {
        (Task::Synthetic, synthetic::generate(settings.seed, &settings.split, settings.count))
    } else {
        let data = settings.data.as_deref().ok_or_else(|| {
            Error::usage("this benchmark needs `data`, the folder of its files; `cllm-eval ls` says which")
        })?;
        (settings.benchmark, settings.benchmark.load(data, &settings.split)?)
    };
    samples.truncate(settings.limit.unwrap_or(usize::MAX));
    if samples.is_empty() {
        return Err(Error::usage(format!("split `{}` has no examples", settings.split)));
    }
    samples.iter().try_for_each(|sample| task.expect_data(settings.data.as_deref(), sample))?;
    Ok((task, samples))
}

/// What must be the same for a run to go on; where it writes is not part of it.
fn identity(settings: &RunSettings, models: &[ModelEntry], samples: &[Sample]) -> Result<String> {
    let settings = RunSettings { output: PathBuf::new(), ..settings.clone() };
    let text = serde_json::to_vec(&(settings, models, samples))
        .map_err(|error| Error::usage(format!("settings and prompts as JSON: {error}")))?;
    Ok(fingerprint::of_bytes(&text))
}
