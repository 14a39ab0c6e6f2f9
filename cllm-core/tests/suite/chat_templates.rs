//! Chat templates against what `transformers` rendered (tests/fixtures/record-chat-templates).

use cllm_core::chat_template::ChatTemplate;
use serde_json::{Value, json};

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
