//! Chat templates against what `transformers` rendered (tests/fixtures/record-chat-templates).

use cllm_core::chat_template::{ChatTemplate, Message};
use serde_json::Value;

#[test]
fn every_conversation_renders_as_transformers_recorded_it() {
    let recorded: Value = serde_json::from_str(include_str!("../fixtures/text/chat-templates.json")).unwrap();
    let cases = recorded["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 48);
    for case in cases {
        let name = case["template"].as_str().unwrap();
        let source = recorded["templates"][name].as_str().unwrap();
        let template = ChatTemplate::new(source, "<s>", "</s>").unwrap();
        let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
        let rendered = template.render(&messages, case["add_generation_prompt"].as_bool().unwrap());
        match case["refused"].as_str() {
            Some(reason) => {
                let message = rendered.unwrap_err().to_string();
                assert!(message.contains(reason), "{name}: {message}");
            }
            None => assert_eq!(rendered.unwrap(), case["text"].as_str().unwrap(), "{name}: {messages:?}"),
        }
    }
}
