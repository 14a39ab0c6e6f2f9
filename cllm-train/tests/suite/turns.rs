//! The turns that supervised fine-tuning teaches, against what `transformers` recorded for a small
//! thinking model (cllm-core/tests/fixtures/record-thinking).

use std::path::Path;

use cllm_core::Result;
use cllm_core::chat_template::{Conversation, Message, Rendering};
use cllm_core::model::ModelConfig;
use cllm_core::prompt_set::{self, Prompt, Sample, Turns};
use cllm_core::tokenizer::Tokenizer;
use cllm_train::data::dataset::{self, Example};
use cllm_train::settings::{Objective, Settings};
use serde_json::{Value, json};

fn recorded() -> Value {
    serde_json::from_str(include_str!("../../../cllm-core/tests/fixtures/thinking/recorded.json")).unwrap()
}

/// The examples of one conversation, whose last message is the reference if it is the assistant's.
fn examples(case: &Value, template: Option<&Value>, turns: Turns) -> Result<Vec<Example>> {
    let mut messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
    let reference = messages.pop_if(|message| message.role == "assistant").map(|message| message.content);
    let rendering = Rendering {
        chat_template: template.map(|template| template.as_str().unwrap().to_owned()),
        ..Rendering::on("2026-11-28".parse().unwrap())
    };
    let kwargs = case["chat_template_kwargs"].as_object().cloned().unwrap_or_default();
    let sample = Sample {
        id: "a".into(),
        source: "jsonl/train".into(),
        prompt: Prompt::Conversation(Conversation { chat_template_kwargs: kwargs, ..messages.into() }),
        reference,
        meta: None,
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("prompts.jsonl");
    prompt_set::write(&path, &[sample]).unwrap();
    let mut settings = Settings { objective: Objective::Sft, datasets: vec![path], ..Settings::default() };
    settings.sft.turns = turns;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cllm-core/tests/fixtures/thinking");
    let config = json!({ "model_type": "llama", "vocab_size": 400, "hidden_size": 8, "intermediate_size": 8,
                         "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512 });
    let tokenizer = Tokenizer::load_for(&folder, &rendering).unwrap();
    dataset::read(&settings, &tokenizer, &ModelConfig::from_json(&config).unwrap())
}

#[test]
fn the_loss_covers_the_tokens_that_transformers_masks() {
    let masked = &recorded()["masked"];
    for case in masked["cases"].as_array().unwrap() {
        let examples = examples(case, Some(&masked["template"]), Turns::All).unwrap();
        let [example] = &examples[..] else { panic!("{} examples", examples.len()) };
        let ids = [&example.prompt_ids[..], &example.response_ids].concat();
        let mut mask = vec![false; example.prompt_ids.len()];
        mask.extend(&example.labelled);
        // After the last turn, the template writes a line end that nothing teaches.
        let expected: Vec<bool> = case["mask"].as_array().unwrap().iter().map(|bit| *bit == 1).collect();
        assert_eq!(json!(ids), json!(case["ids"].as_array().unwrap()[..ids.len()]));
        assert_eq!(mask, expected[..ids.len()]);
        assert!(!expected[ids.len()..].contains(&true));
    }
}

#[test]
fn turns_whose_thoughts_are_dropped_later_are_examples_of_their_own() {
    for case in recorded()["turns"].as_array().unwrap() {
        let turns = case["turns"].as_array().unwrap();
        let all = examples(case, None, Turns::All);
        let last = examples(case, None, Turns::Last);
        let is_refused = |turns: &[Value]| turns.iter().any(Value::is_null);
        assert_eq!((all.is_err(), last.is_err()), (is_refused(turns), is_refused(&turns[turns.len() - 1..])), "{case}");
        if let Err(error) = all.as_ref() {
            let message = error.to_string();
            assert!(message.contains("prompts.jsonl: row `a`: "), "{message}");
            continue;
        }
        let (all, last) = (all.unwrap(), last.unwrap());
        let learned =
            |example: &Example| json!({ "prompt_ids": example.prompt_ids, "target_ids": example.response_ids });
        assert_eq!(all.iter().map(learned).collect::<Vec<_>>(), *turns, "{case}");
        assert_eq!(last.iter().map(learned).collect::<Vec<_>>(), turns[turns.len() - 1..], "{case}");
        assert!(all.iter().all(|example| !example.labelled.contains(&false)));
        assert_eq!(all.last().unwrap().id, "a");
    }
}

#[test]
fn a_conversation_that_ends_with_the_user_teaches_the_turns_before() {
    let masked = &recorded()["masked"];
    for case in masked["cases"].as_array().unwrap() {
        let mut open = case.clone();
        open["messages"].as_array_mut().unwrap().push(json!({ "role": "user", "content": "And?" }));
        let taught = examples(&open, Some(&masked["template"]), Turns::All).unwrap();
        assert_eq!(taught, examples(case, Some(&masked["template"]), Turns::All).unwrap());
        assert!(examples(&open, Some(&masked["template"]), Turns::Last).is_err());
    }
}
