//! A model's tokenizer with its chat template and the ids that end an answer. Models scatter these
//! over several files, and some forget to name the token that ends a turn; this module gathers
//! everything that the programs need from them.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::chat_template::{self, Renderer, Rendering, RenderingRecord, SystemFrame, TEMPLATE_FILE, TEMPLATE_FOLDER};
use crate::checkpoint::base_folder;
use crate::codec::Codec;
pub use crate::codec::DecodeStream;
use crate::prompt_set::Prompt;
use crate::{Error, Result, atomic_file, fingerprint, text_file};

const TOKENIZER: &str = "tokenizer.json";
const GENERATION: &str = "generation_config.json";
/// The key there that says that its EOS ids are all: those of other files are replaced.
const REPLACES_EOS_IDS: &str = "cllm_eos_token_id_is_complete";
/// The files of a model folder that belong to its tokenizer.
const FILES: [&str; 5] = [TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", GENERATION, TEMPLATE_FILE];

pub struct Tokenizer {
    codec: Codec,
    renderer: Renderer,
    /// The id that ends the assistant's turn in training targets.
    end_of_turn_id: Option<i32>,
    /// Every id that ends an answer.
    eos_ids: Vec<i32>,
    /// The EOS ids of the model's files, whatever replaces them.
    own_eos_ids: Vec<i32>,
    fingerprint: String,
}

/// Fingerprint of everything that decides the ids of a text.
fn identity(path: &Path, codec: &Codec) -> Result<String> {
    let of_file = fingerprint::hash_files(&[path])?;
    Ok(match codec.changed_by_settings() {
        Some(changed) => fingerprint::hash_bytes(format!("{of_file} {changed}").as_bytes()),
        None => of_file,
    })
}

impl Tokenizer {
    /// Loads a tokenizer that renders prompts with the model's own chat template, today.
    ///
    /// # Errors
    /// As [`Tokenizer::load_for`].
    pub fn load(folder: &Path) -> Result<Self> {
        Tokenizer::load_for(folder, &Rendering::on(chat_template::today()))
    }

    /// Loads `tokenizer.json`, the chat template, and the EOS ids: those of [`write_eos_ids`] alone, or
    /// else those of generation_config.json, config.json and tokenizer_config.json together. An adapter
    /// without a tokenizer uses its base model's.
    ///
    /// # Errors
    /// When a file is missing or broken, or the tokenizer belongs to another model.
    pub fn load_for(folder: &Path, rendering: &Rendering) -> Result<Self> {
        let path = find_file(folder, TOKENIZER)?;
        if let Err(error) = std::fs::metadata(&path) {
            if error.kind() != ErrorKind::NotFound {
                return Err(Error::io(&path)(error));
            }
            let message = "holds no tokenizer.json, the only tokenizer file that this toolkit reads: for other files, \
                           such as tokenizer.model, `transformers` writes it with \
                           AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)";
            return Err(Error::file(folder, message));
        }
        let settings = read_json(&path.with_file_name("tokenizer_config.json"))?;
        let config_file = base_folder(folder)?.join("config.json");
        let config = read_json(&config_file)?;
        let num_embeddings = config["vocab_size"].as_u64().and_then(|size| u32::try_from(size).ok());
        let codec = Codec::load(&path, &settings, num_embeddings)?;
        let renderer = Renderer::load(path.parent().unwrap_or(folder), &settings, rendering)?;
        let id_of = |token: &str| codec.id_of(token);
        let turn_end = renderer.turn_end().and_then(id_of);
        let eos = renderer.special_token("eos_token").and_then(id_of);
        let mut eos_ids: BTreeSet<i32> = eos.into_iter().chain(turn_end).collect();
        eos_ids.extend(configured_eos_ids(&config_file, &config)?);
        let generation_file = find_file(folder, GENERATION)?;
        let generation = read_json(&generation_file)?;
        let generation_ids = configured_eos_ids(&generation_file, &generation)?;
        eos_ids.extend(&generation_ids);
        let mut tokenizer = Tokenizer {
            renderer,
            end_of_turn_id: turn_end.or(eos).or(eos_ids.first().copied()),
            eos_ids: eos_ids.iter().copied().collect(),
            own_eos_ids: eos_ids.into_iter().collect(),
            fingerprint: identity(&path, &codec)?,
            codec,
        };
        if generation[REPLACES_EOS_IDS] == true {
            tokenizer.replace_eos_ids(&generation_ids);
        }
        Ok(tokenizer)
    }

    /// Replaces the EOS ids, of which the first ends training targets; `None` keeps those of the files
    /// in `folder`, whose model has a vocabulary of `vocab_size`.
    ///
    /// # Errors
    /// [`Error::Usage`] for an id that is not in the vocabulary.
    pub fn with_eos_ids(mut self, ids: Option<&[i32]>, folder: &Path, vocab_size: i64) -> Result<Self> {
        if let Some(ids) = ids {
            self.replace_eos_ids(ids);
        }
        match self.eos_ids.iter().find(|&&id| id < 0 || i64::from(id) >= vocab_size) {
            None => Ok(self),
            Some(id) => {
                let (folder, last) = (folder.display(), vocab_size - 1);
                let message = format!("eos_ids: {id} is not in the vocabulary of {folder}: set ids from 0 to {last}");
                Err(Error::usage(message))
            }
        }
    }

    fn replace_eos_ids(&mut self, ids: &[i32]) {
        self.eos_ids = ids.to_vec();
        self.end_of_turn_id = ids.first().copied();
    }

    /// Every id that ends an answer: those given in their order, or else the model's own, ascending.
    pub fn eos_ids(&self) -> &[i32] {
        &self.eos_ids
    }

    /// Number of ids, including added tokens.
    pub fn vocab_size(&self) -> usize {
        self.codec.vocab_size()
    }

    /// The id of a token, given as it is written.
    pub fn token_id(&self, token: &str) -> Option<i32> {
        self.codec.id_of(token)
    }

    /// Token ids of `text`. No special tokens are added; those written in the text are recognised.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>> {
        self.codec.encode(text)
    }

    /// The whole text of `ids`, without special tokens.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn decode(&self, ids: &[i32]) -> Result<String> {
        self.codec.decode(ids)
    }

    /// A single token as it reads: its text, or its name in the vocabulary if it is special or part of
    /// a character.
    pub fn token_text(&self, id: i32) -> String {
        let text = self.codec.decode(&[id]).ok().filter(|text| !text.is_empty() && !text.contains('\u{fffd}'));
        text.or_else(|| self.codec.token_of(id)).unwrap_or_default()
    }

    /// The text of an answer to a prompt, without special tokens.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn decode_answer(&self, prompt_ids: &[i32], ids: &[i32]) -> Result<String> {
        self.codec.decode_continuation(prompt_ids, ids)
    }

    /// Decodes the answer to a prompt while it is generated.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn decode_stream(&self, prompt_ids: &[i32]) -> Result<DecodeStream<'_>> {
        self.codec.decode_stream(prompt_ids)
    }

    /// The rendered prompt and its ids. Messages go through the chat template, which opens the
    /// assistant's turn; plain text stays as it is, after the BOS token where the tokenizer adds
    /// one.
    ///
    /// # Errors
    /// When the template refuses the messages, or the model has no template.
    pub fn encode_prompt(&self, prompt: &Prompt) -> Result<(String, Vec<i32>)> {
        match prompt {
            Prompt::Text(text) => Ok((text.clone(), self.codec.encode_with_special_tokens(text)?)),
            Prompt::Conversation(conversation) => {
                let text = self.renderer.render(conversation, true)?;
                let ids = self.codec.encode(&text)?;
                Ok((text, ids))
            }
        }
    }

    /// Where rendered prompts have their system message, if the chat template marks it.
    pub fn system_frame(&self) -> Option<SystemFrame> {
        SystemFrame::find(&self.renderer)
    }

    /// The prompt as it is rendered with no system message, and with one that stands for any. Empty
    /// for plain text; a form that the template refuses is left out.
    pub fn render_system_variants(&self, prompt: &Prompt) -> Vec<String> {
        match prompt {
            Prompt::Text(_) => Vec::new(),
            Prompt::Conversation(conversation) => {
                let variants = conversation.system_variants();
                variants.iter().filter_map(|variant| self.renderer.render(variant, true).ok()).collect()
            }
        }
    }

    /// How prompts are rendered, to be stored with what is made from them.
    pub fn rendering_record(&self) -> RenderingRecord {
        self.renderer.record()
    }

    /// Ids of a training target, which follows a prompt: the text and the id that ends the
    /// assistant's turn.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode_target(&self, text: &str) -> Result<Vec<i32>> {
        let mut ids = self.encode_continuation(text)?;
        ids.extend(self.end_of_turn_id);
        Ok(ids)
    }

    /// Ids of a text that follows another. No special tokens are added.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub(crate) fn encode_continuation(&self, text: &str) -> Result<Vec<i32>> {
        self.codec.encode_continuation(text)
    }

    pub(crate) fn renderer(&self) -> &Renderer {
        &self.renderer
    }

    /// Cuts a target after its first token that ends an answer, or appends one. An end that other
    /// EOS ids replace is replaced.
    pub(crate) fn end_target(&self, mut ids: Vec<i32>) -> Vec<i32> {
        let ends = |id: &i32| self.eos_ids.contains(id) || self.own_eos_ids.contains(id);
        match ids.iter().position(ends) {
            Some(end) if self.eos_ids.contains(&ids[end]) => ids.truncate(end + 1),
            end => {
                ids.truncate(end.unwrap_or(ids.len()));
                ids.extend(self.end_of_turn_id);
            }
        }
        ids
    }

    /// Fingerprint of tokenizer.json.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
}

/// Path of a tokenizer file. An adapter may have a complete tokenizer and a generation_config.json
/// of its own; the files that it lacks are in the folder of its base model.
fn find_file(folder: &Path, name: &str) -> Result<PathBuf> {
    let marker = if name == GENERATION { GENERATION } else { TOKENIZER };
    let owner = if folder.join(marker).exists() { folder.to_owned() } else { base_folder(folder)? };
    Ok(owner.join(name))
}

/// Copies a model's tokenizer files to another folder.
///
/// # Errors
/// File-system errors.
pub fn copy_files(from: &Path, to: &Path) -> Result<()> {
    for name in FILES {
        let (from, to) = (find_file(from, name)?, to.join(name));
        if from.exists() {
            std::fs::copy(&from, &to).map_err(Error::write(&to))?;
        }
    }
    copy_named_templates(&find_file(from, TEMPLATE_FOLDER)?, &to.join(TEMPLATE_FOLDER))
}

/// Bytes of the files that [`copy_files`] copies.
///
/// # Errors
/// An adapter whose base is missing, folders that cannot be read.
pub fn num_bytes(folder: &Path) -> Result<u64> {
    let mut files = FILES.iter().map(|name| find_file(folder, name)).collect::<Result<Vec<_>>>()?;
    files.extend(named_templates(&find_file(folder, TEMPLATE_FOLDER)?)?);
    Ok(files.iter().map(|file| file.metadata().map_or(0, |metadata| metadata.len())).sum())
}

fn copy_named_templates(from: &Path, to: &Path) -> Result<()> {
    for template in named_templates(from)? {
        std::fs::create_dir_all(to).map_err(Error::write(to))?;
        let to = to.join(template.file_name().unwrap_or_default());
        std::fs::copy(&template, &to).map_err(Error::write(&to))?;
    }
    Ok(())
}

/// The files in a folder of named templates, which need not exist.
fn named_templates(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    entries.map(|entry| Ok(entry.map_err(Error::io(folder))?.path())).collect()
}

/// Makes a template the only one of a model folder, so that every loader renders with it.
///
/// # Errors
/// File-system errors.
pub fn write_chat_template(folder: &Path, source: &str) -> Result<()> {
    let named = folder.join(TEMPLATE_FOLDER);
    if named.is_dir() {
        std::fs::remove_dir_all(&named).map_err(Error::write(&named))?;
    }
    atomic_file::write(&folder.join(TEMPLATE_FILE), source.as_bytes())
}

/// Writes the ids that end an answer, in place of all others, into a model folder's
/// generation_config.json, where every loader looks for them.
///
/// # Errors
/// File-system errors.
pub fn write_eos_ids(folder: &Path, ids: &[i32]) -> Result<()> {
    let path = folder.join(GENERATION);
    let mut settings = match read_json(&path)? {
        Value::Object(settings) => settings,
        _ => Map::new(),
    };
    settings.insert("eos_token_id".to_owned(), ids.into());
    settings.insert(REPLACES_EOS_IDS.to_owned(), true.into());
    atomic_file::write_json(&path, &settings)
}

/// Content of a JSON file, `null` if it does not exist.
fn read_json(path: &Path) -> Result<Value> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Value::Null),
        _ => text_file::read_json(path),
    }
}

/// `eos_token_id` of a configuration file: a number, a list, `null` or absent.
fn configured_eos_ids(file: &Path, config: &Value) -> Result<Vec<i32>> {
    let value = &config["eos_token_id"];
    let ids: Vec<&Value> = value.as_array().map_or(vec![value], |ids| ids.iter().collect());
    let is_id = |id: &i32| *id >= 0;
    let read = |id: &Value| id.as_i64().and_then(|id| i32::try_from(id).ok()).filter(is_id);
    let to_id = |id: &Value| read(id).ok_or_else(|| Error::file(file, format!("eos_token_id: {id} is not a token id")));
    ids.into_iter().filter(|id| !id.is_null()).map(to_id).collect()
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
    }

    #[test]
    fn given_eos_ids_replace_those_of_every_file_also_once_they_are_saved() {
        let dir = folder();
        std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": 5, "vocab_size": 300}"#).unwrap();
        let load = |ids: Option<&[i32]>| Tokenizer::load(dir.path()).unwrap().with_eos_ids(ids, dir.path(), 300);
        assert_eq!(load(None).unwrap().eos_ids(), [0, 5]);
        let given = load(Some(&[8, 7])).unwrap();
        write_eos_ids(dir.path(), &[8, 7]).unwrap();
        for tokenizer in [given, load(None).unwrap()] {
            assert_eq!(tokenizer.eos_ids(), [8, 7]);
            assert!(tokenizer.encode_target("apples.").unwrap().ends_with(&[8]));
            assert_eq!(tokenizer.end_target(vec![9, 0, 9]), [9, 8], "an end of the model's own is replaced");
        }
        assert_eq!(load(Some(&[7])).unwrap().eos_ids(), [7]);
        for id in [-1, 300] {
            let message = load(Some(&[7, id])).err().unwrap().to_string();
            assert!(message.contains(&format!("eos_ids: {id} is not in the vocabulary of")), "{message}");
        }
    }

    #[test]
    fn a_character_of_several_tokens_appears_with_its_last_token() {
        let dir = folder();
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let ids = tokenizer.encode("a数b has apples").unwrap();
        let mut stream = tokenizer.decode_stream(&[]).unwrap();
        let texts: Vec<String> = ids.iter().map(|&id| stream.push(&[id]).unwrap()).collect();
        assert_eq!(texts[..5], ["a", "", "", "数", "b"]);
        assert_eq!(texts.concat() + &stream.finish().unwrap(), "a数b has apples");
        // An answer may end inside a character.
        let mut stream = tokenizer.decode_stream(&[]).unwrap();
        assert_eq!(stream.push(&ids[..2]).unwrap(), "a");
        assert_eq!(stream.push(&ids[2..3]).unwrap(), "");
        let rest = stream.finish().unwrap();
        assert!(!rest.is_empty() && rest.chars().all(|character| character == '\u{fffd}'), "{rest:?}");
    }

    #[test]
    fn eos_ids_come_from_every_file_and_a_foreign_tokenizer_is_refused() {
        let dir = folder();
        std::fs::write(dir.path().join("config.json"), r#"{"eos_token_id": [5, 2], "vocab_size": 300}"#).unwrap();
        assert_eq!(Tokenizer::load(dir.path()).unwrap().eos_ids(), [0, 2, 5]);
        let refusal = |config: &str| {
            std::fs::write(dir.path().join("config.json"), config).unwrap();
            Tokenizer::load(dir.path()).err().unwrap().to_string()
        };
        let message = refusal(r#"{"vocab_size": 200}"#);
        assert!(message.contains("vocabulary of 200"), "{message}");
        for id in ["4294967704", "[5, -1]", "\"</s>\""] {
            let message = refusal(&format!(r#"{{"eos_token_id": {id}, "vocab_size": 300}}"#));
            assert!(message.contains("config.json") && message.contains("is not a token id"), "{message}");
        }
    }

    #[test]
    fn a_file_that_cannot_be_reached_is_not_called_missing() {
        let dir = folder();
        // Root may read every folder, so the test uses a link that leads to itself.
        let path = dir.path().join("tokenizer.json");
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(&path, &path).unwrap();
        let error = Tokenizer::load(dir.path()).err().unwrap();
        assert!(error.to_string().contains("tokenizer.json: ") && !error.to_string().contains("holds no"), "{error}");
        std::fs::remove_file(&path).unwrap();
        assert!(Tokenizer::load(dir.path()).err().unwrap().to_string().contains("holds no tokenizer.json"));
    }

    #[test]
    fn a_tokenizer_whose_file_lies_about_its_charsmap_is_refused() {
        let dir = folder();
        let path = dir.path().join("tokenizer.json");
        let mut file: Value = text_file::read_json(&path).unwrap();
        for (charsmap, text) in [
            // The trie has no bytes; it is longer than the file; its units point past its end.
            ("AAAAAA==", "Tom"),
            ("/////w==", "Tom"),
            ("AAQAAP////8=", "Tom has apples"),
            ("BAAAAP////8=", "Tom has apples"),
            ("", "Tom"),
        ] {
            file["normalizer"] = serde_json::json!({ "type": "Precompiled", "precompiled_charsmap": charsmap });
            std::fs::write(&path, file.to_string()).unwrap();
            match Tokenizer::load(dir.path()).and_then(|tokenizer| tokenizer.encode(text)) {
                Err(error) => assert!(error.to_string().contains("tokenizer.json: "), "{error}"),
                Ok(ids) => assert!(!ids.is_empty(), "{charsmap}"),
            }
        }
    }
}
