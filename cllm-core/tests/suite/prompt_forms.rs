//! Prompt files in the forms and formats that people have them in: each row gives the same samples
//! from JSON Lines, a JSON list and Parquet.

use std::fs::File;
use std::io::{BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{ArrayRef, FixedSizeBinaryArray, Float32Array, Float64Array, RecordBatch, StringArray};
use arrow::json::ReaderBuilder;
use arrow::json::reader::infer_json_schema;
use cllm_core::chat_template::{Conversation, Message};
use cllm_core::prompt_set::{self, FieldMap, Prompt, ReadOptions, Sample, Turns};
use parquet::arrow::ArrowWriter;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Writes rows in each format. Parquet has the columns that arrow infers from them.
fn files(dir: &TempDir, rows: &[Value]) -> Vec<PathBuf> {
    let path = |name: &str| dir.path().join(name);
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(path("rows.jsonl"), &lines).unwrap();
    std::fs::write(path("lines.json"), &lines).unwrap();
    std::fs::write(path("list.json"), json!(rows).to_string()).unwrap();
    write_parquet(&path("rows.parquet"), &lines);
    ["rows.jsonl", "lines.json", "list.json", "rows.parquet"].map(path).to_vec()
}

fn write_parquet(path: &Path, lines: &str) {
    let (schema, _) = infer_json_schema(BufReader::new(lines.as_bytes()), None).unwrap();
    let schema = Arc::new(schema);
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), schema.clone(), None).unwrap();
    for batch in ReaderBuilder::new(schema).build(BufReader::new(lines.as_bytes())).unwrap() {
        writer.write(&batch.unwrap()).unwrap();
    }
    writer.close().unwrap();
}

/// Reads rows from each format, which must agree.
#[track_caller]
fn read_with(rows: &[Value], options: &ReadOptions) -> cllm_core::Result<Vec<Sample>> {
    let dir = tempfile::tempdir().unwrap();
    let mut results: Vec<_> = files(&dir, rows)
        .into_iter()
        .map(|path| prompt_set::read_with(&path, options).map(|set| set.samples))
        .collect();
    let first = results.remove(0);
    for result in results {
        match (&first, result) {
            (Ok(expected), Ok(samples)) => assert_eq!(*expected, samples),
            (Err(_), Err(error)) => assert_eq!(error.exit_code(), 2),
            (expected, result) => panic!("{expected:?} is not {result:?}"),
        }
    }
    first
}

#[track_caller]
fn read(row: Value) -> Sample {
    let mut samples = read_with(&[row], &ReadOptions::default()).unwrap();
    assert_eq!(samples.len(), 1);
    samples.remove(0)
}

/// The reason for which a row is set aside, as strict reading gives it.
#[track_caller]
fn reason(row: Value) -> String {
    let strict = ReadOptions { strict: true, ..ReadOptions::default() };
    let error = read_with(std::slice::from_ref(&row), &strict).unwrap_err().to_string();
    assert!(read_with(&[row], &ReadOptions::default()).unwrap_err().to_string().contains("none of 1 row"));
    error
}

fn chat(turns: &[(&str, &str)]) -> Prompt {
    let messages: Vec<Message> = turns.iter().map(|(role, content)| Message::new(*role, *content)).collect();
    Prompt::Conversation(messages.into())
}

fn message(role: &str, content: &str) -> Value {
    json!({ "role": role, "content": content })
}

fn in_parts(role: &str, texts: &[&str]) -> Value {
    let parts: Vec<Value> = texts.iter().map(|text| json!({ "type": "text", "text": text })).collect();
    json!({ "role": role, "content": parts })
}

#[test]
fn every_known_form_gives_its_prompt_and_its_reference() {
    let hi = || chat(&[("user", "Hi")]);
    let plain = |text: &str| Prompt::Text(text.to_owned());
    let (user, assistant) = (message("user", "Hi"), message("assistant", "Yo"));
    let from = |from: &str, value: &str| json!({ "from": from, "value": value });
    for (row, prompt) in [
        (json!({ "messages": [user, assistant] }), hi()),
        (json!({ "messages": [user], "reference": "Yo" }), hi()),
        (json!({ "messages": [user, assistant], "reference": "Yo" }), hi()),
        (json!({ "conversations": [from("human", "Hi"), from("gpt", "Yo")] }), hi()),
        (json!({ "conversations": [from("user", "Hi"), from("assistant", "Yo")] }), hi()),
        (json!({ "conversation": [user, assistant] }), hi()),
        (json!({ "messages": [from("Human", "Hi"), from("model", "Yo")] }), hi()),
        (
            json!({ "conversations": [from("system", "S"), from("human", "Hi"), from("bot", "Call"), from("tool", "T"), from("gpt", "Yo")] }),
            chat(&[("system", "S"), ("user", "Hi"), ("assistant", "Call"), ("tool", "T")]),
        ),
        (
            json!({ "system": "S", "conversations": [from("human", "Hi"), from("gpt", "Yo")] }),
            chat(&[("system", "S"), ("user", "Hi")]),
        ),
        (json!({ "system_prompt": "S", "question": "Hi", "response": "Yo" }), chat(&[("system", "S"), ("user", "Hi")])),
        (json!({ "prompt": "Hi", "completion": "Yo" }), plain("Hi")),
        (json!({ "prompt": "Hi", "response": "Yo" }), plain("Hi")),
        (json!({ "prompt": "Hi", "output": "Yo" }), plain("Hi")),
        (json!({ "prompt": "Hi", "answer": "Yo" }), plain("Hi")),
        (json!({ "prompt": "Hi", "reference": "Yo", "answer": "Yo" }), plain("Hi")),
        (json!({ "prompt": [user], "completion": [assistant] }), hi()),
        (json!({ "prompt": [user], "completion": "Yo" }), hi()),
        (json!({ "instruction": "Add", "input": "2 2", "output": "Yo" }), chat(&[("user", "Add\n2 2")])),
        (json!({ "instruction": "Hi", "input": "", "output": "Yo" }), hi()),
        (json!({ "instruction": "Sum up", "context": "Long.", "response": "Yo" }), chat(&[("user", "Sum up\nLong.")])),
        (json!({ "question": "Hi", "answer": "Yo" }), hi()),
        // Some sets repeat the first question in a field of its own.
        (json!({ "prompt": " Hi", "messages": [user, assistant] }), hi()),
        (
            json!({ "prompt": "A", "messages": [message("system", "S"), message("user", "A"), assistant, user, assistant] }),
            chat(&[("system", "S"), ("user", "A"), ("assistant", "Yo"), ("user", "Hi")]),
        ),
        (json!({ "messages": [in_parts("user", &["H", "i"]), in_parts("assistant", &["Yo"])] }), hi()),
        (json!({ "conversations": [in_parts("user", &["Hi"])], "answer": "Yo" }), hi()),
    ] {
        let sample = read(row.clone());
        assert_eq!((&sample.prompt, sample.reference.as_deref()), (&prompt, Some("Yo")), "{row}");
        assert_eq!((sample.id.as_str(), &sample.meta), ("jsonl-1", &None), "{row}");
    }
}

#[test]
fn a_conversation_that_ends_with_the_user_is_to_be_answered_as_it_is() {
    let turns = [("user", "Hi"), ("assistant", "Yo"), ("user", "And?")];
    let sample = read(json!({ "messages": turns.map(|(role, content)| message(role, content)) }));
    assert_eq!((sample.prompt, sample.reference), (chat(&turns), None));
}

#[test]
fn each_turn_of_a_conversation_can_be_a_prompt_of_its_own() {
    let turns = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "4")];
    let row = json!({ "id": "x", "messages": turns.map(|(role, content)| message(role, content)) });
    let last = read(row.clone());
    assert_eq!((last.id.as_str(), last.prompt, last.reference.as_deref()), ("x", chat(&turns[..3]), Some("4")));
    let all = ReadOptions { turns: Turns::All, ..ReadOptions::default() };
    let samples = read_with(&[row], &all).unwrap();
    let found: Vec<_> = samples.iter().map(|it| (it.id.as_str(), &it.prompt, it.reference.as_deref())).collect();
    assert_eq!(found, [("x#1", &chat(&turns[..1]), Some("2")), ("x#2", &chat(&turns[..3]), Some("4"))]);
    // A greeting answers nothing, and a last question has no reference.
    let turns = [("assistant", "Hello"), ("user", "1"), ("assistant", "2"), ("user", "3")];
    let row = json!({ "id": "y", "messages": turns.map(|(role, content)| message(role, content)) });
    let samples = read_with(&[row], &all).unwrap();
    let found: Vec<_> = samples.iter().map(|it| (it.id.as_str(), &it.prompt, it.reference.as_deref())).collect();
    assert_eq!(found, [("y#1", &chat(&turns[..2]), Some("2")), ("y#2", &chat(&turns), None)]);
    // A turn that calls a tool cannot be a reference, but others of its conversation can.
    let calls = json!([{ "function": { "name": "f" } }]);
    let row = json!({ "id": "z", "messages": [
        message("user", "1"), { "role": "assistant", "content": "", "tool_calls": calls }, message("tool", "2"),
        message("assistant", "3"),
    ] });
    let samples = read_with(&[row], &all).unwrap();
    let found: Vec<_> = samples.iter().map(|it| (it.id.as_str(), it.reference.as_deref())).collect();
    assert_eq!(found, [("z#1", Some("3"))]);
}

#[test]
fn references_that_are_numbers_or_booleans_become_text() {
    for (value, text) in [
        (json!(4), "4"),
        (json!(true), "true"),
        (json!(2.5), "2.5"),
        // pandas writes whole numbers so where another row has none.
        (json!(4.0), "4"),
        (json!(-0.5), "-0.5"),
        (json!(1e22), "1e+22"),
        (json!(-9007199254740993_i64), "-9007199254740993"),
    ] {
        assert_eq!(read(json!({ "prompt": "2+2?", "reference": value })).reference.as_deref(), Some(text));
    }
    assert_eq!(read(json!({ "id": 7, "prompt": "2+2?", "reference": null })).id, "7");
}

#[test]
fn integers_of_any_size_keep_their_digits() {
    let dir = tempfile::tempdir().unwrap();
    let rows = [1, 2].map(|last| {
        let number = format!("1{}{last}", "0".repeat(28));
        format!("{{\"id\": {number}, \"prompt\": \"Hi\", \"reference\": -{number}, \"level\": {number}}}")
    });
    for (name, text) in [("rows.jsonl", rows.join("\n")), ("rows.json", format!("[{}]", rows.join(",")))] {
        std::fs::write(dir.path().join(name), text).unwrap();
        let samples = prompt_set::read(&dir.path().join(name)).unwrap();
        let found: Vec<_> = samples.iter().map(|it| (it.id.clone(), it.reference.clone(), it.meta.clone())).collect();
        let expected = ["100000000000000000000000000001", "100000000000000000000000000002"]
            .map(|id| (id.to_owned(), Some(format!("-{id}")), Some(json!({ "level": id }))));
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn an_empty_answer_is_no_reference() {
    let user = message("user", "Hi");
    for row in [
        json!({ "prompt": "Hi", "reference": "" }),
        json!({ "question": "Hi", "answer": " \n" }),
        json!({ "messages": [user, message("assistant", "")] }),
        json!({ "prompt": [user], "completion": [message("assistant", "")] }),
    ] {
        assert_eq!(read(row.clone()).reference, None, "{row}");
    }
}

#[test]
fn files_are_what_they_hold_whatever_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let line = |text: &str| format!("{{\"prompt\": \"{text}\", \"meta\": \"[1]\"}}\n");
    let lines = line("a") + &line("b");
    let several = "{\n  \"prompt\": \"a\"\n}\n\n{\"prompt\": \"b\"}\n{\n\"prompt\":\n\"c\"} \n";
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    gzip.write_all(lines.as_bytes()).unwrap();
    write_parquet(&dir.path().join("rows"), &lines);
    let parquet = std::fs::read(dir.path().join("rows")).unwrap();
    for (name, bytes, texts) in [
        ("gzip.jsonl", gzip.finish().unwrap(), &["a", "b"][..]),
        ("plain.jsonl.gz", lines.clone().into_bytes(), &["a", "b"]),
        ("parquet.jsonl", parquet.clone(), &["a", "b"]),
        ("ROWS.PARQUET", parquet, &["a", "b"]),
        ("several.jsonl", several.into(), &["a", "b", "c"]),
        ("one.jsonl", "{\"prompt\":\n\"a\"}".into(), &["a"]),
        ("broken.jsonl", format!("{{\"prompt\": \n{several}").into(), &["a", "b", "c"]),
    ] {
        std::fs::write(dir.path().join(name), bytes).unwrap();
        let samples = prompt_set::read(&dir.path().join(name)).unwrap();
        let expected: Vec<_> = texts.iter().map(|text| Prompt::Text((*text).to_owned())).collect();
        let is_parquet = name.to_lowercase().starts_with("parquet") || name.starts_with("ROWS");
        let prompts: Vec<Prompt> = samples.iter().map(|sample| sample.prompt.clone()).collect();
        assert_eq!(prompts, expected, "{name}");
        assert!(!is_parquet || samples[0].meta == Some(json!([1])), "{name}");
    }
    for (name, text, parts) in [
        ("rows.csv", "prompt,reference\nHi,Yo\n", &["line 1 is not JSON", "JSON Lines, a JSON list or Parquet"][..]),
        (
            "columns.json",
            r#"{"prompt": {"0": "Hi", "1": "Ho"}, "answer": {"0": "a", "1": "b"}}"#,
            &["holds columns, not rows", "orient=\"records\""],
        ),
        ("lists.jsonl", "[1]\n[2]\n", &["line 1 is not an object", "found a list (and 1 row like it)"]),
    ] {
        std::fs::write(dir.path().join(name), text).unwrap();
        let error = prompt_set::read(&dir.path().join(name)).unwrap_err().to_string();
        assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    }
}

#[test]
fn fixed_bytes_and_infinite_numbers_in_parquet_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("rows.parquet");
    let uuid: Vec<u8> = (0..16).map(|byte| byte * 17).collect();
    let columns: [(&str, ArrayRef); 5] = [
        ("prompt", Arc::new(StringArray::from(vec!["a", "b", "c"]))),
        (
            "id",
            Arc::new(
                FixedSizeBinaryArray::try_from_iter([uuid.clone(), vec![7; 16], vec![8; 16]].into_iter()).unwrap(),
            ),
        ),
        ("word", Arc::new(FixedSizeBinaryArray::try_from_iter([*b"abc", *b"def", [0xff; 3]].into_iter()).unwrap())),
        ("reference", Arc::new(Float64Array::from(vec![Some(f64::INFINITY), Some(4.0), None]))),
        ("score", Arc::new(Float32Array::from(vec![f32::NEG_INFINITY, 0.1, f32::NAN]))),
    ];
    let batch = RecordBatch::try_from_iter(columns).unwrap();
    let mut writer = ArrowWriter::try_new(File::create(&path).unwrap(), batch.schema(), None).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    let samples = prompt_set::read(&path).unwrap();
    let ids: Vec<_> = samples.iter().map(|sample| sample.id.as_str()).collect();
    assert_eq!(ids[..2], ["00112233-4455-6677-8899-aabbccddeeff", "07070707-0707-0707-0707-070707070707"]);
    let references: Vec<_> = samples.iter().map(|sample| sample.reference.as_deref()).collect();
    assert_eq!(references, [Some("inf"), Some("4"), None]);
    let metas = samples.into_iter().map(|sample| sample.meta.unwrap_or_default());
    let expected = [json!({ "word": "abc", "score": "-inf" }), json!({ "word": "def", "score": 0.1 }), json!(null)];
    assert_eq!(metas.collect::<Vec<_>>(), expected);
}

#[test]
fn empty_fields_of_templates_beside_plain_text_mean_nothing() {
    for (name, value) in [
        ("system", json!("")),
        ("system_prompt", json!("")),
        ("tools", json!([])),
        ("tools", json!("[]")),
        ("chat_template_kwargs", json!("")),
    ] {
        let sample = read(json!({ "prompt": "Hi", name: value }));
        assert_eq!((sample.prompt, sample.meta), (Prompt::Text("Hi".into()), None), "{name}");
    }
}

#[test]
fn a_meta_of_plain_text_is_kept() {
    assert_eq!(read(json!({ "prompt": "Hi", "meta": "from a forum" })).meta, Some(json!("from a forum")));
}

#[test]
fn what_templates_read_is_kept() {
    let sample = read(json!({
        "messages": [
            { "role": "user", "content": "Hi", "name": "Ann" },
            { "role": "assistant", "content": "", "tool_calls": [{ "function": { "name": "f", "arguments": { "x": 1 } } }] },
            { "role": "tool", "content": "3", "tool_call_id": "a" },
            { "role": "assistant", "content": "Three.", "reasoning_content": "It says 3." },
        ],
        "tools": [{ "type": "function", "function": { "name": "f" } }],
        "chat_template_kwargs": { "enable_thinking": false },
    }));
    let expected: Conversation = serde_json::from_value(json!({
        "messages": [
            { "role": "user", "content": "Hi", "name": "Ann" },
            { "role": "assistant", "content": "", "tool_calls": [{ "function": { "name": "f", "arguments": { "x": 1 } } }] },
            { "role": "tool", "content": "3", "tool_call_id": "a" },
        ],
        "tools": [{ "type": "function", "function": { "name": "f" } }],
        "chat_template_kwargs": { "enable_thinking": false },
    }))
    .unwrap();
    assert_eq!(sample.prompt, Prompt::Conversation(expected));
    assert_eq!(sample.reference.as_deref(), Some("<think>\nIt says 3.\n</think>\n\nThree."));
    // Columns often hold lists and objects as JSON text.
    let as_text = read(
        json!({ "messages": "[{\"role\": \"user\", \"content\": \"Hi\"}]", "tools": "[1]", "chat_template_kwargs": "{}" }),
    );
    let Prompt::Conversation(conversation) = as_text.prompt else { panic!("a conversation expected") };
    assert_eq!((conversation.messages.len(), conversation.tools), (1, vec![json!(1)]));
}

#[test]
fn what_cannot_be_read_or_would_be_guessed_is_set_aside_with_its_reason() {
    let (user, assistant) = (message("user", "Hi"), message("assistant", "Yo"));
    let calls = json!([{ "function": { "name": "f" } }]);
    for (row, parts) in [
        (
            json!({ "messages": [user, { "role": "assistant", "content": null, "tool_calls": calls }, assistant] }),
            &["tool calls and no text", "message 2 has `tool_calls`"][..],
        ),
        (
            json!({ "messages": [user, { "role": "assistant", "content": null, "function_call": { "name": "f" } }, assistant] }),
            &["tool calls and no text", "message 2 has `function_call`"],
        ),
        (
            json!({ "conversations": [{ "from": "human", "value": "Hi" }, { "from": "function_call", "value": "{}" }] }),
            &["unknown role", "`function_call`: write it as the assistant's", "`tool_calls`"],
        ),
        (
            json!({ "messages": [user, { "role": "assistant", "content": "", "tool_calls": calls }] }),
            &["calls no tool"],
        ),
        (
            json!({ "messages": [user, { "role": "assistant", "content": null, "x": 1 }] }),
            &["message without text", "message 2"],
        ),
        (
            json!({ "messages": [{ "role": "user", "content": [{ "type": "image_url", "image_url": { "url": "u" } }] }] }),
            &["`image_url`", "message 1"],
        ),
        (json!({ "messages": [message("narrator", "Hi")] }), &["unknown role", "`narrator`"]),
        (json!({ "messages": [{ "content": "Hi" }] }), &["without a role"]),
        (json!({ "messages": [assistant] }), &["nothing before the assistant's turn"]),
        (json!({ "messages": [user, assistant, assistant] }), &["two turns of the assistant in a row"]),
        (json!({ "messages": [message("system", "S")] }), &["no messages to answer"]),
        (json!({ "messages": "Hi" }), &["text where JSON is needed"]),
        (
            json!({ "prompt": "Ho", "messages": [user, assistant] }),
            &["two prompts", "`messages` and `prompt`", "--map prompt=FIELD"],
        ),
        (json!({ "question": "Hi", "instruction": "Ho" }), &["two prompts"]),
        (
            json!({ "prompt": "Hi", "answer": "a", "response": "b" }),
            &["two references that differ", "`response` and `answer`"],
        ),
        (
            json!({ "messages": [user, assistant], "answer": "No" }),
            &["two references that differ", "`answer` beside it", "which is the reference of a conversation"],
        ),
        (json!({ "prompt": "Hi", "completion": [assistant] }), &["plain text and an answer of messages"]),
        (
            json!({ "system": "S", "prompt": "Hi" }),
            &["chat template reads beside a prompt of plain text", "`system`", "--map question=FIELD"],
        ),
        (json!({ "tools": [1], "prompt": "Hi" }), &["beside a prompt of plain text", "`tools`"]),
        (
            json!({ "chat_template_kwargs": { "x": 1 }, "prompt": "Hi" }),
            &["beside a prompt of plain text", "`chat_template_kwargs`"],
        ),
        (
            json!({ "messages": [user], "chat_template_kwargs": { "messages": [] } }),
            &["chat_template_kwargs that no row may set", "`messages` comes from the row"],
        ),
        // One of them would have to be chosen, or the two glued together.
        (
            json!({ "question": "When?", "answer": ["1972", "72"] }),
            &["reference that is not text", "`answer` has a list"],
        ),
        (json!({ "prompt": ["q1", "q2"] }), &["prompt that is not text", "`prompt` has a list that holds text"]),
        (json!({ "messages": [{ "role": "user", "content": ["a", "b"] }] }), &["not text", "a list that holds text"]),
        (json!({ "instruction": "Hi", "history": [["a", "b"]] }), &["`history` beside its question"]),
        (
            json!({ "prompt": "Hi", "answer": { "text": "Yo" } }),
            &["reference that is not text", "`answer` has an object"],
        ),
        (
            json!({ "query": "Hi", "solution": "Yo" }),
            &["no known form", "query, solution", "`instruction`", "--map prompt=FIELD,reference=FIELD"],
        ),
    ] {
        let reason = reason(row.clone());
        for part in parts {
            assert!(reason.contains(part), "{row}: `{part}` is not in: {reason}");
        }
    }
}

#[test]
fn a_map_names_the_fields_of_other_forms_and_settles_conflicts() {
    let read = |row: Value, map: &str| {
        let fields: FieldMap = map.parse().unwrap();
        read_with(&[row], &ReadOptions { fields, ..ReadOptions::default() }).map(|mut samples| samples.remove(0))
    };
    let row = || json!({ "key": 3, "origin": "mine", "query": "Hi", "solution": "Yo", "level": 2 });
    let sample = read(row(), "prompt=query,reference=solution,id=key,source=origin").unwrap();
    assert_eq!((sample.id.as_str(), sample.source.as_str(), sample.reference.as_deref()), ("3", "mine", Some("Yo")));
    assert_eq!((sample.prompt, sample.meta), (Prompt::Text("Hi".into()), Some(json!({ "level": 2 }))));
    assert_eq!(read(row(), "question=query").unwrap().prompt, chat(&[("user", "Hi")]));
    assert!(read(row(), "question=query,reference=none").is_err());
    let messages = json!([message("user", "Hi"), message("assistant", "Yo")]);
    let sample =
        read(json!({ "prompt": "Hi", "prompt_id": "p", "messages": messages }), "messages=messages,id=prompt_id")
            .unwrap();
    assert_eq!((sample.prompt, sample.reference.as_deref()), (chat(&[("user", "Hi")]), Some("Yo")));
    assert_eq!((sample.id.as_str(), sample.meta), ("p", Some(json!({ "prompt": "Hi" }))));
    let sample = read(json!({ "question": "Hi", "answer": "long", "response": "Yo" }), "reference=response").unwrap();
    assert_eq!((sample.reference.as_deref(), sample.meta), (Some("Yo"), Some(json!({ "answer": "long" }))));
}

#[test]
fn marks_broken_characters_and_bad_lines_cost_no_other_row() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let prompts = |name: &str| -> Vec<Prompt> {
        prompt_set::read(&path(name)).unwrap().into_iter().map(|sample| sample.prompt).collect()
    };
    let plain = |text: &str| Prompt::Text(text.to_owned());
    for (name, text) in [
        ("a.jsonl", "\u{feff}{\"prompt\": \"Hi\"}\n"),
        ("a.json", "\u{feff}[{\"prompt\": \"Hi\"}]"),
        ("b.json", "{\n  \"prompt\": \"Hi\"\n}\n"),
    ] {
        std::fs::write(path(name), text).unwrap();
        assert_eq!(prompts(name), [plain("Hi")], "{name}");
    }
    write_parquet(&path("a.parquet"), "{\"\u{feff}prompt\": \"\u{feff}Hi\"}\n");
    assert_eq!(prompts("a.parquet"), [plain("Hi")]);
    let halves = "{\"prompt\": \"Hi \\ud83d there\", \"reference\": \"x\"}\n{\"prompt\": \"\\ud83d\\ude00\"}\n";
    let list = format!("[{}]", halves.trim().replace('\n', ","));
    for (name, text) in [("halves.jsonl", halves), ("halves.json", &list)] {
        std::fs::write(path(name), text).unwrap();
        assert_eq!(prompts(name), [plain("Hi \u{fffd} there"), plain("\u{1f600}")], "{name}");
    }
    std::fs::write(
        path("bad.jsonl"),
        b"{\"prompt\": \"a\"}\n{\"prompt\": \"\xfc\"}\n{\"prompt\": \n\n{\"prompt\": \"b\"}\r\n",
    )
    .unwrap();
    assert_eq!(prompts("bad.jsonl"), [plain("a"), plain("b")]);
    let strict = ReadOptions { strict: true, ..ReadOptions::default() };
    let error = prompt_set::read_with(&path("bad.jsonl"), &strict).unwrap_err().to_string();
    assert!(error.contains("bad.jsonl: line 2 is not UTF-8"), "{error}");
    std::fs::write(path("wide.jsonl"), b"\xff\xfe{\0").unwrap();
    assert!(prompt_set::read(&path("wide.jsonl")).unwrap_err().to_string().contains("UTF-16"));
}

#[test]
fn parquet_of_every_writer_and_codec_is_read() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/prompt-files");
    let mut num_files = 0;
    for entry in folder.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "parquet") {
            continue;
        }
        num_files += 1;
        let samples = prompt_set::read(&path).unwrap();
        let name = path.display();
        assert_eq!(samples.iter().map(|sample| sample.id.as_str()).collect::<Vec<_>>(), ["10", "11"], "{name}");
        assert_eq!(samples[0].prompt, chat(&[("system", "Be brief."), ("user", "2+2?")]), "{name}");
        assert_eq!(samples[1].prompt, chat(&[("user", "Grüße 😀?")]), "{name}");
        let references: Vec<_> = samples.iter().map(|sample| sample.reference.as_deref().unwrap()).collect();
        assert_eq!(references, ["4", "Hallo."], "{name}");
        let meta = json!({ "level": "easy", "score": 0.5, "checked": true, "price": "1.50", "day": "2024-02-29" });
        assert_eq!(samples[0].meta, Some(meta), "{name}");
        let meta = json!({ "level": "hard", "score": 1.0, "checked": false, "price": "20.00", "day": "1999-12-31" });
        assert_eq!(samples[1].meta, Some(meta), "{name}");
    }
    assert!(num_files >= 20, "{num_files}");
}

#[test]
fn columns_of_types_that_json_lacks_become_text_and_cost_no_row() {
    let types = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/prompt-files/types");
    let read = |name: &str| prompt_set::read(&types.join(name)).unwrap().remove(0);
    let sample = read("duckdb.parquet");
    assert_eq!((sample.prompt, sample.reference.as_deref()), (Prompt::Text("Hi".into()), Some("4")));
    let meta = json!({
        "zoned": "2024-02-29T08:00:00Z", "plain": "2024-02-29T10:00:00", "clock": "10:00:01", "span": "3 days",
        "text_bytes": "abc", "by_number": "{1: x}", "by_name": { "a": 1 }, "pair": [1, null], "exact": "1.1000000000",
    });
    assert_eq!(sample.meta, Some(meta));
    let sample = read("pandas.parquet");
    assert_eq!(
        (sample.reference.as_deref(), sample.meta),
        (Some("4"), Some(json!({ "zoned": "2024-02-29T09:00:00Z" })))
    );
    let sample = read("polars.parquet");
    let meta = json!({ "clock": "01:02:03", "bytes": "abc" });
    assert_eq!((sample.reference.as_deref(), sample.meta), (Some("true"), Some(meta)));
}

mod needs_data {
    use super::*;

    #[test]
    #[ignore = "needs the benchmarks' data: scripts/test --data DIR"]
    fn every_row_of_dolly_is_a_question_with_its_reference() {
        let samples = prompt_set::read(&cllm_testing::benchmark_data("instructions/dolly-4000.jsonl")).unwrap();
        assert_eq!(samples.len(), 4000);
        let is_question =
            |sample: &Sample| matches!(&sample.prompt, Prompt::Conversation(it) if it.messages.len() == 1);
        assert!(samples.iter().all(|sample| is_question(sample) && sample.reference.is_some()));
    }
}
