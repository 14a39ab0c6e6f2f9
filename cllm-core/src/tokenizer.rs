//! A model's tokenizer with its chat template and the ids that end an answer.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::chat_template::{ChatTemplate, Message};
use crate::checkpoint::base_folder;
use crate::prompt_set::Prompt;
use crate::{Error, Result, atomic_file, fingerprint, text_file};

const TOKENIZER: &str = "tokenizer.json";
const GENERATION: &str = "generation_config.json";
/// Files of a model folder that belong to its tokenizer.
const FILES: [&str; 5] =
    [TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", GENERATION, "chat_template.jinja"];
/// Tokens that end a turn in widespread chat formats; some configurations forget to name them as EOS.
const TURN_ENDS: [&str; 3] = ["<|im_end|>", "<|eot_id|>", "<|end|>"];

/// Tokenizer of a model folder.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    template: Option<ChatTemplate>,
    /// Text of the token that ends the assistant's turn.
    end_of_turn: Option<i32>,
    eos_ids: Vec<i32>,
    fingerprint: String,
}

impl Tokenizer {
    /// Loads `tokenizer.json`, `tokenizer_config.json` (chat template) and the EOS ids of generation_config.json,
    /// config.json and the tokenizer together. What an adapter does not bring itself is that of the model it belongs to.
    ///
    /// # Errors
    /// When a file is missing or broken, or the tokenizer has ids past the model's vocabulary.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = place(folder, TOKENIZER)?;
        if !path.exists() {
            return Err(Error::file(folder, "holds no tokenizer.json; this toolkit reads no other tokenizer file"));
        }
        let inner = tokenizers::Tokenizer::from_file(&path)
            .map_err(|error| Error::file(&path, format!("is no tokenizer that can be read: {error}")))?;
        let settings = json(&path.with_file_name("tokenizer_config.json"))?;
        let config = json(&base_folder(folder)?.join("config.json"))?;
        if let Some(vocab) = config["vocab_size"].as_u64() {
            let largest = inner.get_vocab(true).into_values().max().unwrap_or(0);
            if u64::from(largest) >= vocab {
                return Err(Error::file(
                    &path,
                    format!(
                        "has ids up to {largest}, config.json a vocabulary of {vocab}: it belongs to another model"
                    ),
                ));
            }
        }
        let token = |name: &str| {
            let value = &settings[name];
            value.as_str().or(value["content"].as_str()).unwrap_or_default().to_owned()
        };
        let (bos, eos) = (token("bos_token"), token("eos_token"));
        let source = template_source(&path.with_file_name("chat_template.jinja"), &settings)?;
        let template = source.as_deref().map(|source| ChatTemplate::new(source, &bos, &eos)).transpose()?;
        let id = |token: &str| inner.token_to_id(token).map(|id| id as i32);
        let turn_end = TURN_ENDS
            .iter()
            .find(|&&end| source.as_deref().is_some_and(|source| source.contains(end)))
            .and_then(|end| id(end));
        let mut eos_ids: BTreeSet<i32> = id(&eos).into_iter().chain(turn_end).collect();
        eos_ids.extend(named_eos(&config));
        eos_ids.extend(named_eos(&json(&place(folder, GENERATION)?)?));
        Ok(Tokenizer {
            template,
            end_of_turn: turn_end.or(id(&eos)).or(eos_ids.first().copied()),
            eos_ids: eos_ids.into_iter().collect(),
            fingerprint: fingerprint::hash_files(&[path])?,
            inner,
        })
    }

    /// The same tokenizer, with these EOS ids instead of its own where some are given.
    pub fn with_eos_ids(mut self, ids: Option<&[i32]>) -> Self {
        if let Some(ids) = ids {
            self.eos_ids = ids.to_vec();
            self.end_of_turn = ids.first().copied();
        }
        self
    }

    /// Every id that ends an answer, ascending.
    pub fn eos_ids(&self) -> &[i32] {
        &self.eos_ids
    }

    /// Number of ids, added tokens included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Token ids of `text`, with no special tokens added; special tokens written in the text are recognised.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        self.ids(text, false)
    }

    /// Text of `ids`, special tokens left out.
    ///
    /// # Errors
    /// When an id is none of the tokenizer's.
    pub fn decode(&self, ids: &[i32]) -> Result<String> {
        let ids: Vec<u32> = ids.iter().map(|&id| id as u32).collect();
        self.inner.decode(&ids, true).map_err(|error| Error::usage(format!("tokenizer: {error}")))
    }

    /// The rendered prompt and its ids: messages go through the chat template (with the generation prompt), plain
    /// text is taken as it is (with the BOS token first where the tokenizer adds one).
    ///
    /// # Errors
    /// When the template refuses the messages, or the model has none.
    pub fn encode_prompt(&self, prompt: &Prompt) -> Result<(String, Vec<i32>)> {
        match prompt {
            Prompt::Text(text) => Ok((text.clone(), self.ids(text, true)?)),
            Prompt::Messages(messages) => {
                let text = self.render(messages)?;
                let ids = self.ids(&text, false)?;
                Ok((text, ids))
            }
        }
    }

    fn render(&self, messages: &[Message]) -> Result<String> {
        let template = self.template.as_ref().ok_or_else(|| {
            Error::usage("the model has no chat template, but the prompt is a conversation: use plain prompts")
        })?;
        template.render(messages, true)
    }

    /// Ids of a training answer to a prompt: its text and the id that ends the turn.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode_target(&self, text: &str) -> Result<Vec<i32>> {
        let mut ids = self.encode(text)?;
        ids.extend(self.end_of_turn);
        Ok(ids)
    }

    /// Fingerprint of tokenizer.json.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    fn ids(&self, text: &str, add_special: bool) -> Result<Vec<i32>> {
        let encoding =
            self.inner.encode(text, add_special).map_err(|error| Error::usage(format!("tokenizer: {error}")))?;
        Ok(encoding.get_ids().iter().map(|&id| id as i32).collect())
    }
}

/// Where a file of a model's tokenizer is. An adapter may bring a tokenizer, as a whole, and a generation_config.json; where
/// it does not, the model that it belongs to has them.
fn place(folder: &Path, name: &str) -> Result<PathBuf> {
    let witness = if name == GENERATION { GENERATION } else { TOKENIZER };
    let owner = if folder.join(witness).exists() { folder.to_owned() } else { base_folder(folder)? };
    Ok(owner.join(name))
}

/// Copies a model's tokenizer files to another folder.
///
/// # Errors
/// File-system errors.
pub fn copy_files(from: &Path, to: &Path) -> Result<()> {
    for name in FILES {
        let (from, to) = (place(from, name)?, to.join(name));
        if from.exists() {
            std::fs::copy(&from, &to).map_err(Error::write(&to))?;
        }
    }
    Ok(())
}

/// Names the ids that end an answer in a model folder, where [`Tokenizer::load`] and other loaders look for them.
///
/// # Errors
/// File-system errors.
pub fn write_eos_ids(folder: &Path, ids: &[i32]) -> Result<()> {
    let path = folder.join(GENERATION);
    let mut settings = match json(&path)? {
        Value::Object(settings) => settings,
        _ => Map::new(),
    };
    settings.insert("eos_token_id".to_owned(), ids.into());
    atomic_file::write_json(&path, &settings)
}

/// A JSON file, or `null` where there is none.
fn json(path: &Path) -> Result<Value> {
    if !path.exists() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&text_file::read(path)?).map_err(|error| Error::file(path, error.to_string()))
}

fn template_source(file: &Path, settings: &Value) -> Result<Option<String>> {
    if file.exists() {
        return text_file::read(file).map(Some);
    }
    let template = &settings["chat_template"];
    // Some models name several; the one for plain chats is `default`.
    let named = template.as_array().and_then(|all| all.iter().find(|entry| entry["name"] == "default"));
    Ok(template.as_str().or(named.and_then(|entry| entry["template"].as_str())).map(str::to_owned))
}

fn named_eos(config: &Value) -> Vec<i32> {
    let value = &config["eos_token_id"];
    let ids: Vec<&Value> = value.as_array().map_or(vec![value], |ids| ids.iter().collect());
    ids.into_iter().filter_map(Value::as_i64).map(|id| id as i32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        cllm_testing::train_tokenizer(["Tom has apples. ".repeat(20)], 300, dir.path());
        dir
    }

    #[test]
    fn a_conversation_becomes_a_prompt_and_an_answer_ends_its_turn() {
        let dir = folder();
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let (text, ids) = tokenizer.encode_prompt(&Prompt::question("Tom has")).unwrap();
        assert_eq!(text, "<|user|>Tom has<|end|><|assistant|>");
        assert_eq!((ids[0], ids[ids.len() - 1]), (2, 3));
        assert_eq!(tokenizer.eos_ids(), [0]);
        let target = tokenizer.encode_target("apples.").unwrap();
        assert_eq!(target[target.len() - 1], 0);
        assert_eq!(tokenizer.decode(&target).unwrap(), "apples.");
        assert_eq!(tokenizer.with_eos_ids(Some(&[7])).eos_ids(), [7]);
        write_eos_ids(dir.path(), &[7, 8]).unwrap();
        assert_eq!(Tokenizer::load(dir.path()).unwrap().eos_ids(), [0, 7, 8]);
    }

    #[test]
    fn eos_ids_come_from_every_file_and_a_foreign_tokenizer_is_refused() {
        let dir = folder();
        std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": [5, 2], "vocab_size": 300}"#).unwrap();
        assert_eq!(Tokenizer::load(dir.path()).unwrap().eos_ids(), [0, 2, 5]);
        std::fs::write(dir.path().join("config.json"), r#"{"vocab_size": 100}"#).unwrap();
        let message = Tokenizer::load(dir.path()).err().unwrap().to_string();
        assert!(message.contains("vocabulary of 100"), "{message}");
    }
}
