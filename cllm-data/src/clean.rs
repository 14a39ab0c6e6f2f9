//! `clean`: drops responses that would teach loops or wrong answers, with counts per rule.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Mutex;

use cllm_core::program::{Outcome, print_json};
use cllm_core::prompt_set::{self, Prompt, Sample};
use cllm_core::task::{Task, Verdict};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{FinishReason, Reader, Trajectory};
use cllm_core::{Error, Result, atomic_file, hub, progress, settings};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::repetition;

/// Settings of `clean`.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The data set.
    #[garde(custom(settings::given))]
    pub input: PathBuf,
    /// The folder to write.
    #[garde(custom(settings::given))]
    pub output: PathBuf,
    /// The model whose tokenizer reads the answers: a folder or an id.
    #[garde(length(min = 1))]
    pub model: String,
    /// Folder of the benchmark's files, to score answers that need them: Spider's databases.
    #[garde(skip)]
    pub data: Option<PathBuf>,
    /// Drop an answer in which one token occurs so many times in a row.
    #[garde(range(min = 2))]
    pub token_run: usize,
    /// Drop an answer in which more than this share of the 4-grams are repeats.
    #[garde(range(min = 0.0, max = 1.0))]
    pub repeated_4grams: f64,
    /// Drop an answer that ends in a piece that stands there so many times in a row.
    #[garde(range(min = 2))]
    pub periodic_tail: usize,
    /// Drop an answer in which a line or sentence occurs so many times.
    #[garde(range(min = 2))]
    pub repeated_sentence: usize,
    /// Drop answers that hit the length limit.
    #[garde(skip)]
    pub drop_unfinished: bool,
    /// Drop answers that the task's own score calls wrong.
    #[garde(skip)]
    pub drop_wrong: bool,
    /// Prompt sets of evaluations: a row with one of their prompts is dropped.
    #[garde(skip)]
    pub evaluation_prompts: Vec<PathBuf>,
    /// Keep the dropped rows in dropped.jsonl.
    #[garde(skip)]
    pub keep_dropped: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            input: PathBuf::new(),
            output: PathBuf::new(),
            model: String::new(),
            data: None,
            token_run: 10,
            repeated_4grams: 0.6,
            periodic_tail: 3,
            repeated_sentence: 3,
            drop_unfinished: true,
            drop_wrong: false,
            evaluation_prompts: Vec::new(),
            keep_dropped: false,
        }
    }
}

/// Cleans a data set.
///
/// # Errors
/// Bad data sets, models and folders.
pub fn run(settings: &Settings, json: bool) -> Result<Outcome> {
    let tokenizer = Tokenizer::load(&hub::locate(&settings.model)?)?;
    // Text that another tokenizer makes of the ids is noise, and would be judged as if it were the answer.
    Reader::open(&settings.input)?.expect_tokenizer(tokenizer.fingerprint())?;
    let evaluation = evaluation_prompts(settings, &tokenizer)?;
    let dropped: Mutex<Vec<(&'static str, Trajectory)>> = Mutex::default();
    let drop_row = |rule, row| {
        if let Ok(mut dropped) = dropped.lock() {
            dropped.push((rule, row));
        }
    };
    let keep = |row: Trajectory| match broken_rule(&row, settings, &tokenizer, &evaluation)? {
        None => Ok(Some(row)),
        Some(rule) => {
            drop_row(rule, row);
            Ok(None)
        }
    };
    let mut seen = HashSet::new();
    // Where the files lie does not change the rows: the same data cleaned elsewhere is the same file.
    let mut rules = json!(settings);
    if let Some(rules) = rules.as_object_mut() {
        for place in ["input", "output", "model", "data"] {
            rules.shift_remove(place);
        }
    }
    let step = format!("clean: {rules}");
    let manifest = crate::copying::copy(&settings.input, &settings.output, step, keep, |rows| {
        let (new, again): (Vec<_>, Vec<_>) = rows.into_iter().partition(|row| seen.insert(row.prompt_ids.clone()));
        again.into_iter().for_each(|row| drop_row("duplicate", row));
        new
    })?;
    let mut dropped = dropped.into_inner().unwrap_or_default();
    dropped.sort_by(|a, b| a.1.sample_id.cmp(&b.1.sample_id));
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for (rule, _) in &dropped {
        *counts.entry(rule).or_default() += 1;
    }
    let kept: usize = manifest.shards.iter().map(|(_, rows)| rows).sum();
    let report = json!({ "schema_version": 1, "kept": kept, "dropped": dropped.len(), "rules": counts });
    atomic_file::write_json(&settings.output.join("clean-report.json"), &report)?;
    if settings.keep_dropped {
        let lines: Vec<_> = dropped.iter().map(|(rule, row)| json!({ "rule": rule, "row": row }).to_string()).collect();
        atomic_file::write(&settings.output.join("dropped.jsonl"), (lines.join("\n") + "\n").as_bytes())?;
    }
    if json {
        print_json(&report)?;
    }
    progress::say(format!("{kept} rows kept, {} dropped {counts:?}, in {}", dropped.len(), settings.output.display()));
    Ok(Outcome::Done)
}

fn evaluation_prompts(settings: &Settings, tokenizer: &Tokenizer) -> Result<HashSet<Vec<i32>>> {
    let mut prompts = HashSet::new();
    for path in &settings.evaluation_prompts {
        for sample in prompt_set::read(path)? {
            prompts.insert(tokenizer.prompt(&sample.prompt)?.1);
        }
    }
    Ok(prompts)
}

/// The first rule that a row breaks.
fn broken_rule(
    row: &Trajectory,
    settings: &Settings,
    tokenizer: &Tokenizer,
    evaluation: &HashSet<Vec<i32>>,
) -> Result<Option<&'static str>> {
    let text = tokenizer.decode(&row.response_ids)?;
    // A loop that finds its end is a loop all the same: the EOS is no part of the tail.
    let ids = match row.finish_reason {
        FinishReason::Eos => &row.response_ids[..row.response_ids.len().saturating_sub(1)],
        FinishReason::Length => &row.response_ids,
    };
    let rules: [(&'static str, &dyn Fn() -> bool); 7] = [
        ("empty", &|| text.trim().is_empty()),
        ("evaluation_prompt", &|| evaluation.contains(&row.prompt_ids)),
        ("unfinished", &|| settings.drop_unfinished && row.finish_reason == FinishReason::Length),
        ("token_run", &|| repetition::token_run(ids, settings.token_run)),
        ("repeated_4grams", &|| repetition::repeated_share(ids, 4) > settings.repeated_4grams),
        ("periodic_tail", &|| repetition::periodic_tail(ids, 64, settings.periodic_tail)),
        ("repeated_sentence", &|| repetition::repeated_sentence(&text, 12, settings.repeated_sentence)),
    ];
    if let Some((name, _)) = rules.into_iter().find(|(_, broken)| broken()) {
        return Ok(Some(name));
    }
    let wrong = settings.drop_wrong && verdict(row, settings, &text)? == Verdict::Wrong;
    Ok(wrong.then_some("wrong_answer"))
}

fn verdict(row: &Trajectory, settings: &Settings, answer: &str) -> Result<Verdict> {
    let bad_meta = |error| Error::file(&settings.input, format!("row `{}`: meta is no JSON: {error}", row.sample_id));
    let sample = Sample {
        id: row.sample_id.clone(),
        source: row.source.clone(),
        prompt: Prompt::Text(row.prompt.clone()),
        reference: row.reference.clone(),
        meta: row.meta.as_deref().map(serde_json::from_str).transpose().map_err(bad_meta)?,
    };
    Task::of_source(&row.source).score(settings.data.as_deref(), &sample, answer)
}
