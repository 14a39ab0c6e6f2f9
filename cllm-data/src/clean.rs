//! `clean`: drops responses that would teach loops or wrong answers, with counts per rule.

use std::collections::{BTreeMap, HashSet};
use std::io::Write;
use std::path::PathBuf;

use cllm_core::checkpoint::hub;
use cllm_core::program::{Outcome, print_json};
use cllm_core::prompt_set;
use cllm_core::task::Verdict;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{FinishReason, Reader, Trajectory};
use cllm_core::{Error, Result, atomic_file, interrupt, progress, settings};
use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::repetition;
use crate::rewrite::{self as copying, Copying};
use crate::scoring::score;

/// Settings of `clean`.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The data set.
    #[garde(custom(settings::required_path))]
    pub input: PathBuf,
    /// The folder to write.
    #[garde(custom(settings::required_path))]
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
    pub drop_incorrect: bool,
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
            drop_incorrect: false,
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
    Reader::open(&settings.input)?.check_tokenizer(tokenizer.fingerprint())?;
    let evaluation = evaluation_prompts(settings, &tokenizer)?;
    let mut counts = Counts::default();
    let mut copying = Copying::open(&settings.input, &settings.output, step(settings))?;
    if settings.keep_dropped {
        let path = settings.output.join("dropped.jsonl");
        atomic_file::write_with(&path, |file| {
            sort(&mut copying, settings, &tokenizer, &evaluation, &mut counts, |line| {
                writeln!(file, "{line}").map_err(Error::write(&path))
            })
        })?;
    } else {
        sort(&mut copying, settings, &tokenizer, &evaluation, &mut counts, |_| Ok(()))?;
    }
    let dropped: usize = counts.rules.values().sum();
    let report = json!({ "schema_version": 1, "kept": counts.kept, "dropped": dropped, "rules": counts.rules,
        "unscored": counts.unscored });
    atomic_file::write_json(&settings.output.join("clean-report.json"), &report)?;
    copying::save_settings(&settings.output, settings)?;
    copying::finish(copying.writer, &settings.output)?;
    if json {
        print_json(&report)?;
    }
    if counts.unscored > 0 {
        progress::log(format!(
            "{} rows kept that the task's own score could not judge (Spider needs data=FOLDER)",
            counts.unscored
        ));
    }
    let Counts { kept, rules, .. } = counts;
    progress::log(format!("{kept} rows kept, {dropped} dropped {rules:?}, in {}", settings.output.display()));
    Ok(Outcome::Done)
}

#[derive(Default)]
struct Counts {
    kept: usize,
    /// Dropped rows by rule.
    rules: BTreeMap<&'static str, usize>,
    /// Rows kept although `drop_incorrect` could not judge them.
    unscored: usize,
}

/// A row and what is told of it without the others.
struct Judged {
    row: Trajectory,
    prompt: u128,
    broken: Option<&'static str>,
    unscored: bool,
}

/// What was done, for the provenance. Where the files lie does not change the rows: the same data cleaned elsewhere is the
/// same file.
fn step(settings: &Settings) -> String {
    let mut rules = json!(settings);
    if let Some(rules) = rules.as_object_mut() {
        for place in ["input", "output", "model", "data"] {
            rules.shift_remove(place);
        }
    }
    format!("clean: {rules}")
}

/// Sorts the rows into those kept, which are written, and those dropped, which `drop_line` gets as JSON; both in order.
fn sort(
    copying: &mut Copying,
    settings: &Settings,
    tokenizer: &Tokenizer,
    evaluation: &HashSet<u128>,
    counts: &mut Counts,
    mut drop_line: impl FnMut(&Value) -> Result<()>,
) -> Result<()> {
    let judge = |row| judge(row, settings, tokenizer, evaluation);
    let mut seen = HashSet::new();
    copying.run(judge, |judged| {
        let mut kept = Vec::with_capacity(judged.len());
        for Judged { row, prompt, broken, unscored } in judged {
            let again = || (!seen.insert(prompt)).then_some("duplicate");
            if let Some(rule) = broken.or_else(again) {
                *counts.rules.entry(rule).or_default() += 1;
                if settings.keep_dropped {
                    drop_line(&json!({ "rule": rule, "row": row }))?;
                }
            } else {
                counts.unscored += usize::from(unscored);
                kept.push(row);
            }
        }
        counts.kept += kept.len();
        Ok(kept)
    })
}

fn evaluation_prompts(settings: &Settings, tokenizer: &Tokenizer) -> Result<HashSet<u128>> {
    let mut prompts = HashSet::new();
    for path in &settings.evaluation_prompts {
        for sample in prompt_set::read(path)? {
            interrupt::check()?;
            prompts.insert(hash(&tokenizer.encode_prompt(&sample.prompt)?.1));
        }
    }
    Ok(prompts)
}

/// Two prompts with the same hash are taken for the same; 16 bytes a row are kept to find duplicates.
fn hash(ids: &[i32]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    ids.iter().for_each(|id| {
        hasher.update(&id.to_le_bytes());
    });
    let mut first = [0; 16];
    hasher.finalize_xof().fill(&mut first);
    u128::from_le_bytes(first)
}

fn judge(row: Trajectory, settings: &Settings, tokenizer: &Tokenizer, evaluation: &HashSet<u128>) -> Result<Judged> {
    let text = tokenizer.decode(&row.response_ids)?;
    let prompt = hash(&row.prompt_ids);
    let mut broken = broken_rule(&row, settings, &text, evaluation.contains(&prompt));
    let mut unscored = false;
    if settings.drop_incorrect && broken.is_none() {
        let verdict = score(&settings.input, &row, &text, settings.data.as_deref())?;
        unscored = verdict == Verdict::Unscored;
        broken = (verdict == Verdict::Incorrect).then_some("incorrect_answer");
    }
    Ok(Judged { row, prompt, broken, unscored })
}

/// The first rule that a row breaks.
fn broken_rule(row: &Trajectory, settings: &Settings, text: &str, in_evaluation: bool) -> Option<&'static str> {
    // A loop that finds its end is a loop all the same: the EOS is no part of the tail.
    let ids = match row.finish_reason {
        FinishReason::Eos => &row.response_ids[..row.response_ids.len().saturating_sub(1)],
        FinishReason::Length => &row.response_ids,
    };
    let rules: [(&'static str, &dyn Fn() -> bool); 7] = [
        ("empty", &|| text.trim().is_empty()),
        ("evaluation_prompt", &|| in_evaluation),
        ("unfinished", &|| settings.drop_unfinished && row.finish_reason == FinishReason::Length),
        ("token_run", &|| repetition::token_run(ids, settings.token_run)),
        ("repeated_4grams", &|| repetition::repeated_share(ids, 4) > settings.repeated_4grams),
        ("periodic_tail", &|| repetition::periodic_tail(ids, 64, settings.periodic_tail)),
        ("repeated_sentence", &|| repetition::repeated_sentence(text, 12, settings.repeated_sentence)),
    ];
    rules.into_iter().find(|(_, broken)| broken()).map(|(name, _)| name)
}
