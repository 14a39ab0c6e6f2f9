//! `clean`: drops responses that would teach loops or incorrect answers, and counts them by rule.

mod evaluation_prompts;
mod repetition;
mod rules;
mod settings;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use cllm_core::chat_template::{RenderingRecord, today};
use cllm_core::checkpoint::hub;
use cllm_core::progress::{self, count};
use cllm_core::thought::ThoughtTokens;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Reader, Trajectory};
use cllm_core::{Error, Result, atomic_file};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::rewrite::{Command, Rewrite};
use crate::scoring::Scorer;
use evaluation_prompts::EvaluationPrompts;
use rules::{Candidate, DUPLICATE, RULES, RuleContext};
pub use settings::Settings;

/// The result of `clean`, which `clean-report.json` holds and `--json` prints.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    schema_version: u32,
    /// Rows kept.
    kept: usize,
    /// Rows dropped.
    dropped: usize,
    /// Rows dropped, by rule.
    rules: BTreeMap<String, usize>,
    /// Rows kept although `drop_incorrect` could not score them.
    unscored: usize,
}

/// A row with the findings of the rules that look at one row at a time.
struct CheckedRow {
    row: Trajectory,
    prompt_hash: u128,
    broken_rule: Option<&'static str>,
    is_unscored: bool,
}

/// A line of `dropped.jsonl`.
#[derive(Serialize)]
struct DroppedRow<'r> {
    rule: &'static str,
    row: &'r Trajectory,
}

/// Cleans a data set, unless that is done already.
///
/// # Errors
/// When the input is not a complete data set of the model's tokenizer, or the output cannot be
/// written.
pub fn clean(settings: &Settings) -> Result<Report> {
    let reader = Reader::open(&settings.input)?;
    let tokenizer = load_tokenizer(settings, &reader.provenance().rendering)?;
    // If another tokenizer decoded the responses, they would be noise, yet the rules would judge
    // them as if they were the answers.
    reader.check_tokenizer(tokenizer.fingerprint())?;
    drop(reader);
    let thought_tokens = ThoughtTokens::find(&tokenizer)?;
    let context = RuleContext {
        settings,
        scorer: Scorer {
            data_set: &settings.input,
            tokenizer: &tokenizer,
            data: settings.data.as_deref(),
            thought_tokens: thought_tokens.as_ref(),
        },
        evaluation_prompts: EvaluationPrompts::read(&settings.evaluation_prompts, &tokenizer)?,
    };
    let Settings { input, output, .. } = settings;
    let step = describe_step(settings, &context.evaluation_prompts);
    let command = Command { verb: "clean", settings, input, output, step };
    let Some(mut rewrite) = command.open()? else {
        let report: Report = command.read_report()?;
        progress::log(format!("already complete: {}", report.text(output)));
        return Ok(report);
    };
    let report = if settings.keep_dropped {
        apply_rules_and_save_dropped(&mut rewrite, &context)?
    } else {
        apply_rules(&mut rewrite, &context, |_| Ok(()))?
    };
    rewrite.finish(&report)?;
    report.log(settings);
    Ok(report)
}

/// Loads the tokenizer, which renders evaluation prompts as those of the data set were rendered:
/// rendered otherwise, they would not be found in it.
fn load_tokenizer(settings: &Settings, of_data: &RenderingRecord) -> Result<Tokenizer> {
    let mut rendering = settings.rendering.resolve(of_data.date.unwrap_or_else(today))?;
    if settings.rendering.chat_template_kwargs.is_empty() {
        rendering.chat_template_kwargs = of_data.chat_template_kwargs.clone();
    }
    let tokenizer = Tokenizer::load_for(&hub::locate(&settings.model)?, &rendering)?;
    let difference = of_data.difference(&tokenizer.rendering_record());
    match difference.filter(|_| of_data.chat_template.is_some() && !settings.evaluation_prompts.is_empty()) {
        Some(key) => Err(Error::file(
            &settings.input,
            format!("was rendered with another {key} than evaluation_prompts would be: set {key} as collect had it"),
        )),
        None => Ok(tokenizer),
    }
}

/// The step for the provenance: the rules, with what is in the paths that they need instead of the
/// paths, so that the same rows cleaned elsewhere give the same file. It says whether `data` was given
/// where `drop_incorrect` needs it.
fn describe_step(settings: &Settings, evaluation_prompts: &EvaluationPrompts) -> String {
    let mut rules = json!(settings);
    if let Some(rules) = rules.as_object_mut() {
        for path in ["input", "output", "model", "data", "chat_template"] {
            rules.shift_remove(path);
        }
        if settings.drop_incorrect {
            rules.insert("data".to_owned(), json!(settings.data.is_some()));
        }
        if let Some(hash) = evaluation_prompts.fingerprint() {
            rules.shift_remove("evaluation_prompts");
            rules.insert("evaluation_prompts_hash".to_owned(), json!(hash));
        }
    }
    format!("clean: {rules}")
}

/// Hashes a prompt to 16 bytes, which is all that the search for duplicates keeps per row. Prompts
/// with equal hashes count as equal.
fn hash_ids(ids: &[i32]) -> u128 {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    hash_bytes(&bytes)
}

fn hash_bytes(bytes: &[u8]) -> u128 {
    let mut hash = [0; 16];
    blake3::Hasher::new().update(bytes).finalize_xof().fill(&mut hash);
    u128::from_le_bytes(hash)
}

fn apply_rules_and_save_dropped(rewrite: &mut Rewrite, context: &RuleContext<'_>) -> Result<Report> {
    let path = context.settings.output.join("dropped.jsonl");
    let mut report = None;
    atomic_file::write_with(&path, |file| {
        let save = |dropped: &DroppedRow<'_>| {
            let line = serde_json::to_string(dropped).map_err(Error::serialization)?;
            writeln!(file, "{line}").map_err(Error::write(&path))
        };
        report = Some(apply_rules(rewrite, context, save)?);
        Ok(())
    })?;
    report.ok_or_else(|| Error::internal("dropped.jsonl was written without a report"))
}

/// Writes the rows that break no rule, and hands the others to `on_drop`, both in order.
fn apply_rules(
    rewrite: &mut Rewrite,
    context: &RuleContext<'_>,
    mut on_drop: impl FnMut(&DroppedRow<'_>) -> Result<()>,
) -> Result<Report> {
    let mut report = Report { schema_version: 1, kept: 0, dropped: 0, rules: BTreeMap::new(), unscored: 0 };
    let mut kept_prompts = HashSet::new();
    rewrite.run(
        |row| check_row(row, context),
        |checked| {
            let mut kept = Vec::with_capacity(checked.len());
            for CheckedRow { row, prompt_hash, broken_rule, is_unscored } in checked {
                let duplicate = || (!kept_prompts.insert(prompt_hash)).then_some(DUPLICATE);
                if let Some(rule) = broken_rule.or_else(duplicate) {
                    *report.rules.entry(rule.to_owned()).or_default() += 1;
                    report.dropped += 1;
                    on_drop(&DroppedRow { rule, row: &row })?;
                } else {
                    report.unscored += usize::from(is_unscored);
                    report.kept += 1;
                    kept.push(row);
                }
            }
            Ok(kept)
        },
    )?;
    Ok(report)
}

fn check_row(row: Trajectory, context: &RuleContext<'_>) -> Result<CheckedRow> {
    let text = context.scorer.tokenizer.decode_answer(&row.prompt_ids, &row.response_ids)?;
    let prompt_hash = hash_ids(&row.prompt_ids);
    let candidate = Candidate::new(&row, &text, prompt_hash, context);
    let (broken_rule, is_unscored) = (candidate.broken_rule()?, candidate.is_unscored());
    Ok(CheckedRow { row, prompt_hash, broken_rule, is_unscored })
}

impl Report {
    fn log(&self, settings: &Settings) {
        if self.unscored > 0 {
            let rows = count(self.unscored, "row");
            progress::log(format!("kept {rows} that the task could not score (Spider needs data=FOLDER)"));
        }
        progress::log(self.text(&settings.output));
        if !self.has_rows() {
            progress::log("nothing is left to learn from: relax the rules above, or collect other responses");
        }
    }

    /// Whether a row is left.
    pub fn has_rows(&self) -> bool {
        self.kept > 0
    }

    /// `kept 2 of 6 rows, in runs/clean; dropped: 1 duplicate, 3 unfinished (raise max_new_tokens of
    /// collect, or drop_unfinished=false)`
    fn text(&self, output: &Path) -> String {
        let kept = format!("kept {} of {}, in {}", self.kept, count(self.kept + self.dropped, "row"), output.display());
        if self.dropped == 0 {
            return kept;
        }
        let by_rule = |(name, number): (&String, &usize)| {
            let rule = RULES.iter().find(|rule| rule.name == *name);
            let advice = rule.and_then(|rule| rule.advice).map(|advice| format!(" ({advice})")).unwrap_or_default();
            format!("{number} {}{advice}", rule.map_or(name.as_str(), |rule| rule.adjective))
        };
        format!("{kept}; dropped: {}", self.rules.iter().map(by_rule).collect::<Vec<_>>().join(", "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_counts_dropped_rows_by_rule_and_gives_advice() {
        let report = |kept, rules: &[(&'static str, usize)]| {
            let dropped = rules.iter().map(|(_, number)| number).sum();
            Report {
                schema_version: 1,
                kept,
                dropped,
                rules: rules.iter().map(|&(name, number)| (name.to_owned(), number)).collect(),
                unscored: 0,
            }
            .text(Path::new("x"))
        };
        assert_eq!(report(60, &[]), "kept 60 of 60 rows, in x");
        assert_eq!(
            report(2, &[("unfinished", 3), ("duplicate", 1), ("periodic_tail", 2)]),
            "kept 2 of 8 rows, in x; dropped: 1 duplicate, 2 ending in a loop, 3 unfinished (raise max_new_tokens of collect, or \
             drop_unfinished=false)"
        );
    }
}
