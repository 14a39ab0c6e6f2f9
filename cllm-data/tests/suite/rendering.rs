//! How collections render prompts: one date, and the variables and template of the settings. The
//! teacher is a small thinking model (cllm-core/tests/fixtures/record-thinking).

use std::fs;
use std::path::Path;

use cllm_core::chat_template::{Date, RenderSettings};
use cllm_core::{Result, checkpoint};
use cllm_data::collect::{Settings, collect_on};
use serde_json::{Value, json};

use crate::fixtures::{DATA, rows, shards};

/// Settings of a collection over six questions that ask for the date, in shards of 2.
fn settings(folder: &Path, output: &str) -> Settings {
    let model = folder.join("model");
    if !model.exists() {
        let mut config = cllm_testing::families::shapes().into_iter().find(|(name, _)| *name == "qwen3").unwrap().1;
        config
            .as_object_mut()
            .unwrap()
            .extend([("vocab_size".to_owned(), json!(400)), ("max_position_embeddings".to_owned(), json!(512))]);
        fs::create_dir(&model).unwrap();
        checkpoint::save(&cllm_testing::families::random_model(&config, 5), &model, tch::Kind::Float).unwrap();
        let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cllm-core/tests/fixtures/thinking");
        for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            fs::copy(tokenizer.join(file), model.join(file)).unwrap();
        }
        let row = |index: usize| {
            let messages = json!([{ "role": "user", "content": format!("What is {index} and three?") }]);
            json!({ "id": index.to_string(), "messages": messages, "reference": "It is five.",
                    "chat_template_kwargs": { "show_date": true } })
        };
        let lines: String = (0..6).map(|index| format!("{}\n", row(index))).collect();
        fs::write(folder.join("prompts.jsonl"), lines).unwrap();
    }
    Settings {
        model: model.display().to_string(),
        prompts: folder.join("prompts.jsonl"),
        output: folder.join(output),
        n: 4,
        max_new_tokens: 6,
        rows_per_shard: 2,
        device: "cpu".to_owned(),
        ..Settings::default()
    }
}

fn day(text: &str) -> Date {
    text.parse().unwrap()
}

fn with(settings: &Settings, rendering: RenderSettings) -> Result<()> {
    collect_on(&Settings { rendering, ..settings.clone() }, day("2026-11-30")).map(drop)
}

#[test]
fn a_collection_that_is_resumed_the_next_day_keeps_its_date() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, stopped) = (settings(dir.path(), "whole"), settings(dir.path(), "stopped"));
    collect_on(&whole, day("2026-11-28")).unwrap();
    collect_on(&stopped, day("2026-11-28")).unwrap();
    // What a kill leaves: the first shard and a manifest that is not complete.
    let manifest_file = stopped.output.join("manifest.json");
    let mut manifest: Value = serde_json::from_slice(&fs::read(&manifest_file).unwrap()).unwrap();
    manifest["complete"] = false.into();
    fs::write(&manifest_file, manifest.to_string()).unwrap();
    for name in ["part-00001.parquet", "part-00002.parquet"] {
        fs::remove_file(stopped.output.join("data").join(name)).unwrap();
    }
    collect_on(&stopped, day("2026-11-29")).unwrap();
    let [whole_folder, folder] = [&whole, &stopped].map(|settings| settings.output.display().to_string());
    assert_eq!(shards(&whole_folder), shards(&folder));
    assert!(rows(&folder).iter().all(|row| row.prompt.contains("Today is 28 November 2026.")));
    let manifest: Value = serde_json::from_slice(&fs::read(manifest_file).unwrap()).unwrap();
    assert_eq!(manifest["provenance"]["date"], "2026-11-28");

    // The stored date may be named, another one not.
    let on = |date| RenderSettings { date: Some(day(date)), ..RenderSettings::default() };
    with(&stopped, on("2026-11-28")).unwrap();
    let message = with(&stopped, on("2026-11-29")).unwrap_err().to_string();
    assert!(message.contains(r#"was started with date=2026-11-28; this command says 2026-11-29"#), "{message}");
    // A new data set has the new day.
    let next = settings(dir.path(), "next");
    collect_on(&next, day("2026-11-29")).unwrap();
    assert!(rows(&next.output.display().to_string())[0].prompt.contains("Today is 29 November 2026."));
}

#[test]
fn a_date_that_the_template_does_not_print_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("own.jinja");
    fs::write(&file, "{{ messages[0].content }}").unwrap();
    let collected = |output: &str, on: &str, date: Option<&str>| {
        let mut settings = settings(dir.path(), output);
        settings.rendering =
            RenderSettings { chat_template: Some(file.clone()), date: date.map(day), ..Default::default() };
        collect_on(&settings, day(on)).unwrap();
        let manifest = fs::read(settings.output.join("manifest.json")).unwrap();
        (manifest, shards(&settings.output.display().to_string()))
    };
    let first = collected("first", "2026-11-28", None);
    assert_eq!(serde_json::from_slice::<Value>(&first.0).unwrap()["provenance"]["date"], Value::Null);
    assert_eq!(collected("next", "2026-11-29", None), first);
    assert_eq!(collected("set", "2026-11-29", Some("2020-01-01")), first);
    // The finished data set is the same with a date.
    assert_eq!(collected("first", "2026-11-29", Some("2020-01-01")), first);
}

#[test]
fn what_was_rendered_belongs_to_the_data_set() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = settings(dir.path(), "data");
    let no_thinking = json!({ "enable_thinking": false });
    first.rendering.chat_template_kwargs = no_thinking.as_object().unwrap().clone();
    collect_on(&first, day("2026-11-28")).unwrap();
    let collected = rows(&first.output.display().to_string());
    assert!(collected.iter().all(|row| row.prompt.ends_with("assistant\n<think>\n\n</think>\n\n")));
    // The reference as the template renders it after that prompt.
    let tokenizer = cllm_core::tokenizer::Tokenizer::load(Path::new(&first.model)).unwrap();
    let reference = tokenizer.encode("It is five.<|im_end|>").unwrap();
    assert!(collected.iter().all(|row| row.reference_ids.as_ref() == Some(&reference)));

    let message = with(&first, RenderSettings::default()).unwrap_err().to_string();
    let expected = r#"was started with chat_template_kwargs={enable_thinking: false}; this command says {}"#;
    assert!(message.contains(expected), "{message}");
    let file = dir.path().join("own.jinja");
    fs::write(&file, "{{ messages[0].content }}").unwrap();
    let message =
        with(&first, RenderSettings { chat_template: Some(file), ..first.rendering.clone() }).unwrap_err().to_string();
    assert!(message.contains("was rendered with another chat template"), "{message}");
}

#[test]
fn references_that_the_template_renders_otherwise_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let settings = settings(dir.path(), "data");
    let template = dir.path().join("template.jinja");
    fs::write(&template, "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ '?' if add_generation_prompt }}")
        .unwrap();
    let given = [
        format!("model={}", settings.model),
        format!("prompts={}", settings.prompts.display()),
        format!("output={}", settings.output.display()),
        format!("chat_template={}", template.display()),
    ];
    let mut arguments = vec!["collect", "n=4", "max_new_tokens=4", "device=cpu"];
    arguments.extend(given.iter().map(String::as_str));
    let said = DATA.succeed(&arguments).stderr;
    assert!(
        said.contains("6 references cannot be learned with consistency.labels=dataset; the first is `0`: "),
        "{said}"
    );
}

#[test]
fn a_prompt_that_the_template_rejects_is_named_with_the_template() {
    let dir = tempfile::tempdir().unwrap();
    let template = dir.path().join("strict.jinja");
    let check = "{% if 'three' in messages[0].content and '4' in messages[0].content %}";
    fs::write(&template, format!("Q\n{check}{{{{ raise_exception('no fours') }}}}{{% endif %}}A")).unwrap();
    let settings = settings(dir.path(), "a");
    let rendering = RenderSettings { chat_template: Some(template.clone()), ..Default::default() };
    let message = collect_on(&Settings { rendering, ..settings }, day("2026-11-28")).err().unwrap().to_string();
    let expected = format!(
        "{}: row `4`: {}: the chat template rejects the conversation (line 2): no fours",
        dir.path().join("prompts.jsonl").display(),
        template.display()
    );
    assert_eq!(message, expected);
}
