//! Tokenizers like those of Llama 2, Vicuna, Mistral, DeepSeek-Coder, Qwen and SmolLM give the ids
//! and the texts that `transformers` gives (tests/fixtures/record-tokenizers).

use std::path::{Path, PathBuf};

use cllm_core::prompt_set::Prompt;
use cllm_core::tokenizer::Tokenizer;
use serde::Deserialize;
use serde_json::{Value, json};

#[derive(Deserialize)]
struct Fixture {
    texts: Vec<Text>,
    /// Ids that were not encoded from a text.
    noise: Vec<Ids>,
    /// A prompt, a text that follows it, and the ids that the text adds to the prompt's, or null
    /// where the text changes those.
    targets: Vec<(String, String, Option<Vec<i32>>)>,
}

#[derive(Deserialize)]
struct Text {
    text: String,
    /// With the special tokens around a prompt.
    prompt_ids: Vec<i32>,
    #[serde(flatten)]
    ids: Ids,
}

#[derive(Deserialize)]
struct Ids {
    ids: Vec<i32>,
    /// What the ids from each position on add to the text of those before them.
    continuations: Vec<String>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers")
}

/// The name, the tokenizer and the recorded behaviour of each.
fn fixtures() -> Vec<(String, Tokenizer, Fixture)> {
    let folders: Vec<PathBuf> = std::fs::read_dir(folder()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(folders.len() >= 11, "{folders:?}");
    let load = |folder: PathBuf| {
        let fixture = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        (name, Tokenizer::load(&folder).unwrap(), fixture)
    };
    folders.into_iter().map(load).collect()
}

#[test]
fn texts_become_the_ids_of_transformers() {
    for (name, tokenizer, fixture) in fixtures() {
        for Text { text, prompt_ids, ids } in &fixture.texts {
            assert_eq!(tokenizer.encode(text).unwrap(), ids.ids, "{name}: {text:?}");
            let (_, encoded) = tokenizer.encode_prompt(&Prompt::Text(text.clone())).unwrap();
            assert_eq!(encoded, *prompt_ids, "{name}: {text:?} with special tokens");
        }
    }
}

#[test]
fn an_answer_is_decoded_as_what_it_adds_to_its_prompt() {
    for (name, tokenizer, fixture) in fixtures() {
        for Ids { ids, continuations } in fixture.texts.iter().map(|text| &text.ids).chain(&fixture.noise) {
            for (split, expected) in continuations.iter().enumerate() {
                let (prompt, answer) = ids.split_at(split);
                let case = format!("{name}: {ids:?} from {split}");
                assert_eq!(tokenizer.decode_answer(prompt, answer).unwrap(), *expected, "{case}");
                let mut stream = tokenizer.decode_stream(prompt).unwrap();
                let streamed: String = answer.iter().map(|&id| stream.push(&[id]).unwrap()).collect();
                assert_eq!(streamed + &stream.finish().unwrap(), *expected, "{case}, streamed");
            }
            assert_eq!(tokenizer.decode(ids).unwrap(), continuations[0], "{name}: {ids:?}");
        }
    }
}

/// The ids of a target without those that end a turn.
fn encode_target(tokenizer: &Tokenizer, target: &str) -> Vec<i32> {
    let mut ids = tokenizer.encode_target(target).unwrap();
    ids.truncate(ids.len() - tokenizer.encode_target("").unwrap().len());
    ids
}

#[test]
fn a_target_has_the_ids_that_it_adds_to_those_of_its_prompt() {
    for (name, tokenizer, fixture) in fixtures() {
        for (prompt, target, expected) in &fixture.targets {
            let ids = encode_target(&tokenizer, target);
            let case = format!("{name}: {target:?} after {prompt:?}");
            match expected {
                Some(expected) => assert_eq!(ids, *expected, "{case}"),
                // The prompt's ids would be others if the target were known; they are not.
                None => {
                    let prompt_ids = tokenizer.encode(prompt).unwrap();
                    assert_eq!(tokenizer.decode_answer(&prompt_ids, &ids).unwrap(), *target, "{case}");
                }
            }
        }
    }
}

#[test]
fn a_target_after_a_special_token_gets_no_blank() {
    for (name, tokenizer, _) in fixtures() {
        let prompt_ids = tokenizer.encode("Q: 1</s><|im_end|>").unwrap();
        for target in ["    return 1", "return 1"] {
            let ids = encode_target(&tokenizer, target);
            assert_eq!(tokenizer.decode_answer(&prompt_ids, &ids).unwrap(), target, "{name}");
        }
    }
}

#[test]
fn a_token_past_the_embedding_is_refused_only_where_a_text_has_it() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(folder().join("llama-2-padded").join(file), dir.path().join(file)).unwrap();
    }
    std::fs::write(dir.path().join("config.json"), json!({ "vocab_size": 444 }).to_string()).unwrap();
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 445);
    tokenizer.encode_prompt(&Prompt::Text("return 1".to_owned())).unwrap();
    for encode in [Tokenizer::encode, Tokenizer::encode_target] {
        let message = encode(&tokenizer, "a [PAD] b").unwrap_err().to_string();
        assert!(message.contains("`[PAD]` (id 444)") && message.contains("444 tokens only"), "{message}");
    }
    std::fs::write(dir.path().join("config.json"), json!({ "vocab_size": 443 }).to_string()).unwrap();
    let message = Tokenizer::load(dir.path()).err().unwrap().to_string();
    assert!(message.contains("ids up to 443") && message.contains("vocabulary of 443"), "{message}");
    let file = dir.path().join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_str(&std::fs::read_to_string(&file).unwrap()).unwrap();
    tokenizer["model"]["vocab"]["return"] = u32::MAX.into();
    std::fs::write(&file, tokenizer.to_string()).unwrap();
    let message = Tokenizer::load(dir.path()).err().unwrap().to_string();
    assert!(message.contains("tokenizer.json: has the token id 4294967295"), "{message}");
}

#[test]
fn what_tokenizer_config_adds_belongs_to_the_fingerprint() {
    let dir = tempfile::tempdir().unwrap();
    cllm_testing::train_tokenizer(["Tom has 3 apples."], 270, dir.path());
    let file = dir.path().join("tokenizer.json");
    let of_file = cllm_core::fingerprint::hash_files(&[&file]).unwrap();
    let with = |settings: Value| {
        std::fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
        Tokenizer::load(dir.path()).unwrap().fingerprint().to_owned()
    };
    let known: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let known = &known["added_tokens"][0];
    let described = json!({ (known["id"].to_string()): known });
    assert_eq!(with(json!({ "added_tokens_decoder": described, "eos_token": known["content"] })), of_file);
    let others =
        [json!({ "pad_token": "<pad>" }), json!({ "pad_token": "<fill>" }), json!({ "split_special_tokens": true })];
    let mut seen = vec![of_file];
    for settings in others {
        let fingerprint = with(settings.clone());
        assert!(!seen.contains(&fingerprint), "{settings}");
        seen.push(fingerprint);
    }
}
