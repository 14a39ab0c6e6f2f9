//! Chat templates against what `transformers` rendered (tests/fixtures/record-chat-templates).

use std::path::{Path, PathBuf};

use cllm_core::chat_template::{ChatTemplate, Conversation, Message, Rendering};
use cllm_core::prompt_set::Prompt;
use cllm_core::tokenizer::{self, Tokenizer};
use serde_json::{Map, Value, json};

#[test]
fn every_conversation_renders_as_transformers_recorded_it() {
    let recorded: Value = serde_json::from_str(include_str!("../fixtures/text/chat-templates.json")).unwrap();
    let cases = recorded["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 48);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let source = recorded["templates"][name].as_str().unwrap();
        let template = ChatTemplate::new(source).unwrap();
        let messages = &case["messages"];
        let values = json!({
            "messages": messages, "add_generation_prompt": case["add_generation_prompt"], "tools": null,
            "documents": null, "bos_token": "<s>", "eos_token": "</s>",
        });
        let rendered = template.render(values.as_object().unwrap(), "2026-11-28".parse().unwrap());
        match case["refused"].as_str() {
            Some(reason) => {
                let message = rendered.unwrap_err().to_string();
                assert!(message.contains(reason), "{name}: {message}");
            }
            None => assert_eq!(rendered.unwrap(), case["text"].as_str().unwrap(), "{name}: {messages:?}"),
        }
    }
}

#[test]
fn expressions_and_statements_give_what_jinja_gives() {
    let recorded: Value = serde_json::from_str(include_str!("../fixtures/text/jinja.json")).unwrap();
    let cases = recorded["cases"].as_array().unwrap();
    assert!(cases.len() > 600, "{}", cases.len());
    for case in cases {
        let source = case["template"].as_str().unwrap();
        let template = ChatTemplate::new(source);
        let date = "2026-11-28".parse().unwrap();
        let rendered = template.and_then(|template| template.render(recorded["context"].as_object().unwrap(), date));
        match case["text"].as_str() {
            Some(text) => assert_eq!(rendered.as_deref().map_err(ToString::to_string), Ok(text), "{source}"),
            None => assert!(rendered.is_err(), "{source} gives {rendered:?}"),
        }
    }
}

/// The tokenizer of a small thinking model (tests/fixtures/record-thinking).
fn thinking_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/thinking")
}

fn recorded_thinking() -> Value {
    serde_json::from_str(include_str!("../fixtures/thinking/recorded.json")).unwrap()
}

fn rendering(kwargs: &Value, template: Option<&Value>) -> Rendering {
    Rendering {
        chat_template_kwargs: kwargs.as_object().unwrap().clone(),
        chat_template: template.map(|template| template.as_str().unwrap().to_owned()),
        ..Rendering::on("2026-11-28".parse().unwrap())
    }
}

#[test]
fn variables_of_the_settings_and_of_rows_render_as_transformers_recorded_it() {
    for case in recorded_thinking()["prompts"].as_array().unwrap() {
        let of_row: Conversation = serde_json::from_value(case.clone()).unwrap();
        let of_settings = Conversation { chat_template_kwargs: Map::new(), ..of_row.clone() };
        let given = rendering(&case["chat_template_kwargs"], None);
        let other = rendering(&json!({ "enable_thinking": "of the settings" }), None);
        for (conversation, rendering) in [(of_settings, &given), (of_row, &Rendering::on(given.date))] {
            let tokenizer = Tokenizer::load_for(&thinking_folder(), rendering).unwrap();
            let (text, ids) = tokenizer.encode_prompt(&Prompt::Conversation(conversation)).unwrap();
            assert_eq!((text.as_str(), json!(ids)), (case["text"].as_str().unwrap(), case["ids"].clone()), "{case}");
        }
        // What a row says wins.
        if case["chat_template_kwargs"].get("enable_thinking").is_some() {
            let tokenizer = Tokenizer::load_for(&thinking_folder(), &other).unwrap();
            let conversation = serde_json::from_value(case.clone()).unwrap();
            assert_eq!(tokenizer.encode_prompt(&Prompt::Conversation(conversation)).unwrap().0, case["text"]);
        }
    }
}

#[test]
fn the_tools_of_a_row_win_over_those_of_the_settings() {
    let template = json!("{{ tools | tojson }}");
    let tokenizer = Tokenizer::load_for(&thinking_folder(), &rendering(&json!({ "tools": ["S"] }), Some(&template)));
    let tokenizer = tokenizer.unwrap();
    let render = |tools: &[Value]| {
        let conversation = Conversation { tools: tools.to_vec(), ..vec![Message::new("user", "Hi")].into() };
        tokenizer.encode_prompt(&Prompt::Conversation(conversation)).unwrap().0
    };
    assert_eq!([render(&[]), render(&[json!("R")])], [r#"["S"]"#, r#"["R"]"#]);
}

/// Compares what is learnt of each turn with the records; a turn that they lack must be refused.
fn check_turns(cases: &Value, template: Option<&Value>) {
    for case in cases.as_array().unwrap() {
        let rendering = rendering(&case["chat_template_kwargs"], template);
        let tokenizer = Tokenizer::load_for(&thinking_folder(), &rendering).unwrap();
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let indices = (0..messages.len()).filter(|&index| messages[index].role == "assistant");
        for (index, recorded) in indices.zip(case["turns"].as_array().unwrap()) {
            let turn = tokenizer.encode_turn(&messages[..index].to_vec().into(), &messages[index]);
            match (turn, recorded) {
                (Err(error), Value::Null) => {
                    let message = error.to_string();
                    assert!(message.contains(r#"the prompt has "\n</think>"#), "{message}");
                }
                (Err(error), _) => panic!("{error}: {case}"),
                (Ok(turn), _) => {
                    let expected = (&recorded["prompt_ids"], &recorded["target_ids"]);
                    assert_eq!((&json!(turn.prompt_ids), &json!(turn.target_ids)), expected, "{case}");
                }
            }
        }
    }
}

#[test]
fn the_target_of_a_turn_is_what_the_template_adds_to_its_prompt() {
    let recorded = recorded_thinking();
    check_turns(&recorded["turns"], None);
    for (name, ends) in recorded["ends"].as_object().unwrap() {
        assert_eq!(ends["cases"].as_array().unwrap().len(), 8, "{name}");
        check_turns(&ends["cases"], Some(&ends["template"]));
    }
}

#[test]
fn special_tokens_are_those_of_transformers() {
    let names =
        ["bos", "eos", "unk", "sep", "pad", "cls", "mask", "image", "audio"].map(|name| format!("{name}_token"));
    let template: String =
        names.iter().map(|name| format!("{name}={{{{ {name} if {name} is defined else 'undefined' }}}};")).collect();
    for case in recorded_thinking()["special_tokens"].as_array().unwrap() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(thinking_folder().join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), case["config"].to_string()).unwrap();
        if !case["special_tokens_map"].is_null() {
            std::fs::write(dir.path().join("special_tokens_map.json"), case["special_tokens_map"].to_string()).unwrap();
        }
        std::fs::write(dir.path().join("chat_template.jinja"), &template).unwrap();
        let (text, _) = Tokenizer::load(dir.path()).unwrap().encode_prompt(&Prompt::question("x")).unwrap();
        let value = |name: &String| case["tokens"][name].as_str().unwrap_or("undefined").to_owned();
        let expected: String = names.iter().map(|name| format!("{name}={};", value(name))).collect();
        assert_eq!(text, expected, "{case}");
    }
}

#[test]
fn named_templates_are_picked_as_transformers_picks_them() {
    let with_tools =
        |tools: Vec<Value>| Prompt::Conversation(Conversation { tools, ..vec![Message::new("user", "x")].into() });
    let render =
        |folder: &Path, tools| Tokenizer::load(folder).unwrap().encode_prompt(&with_tools(tools)).map(|(text, _)| text);
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path();
    std::fs::copy(thinking_folder().join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    let config = |template: Value| {
        std::fs::write(folder.join("tokenizer_config.json"), json!({ "chat_template": template }).to_string()).unwrap();
    };
    let named = |name: &str, template: &str| json!({ "name": name, "template": template });
    config(json!([named("default", "plain"), named("tool_use", "{{ tools | length }} tools"), named("rag", "rag")]));
    assert_eq!(render(folder, vec![]).unwrap(), "plain");
    assert_eq!(render(folder, vec![json!({})]).unwrap(), "1 tools");
    config(json!([named("rag", "rag")]));
    let message = render(folder, vec![]).unwrap_err().to_string();
    assert!(message.contains("no chat template named `default`, only rag"), "{message}");
    // Files win over the configuration.
    std::fs::create_dir(folder.join("chat_templates")).unwrap();
    std::fs::write(folder.join("chat_templates/tool_use.jinja"), "of the folder").unwrap();
    std::fs::write(folder.join("chat_template.jinja"), "of the file").unwrap();
    assert_eq!(render(folder, vec![]).unwrap(), "of the file");
    assert_eq!(render(folder, vec![json!({})]).unwrap(), "of the folder");
    // A copy of the tokenizer renders alike; a template that replaces all of them stays alone.
    let copy = tempfile::tempdir().unwrap();
    tokenizer::copy_files(folder, copy.path()).unwrap();
    assert_eq!(render(copy.path(), vec![json!({})]).unwrap(), "of the folder");
    tokenizer::write_chat_template(copy.path(), "mine").unwrap();
    assert_eq!([vec![], vec![json!({})]].map(|tools| render(copy.path(), tools).unwrap()), ["mine", "mine"]);
    // A model without a template says what to do.
    std::fs::remove_dir_all(folder.join("chat_templates")).unwrap();
    std::fs::remove_file(folder.join("chat_template.jinja")).unwrap();
    config(Value::Null);
    assert!(render(folder, vec![]).unwrap_err().to_string().contains("set chat_template=FILE"));
    let rendering = rendering(&json!({}), Some(&json!("{{ messages[0].content }}!")));
    let tokenizer = Tokenizer::load_for(folder, &rendering).unwrap();
    assert_eq!(tokenizer.encode_prompt(&with_tools(vec![])).unwrap().0, "x!");
}
