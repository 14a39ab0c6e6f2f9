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
