//! Answers to MT-bench in the form that FastChat's judge reads: a file for each model and strategy.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use cllm_core::{Error, Result, atomic_file, fingerprint};
use serde::Serialize;
use serde_json::Value;

use crate::records::{AnswerRecord, Records};

/// Name of the folder in a run's folder.
pub const FOLDER: &str = "model_answer";

/// A line of a file: both answers to a question. The names are FastChat's.
#[derive(Serialize)]
struct Row<'a> {
    question_id: &'a Value,
    answer_id: String,
    model_id: &'a str,
    choices: [Choice<'a>; 1],
    /// Seconds since 1970.
    tstamp: f64,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    turns: [&'a str; 2],
}

/// Writes the files of a finished run. The judge uses the name of a file as the name of the model.
///
/// # Errors
/// When an answer has no `question_id`; file-system errors.
pub fn write(folder: &Path, records: &Records) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(Error::write(folder))?;
    let tstamp = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
    for model in &records.header.models {
        for strategy in records.header.strategies_of(model.role) {
            let model_id = format!("{}-{}", model.role, strategy.to_string().replace(' ', "-"));
            let path = folder.join(format!("{model_id}.jsonl"));
            let mut answers: Vec<&AnswerRecord> = records.answers_of(model.role, strategy).collect();
            answers.sort_by_key(|answer| answer.index);
            // The two turns of a question follow each other.
            let (questions, _) = answers.as_chunks::<2>();
            atomic_file::write_with(&path, |file| {
                for turns in questions {
                    let row = row(&path, &records.header.identity, &model_id, turns, tstamp)?;
                    writeln!(file, "{row}").map_err(Error::write(&path))?;
                }
                Ok(())
            })?;
        }
    }
    Ok(())
}

fn row(path: &Path, run: &str, model_id: &str, turns: &[&AnswerRecord; 2], tstamp: f64) -> Result<String> {
    let [first, second] = turns;
    let missing = || {
        let id = &first.id;
        Error::file(path, format!("answer `{id}` has no question_id in its meta: prepare the prompts again"))
    };
    let question_id = first.meta.as_ref().and_then(|meta| meta.get("question_id")).ok_or_else(missing)?;
    let row = Row {
        question_id,
        answer_id: fingerprint::hash_bytes(format!("{run} {model_id} {question_id}").as_bytes()),
        model_id,
        choices: [Choice { index: 0, turns: [&first.text, &second.text] }],
        tstamp,
    };
    serde_json::to_string(&row).map_err(Error::serialization)
}
