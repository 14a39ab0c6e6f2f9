//! Prompt sets: prompts, with the data that a task needs to score their answers.
//!
//! People have prompts in many forms (chat messages, ShareGPT, TRL, Alpaca, plain columns), as JSON
//! Lines, JSON lists and Parquet, with and without ids. Reading turns all of these into
//! [`Sample`]s, and tells which rows it had to set aside; only JSON Lines and Parquet are written.

mod columns;
mod conversation;
pub(crate) mod dataset_file;
mod field_map;
mod form;
mod notes;
mod sample;

use std::collections::HashSet;
use std::path::Path;

use crate::chat_template::Message;
use crate::progress::{self, count};
use crate::{Error, Result, atomic_file, interrupt};
use dataset_file::{FileRow, RowError};
use form::RowSamples;
use notes::Notes;

pub use conversation::{Turns, answers_something};
pub use field_map::FieldMap;
pub use sample::{DEFAULT_SOURCE, Prompt, Sample};

/// How to read a file of prompts.
#[derive(Debug, Clone, Default)]
pub struct ReadOptions {
    /// Names of fields that are not known here.
    pub fields: FieldMap,
    pub turns: Turns,
    /// Whether a row that cannot be read is an error, instead of being set aside.
    pub strict: bool,
}

/// What a file of prompts holds.
#[derive(Debug)]
pub struct PromptSet {
    pub samples: Vec<Sample>,
    /// Number of rows that could not be read.
    pub num_set_aside: usize,
}

/// Reads a prompt set of any known form. Rows that cannot be read are set aside and told on stderr;
/// a row without an id gets one made of its number.
///
/// # Errors
/// When the file cannot be read, or none of its rows.
pub fn read(path: &Path) -> Result<Vec<Sample>> {
    read_with(path, &ReadOptions::default()).map(|set| set.samples)
}

/// Reads a prompt set with options.
///
/// # Errors
/// As [`read`]; if strict, names the first row that cannot be read.
pub fn read_with(path: &Path, options: &ReadOptions) -> Result<PromptSet> {
    if path.is_dir() {
        let message = "is a folder: expected a prompt set, such as the JSONL or Parquet file that `cllm-data prepare` \
                       writes";
        return Err(Error::file(path, message));
    }
    let rows = dataset_file::read_rows(path)?;
    let (num_rows, is_parquet) = (rows.len(), dataset_file::is_parquet(path)?);
    let (mut samples, mut ids, mut notes) = (Vec::new(), HashSet::new(), Notes::default());
    for (index, row) in rows.into_iter().enumerate() {
        interrupt::check()?;
        let location = row.location;
        match parse_row(is_parquet, index + 1, row, options).and_then(|row| expect_new_ids(row, &mut ids)) {
            Ok(row) => samples.extend(notes.add_read(row)),
            Err(error) if options.strict => return Err(Error::file(path, format!("{location} {error}"))),
            Err(error) => notes.add_set_aside(location, error),
        }
    }
    let num_set_aside = notes.finish(path, num_rows)?;
    Ok(PromptSet { samples, num_set_aside })
}

fn parse_row(
    is_parquet: bool,
    number: usize,
    row: FileRow,
    options: &ReadOptions,
) -> std::result::Result<RowSamples, RowError> {
    let mut fields = row.object?;
    if is_parquet {
        columns::restore(&mut fields)?;
    }
    form::parse_row(number, fields, &options.fields, options.turns)
}

fn expect_new_ids(row: RowSamples, ids: &mut HashSet<String>) -> std::result::Result<RowSamples, RowError> {
    match row.samples.iter().find(|sample| ids.contains(&sample.id)) {
        Some(Sample { id, .. }) => Err(RowError::new("has the id of another row", format!("`{id}` occurs twice"))),
        None => {
            ids.extend(row.samples.iter().map(|sample| sample.id.clone()));
            Ok(row)
        }
    }
}

/// Keeps the first samples up to a limit, and says on stderr how many of how many these are. `name`
/// is that of the limit, such as `limit`.
pub fn apply_limit(samples: &mut Vec<Sample>, limit: Option<usize>, name: &str) {
    let Some(limit) = limit else { return };
    let there = count(samples.len(), "prompt");
    match samples.len() {
        number if number > limit => progress::log(format!("{name}={limit}: the first of {there}")),
        number if number < limit => progress::log(format!("{name}={limit}: there are only {there}")),
        _ => {}
    }
    samples.truncate(limit);
}

/// Puts a system message before each conversation that has none of its own. Prompts of plain text
/// stay as they are, and are counted on stderr.
pub fn insert_system_message(samples: &mut [Sample], text: &str) {
    let mut num_plain = 0;
    for sample in samples.iter_mut() {
        match &mut sample.prompt {
            Prompt::Text(_) => num_plain += 1,
            Prompt::Conversation(conversation) if conversation.messages.iter().any(conversation::is_system) => {}
            Prompt::Conversation(conversation) => conversation.messages.insert(0, Message::new("system", text)),
        }
    }
    if num_plain > 0 {
        let prompts = count(num_plain, "prompt");
        progress::log(format!("no system message for {prompts} of plain text, which no chat template reads"));
    }
}

/// Writes a prompt set: Parquet if the name ends in `.parquet`, otherwise JSONL.
///
/// # Errors
/// File-system errors.
pub fn write(path: &Path, samples: &[Sample]) -> Result<()> {
    if dataset_file::is_named_parquet(path) {
        return columns::write(path, samples);
    }
    atomic_file::write_with(path, |file| {
        for sample in samples {
            interrupt::check()?;
            let line = serde_json::to_string(sample).map_err(Error::serialization)?;
            writeln!(file, "{line}").map_err(Error::write(path))?;
        }
        Ok(())
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::chat_template::Conversation;

    fn sample(id: &str, prompt: Prompt) -> Sample {
        Sample { id: id.into(), source: "jsonl/test".into(), prompt, reference: Some("4".into()), meta: None }
    }

    fn put(path: &Path, rows: &[Value]) {
        std::fs::write(path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
    }

    fn strict_error(path: &Path) -> String {
        let options = ReadOptions { strict: true, ..ReadOptions::default() };
        read_with(path, &options).unwrap_err().to_string()
    }

    #[test]
    fn everything_that_a_sample_holds_survives_both_formats() {
        let dir = tempfile::tempdir().unwrap();
        let messages = json!([
            { "role": "system", "content": "Be brief." },
            { "role": "user", "content": "2+2?", "name": "Ann" },
            { "role": "assistant", "content": "", "tool_calls": [{ "function": { "name": "add", "arguments": { "n": [2, 2.5] } } }] },
            { "role": "tool", "content": "4", "tool_call_id": "x", "other": { "deep": true } },
        ]);
        let conversation: Conversation = serde_json::from_value(json!({
            "messages": messages,
            "tools": [{ "type": "function", "function": { "name": "add" } }],
            "chat_template_kwargs": { "enable_thinking": false, "depth": 3 },
        }))
        .unwrap();
        let other = Sample {
            reference: None,
            meta: Some(json!({ "db_id": "zoo", "n": [1, 2.5], "nothing": null })),
            ..sample("c", Prompt::Conversation(conversation))
        };
        let samples = [sample("a", Prompt::Text("2+2=".into())), sample("b", Prompt::question("2+2?")), other];
        for name in ["prompts.jsonl", "prompts.parquet"] {
            let path = dir.path().join(name);
            write(&path, &samples).unwrap();
            assert_eq!(read(&path).unwrap(), samples, "{name}");
        }
    }

    #[test]
    fn rows_that_cannot_be_read_are_set_aside_and_strict_names_the_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prompts.jsonl");
        let good = |id: &str| json!({ "id": id, "prompt": "2+2=" });
        put(&path, &[good("a"), good("a"), json!({ "level": 1 }), json!([1]), good("b")]);
        let ids: Vec<_> = read(&path).unwrap().into_iter().map(|sample| sample.id).collect();
        assert_eq!(ids, ["a", "b"]);
        assert!(strict_error(&path).contains("prompts.jsonl: line 2 has the id of another row: `a` occurs twice"));
        put(&path, &[json!({ "id": 1, "level": 1 }), json!({ "id": 2, "level": 2 })]);
        let error = read(&path).unwrap_err();
        let message = error.to_string();
        assert_eq!(error.exit_code(), 2);
        for part in ["none of 2 rows", "line 1", "id, level", "`conversations`", "--map prompt=FIELD", "1 row like it"]
        {
            assert!(message.contains(part), "{part}: {message}");
        }
        for empty in ["", "\n\n", "[]"] {
            std::fs::write(&path, empty).unwrap();
            assert!(read(&path).unwrap_err().to_string().contains("holds no prompts"), "{empty}");
        }
        assert!(read(dir.path()).unwrap_err().to_string().contains("is a folder"));
    }

    #[test]
    fn a_row_needs_only_a_prompt_and_its_other_fields_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plain.jsonl");
        put(
            &path,
            &[
                json!({ "id": "a", "prompt": "2+2=", "reference": "4", "level": 3, "meta": { "n": 1 }, "none": null }),
                json!({ "id": 7, "messages": [{ "role": "user", "content": "2+2?" }] }),
                json!({ "prompt": "c" }),
            ],
        );
        let samples = read(&path).unwrap();
        let ids: Vec<&str> = samples.iter().map(|sample| sample.id.as_str()).collect();
        assert_eq!((ids, samples[0].source.as_str()), (vec!["a", "7", "jsonl-3"], "jsonl"));
        assert_eq!((&samples[0].meta, &samples[1].meta), (&Some(json!({ "level": 3, "n": 1 })), &None));
    }

    #[test]
    fn a_system_message_goes_before_conversations_that_have_none() {
        let own = vec![Message::new("system", "Own."), Message::new("user", "?")];
        let mut samples = [
            sample("a", Prompt::question("?")),
            sample("b", Prompt::Conversation(own.clone().into())),
            sample("c", Prompt::Text("x".into())),
        ];
        insert_system_message(&mut samples, "Be brief.");
        let with_system = vec![Message::new("system", "Be brief."), Message::new("user", "?")];
        let expected =
            [Prompt::Conversation(with_system.into()), Prompt::Conversation(own.into()), Prompt::Text("x".into())];
        assert_eq!(samples.map(|sample| sample.prompt), expected);
    }

    #[test]
    fn flipped_bits_in_parquet_are_an_error_or_other_text() {
        let dir = tempfile::tempdir().unwrap();
        let (good, bad) = (dir.path().join("good.parquet"), dir.path().join("bad.parquet"));
        let samples: Vec<_> =
            (0..40).map(|index| sample(&format!("s{index}"), Prompt::question(format!("{index}+1?")))).collect();
        write(&good, &samples).unwrap();
        let bytes = std::fs::read(&good).unwrap();
        let mut refused = 0;
        for position in (0..bytes.len()).step_by(3) {
            let mut bytes = bytes.clone();
            bytes[position] ^= 0x55;
            std::fs::write(&bad, &bytes).unwrap();
            refused += usize::from(read(&bad).is_err_and(|error| error.exit_code() == 2));
        }
        assert!(refused > 30, "{refused}");
        std::fs::write(&bad, "PAR1 half").unwrap();
        assert!(read(&bad).unwrap_err().to_string().contains("complete Parquet"));
    }
}
