//! Text to ids and back, as `transformers` does it with a model's tokenizer.json and
//! tokenizer_config.json.
//!
//! SentencePiece tokenizers put a blank before a text, and take it away when they decode one. A
//! prompt is such a text. An answer continues a text, so its own first blank counts: it is encoded
//! and decoded as what follows its prompt.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokenizers::AddedToken;

use crate::error::panic_message;
use crate::tokenizer_parts::Growth;
use crate::{Error, Result, deep_stack, text_file};

/// Keys of tokenizer_config.json that name special tokens.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// More than the text of a token has, for a limit that only hostile files reach.
const MAX_TOKEN_BYTES: usize = 64;
/// Bytes of the longest characters.
const MAX_CHAR_BYTES: usize = 4;
/// Maximum length of a text: a million tokens of English, more than the context of any model that is
/// supported. Tokenizing takes some 200 bytes of memory for each byte.
const MAX_TEXT_BYTES: usize = 4_000_000;

/// What tokenizer.json and tokenizer_config.json say about text and ids.
pub(crate) struct Codec {
    tokenizer: tokenizers::Tokenizer,
    /// The same without a blank before the text; `None` if `tokenizer` adds none.
    continuation: Option<tokenizers::Tokenizer>,
    /// Size of the model's embedding. Tokens that were added later may have ids past it.
    num_embeddings: Option<u32>,
    /// What tokenizer_config.json changes in the ids of a text; `None` if nothing.
    changed_by_settings: Option<String>,
    growth: Growth,
    path: PathBuf,
}

impl Codec {
    /// Reads a tokenizer.json. `settings` is the content of tokenizer_config.json, and
    /// `num_embeddings` the size of the model's embedding, if known.
    ///
    /// # Errors
    /// When the file is broken or belongs to another model.
    pub(crate) fn load(path: &Path, settings: &Value, num_embeddings: Option<u32>) -> Result<Self> {
        let invalid = |error: tokenizers::Error| {
            let message = format!(
                "is not a readable tokenizer: {error}; `transformers` writes one with \
                 AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
            );
            Error::file(path, message)
        };
        let text = text_file::read(path)?;
        let growth = Growth::read(&text).map_err(|problem| invalid(problem.into()))?;
        let read = move || without_panics(|| text.parse::<tokenizers::Tokenizer>());
        let mut tokenizer = deep_stack::run(read)?.map_err(invalid)?;
        check_vocab_size(path, &tokenizer, num_embeddings)?;
        // A file may ask to cut every text to a length, or to fill it up.
        tokenizer.with_truncation(None).map_err(invalid)?;
        tokenizer.with_padding(None);
        let of_file = json!(tokenizer.get_added_vocabulary());
        let configured = configured_tokens(&tokenizer, settings);
        tokenizer.add_tokens(configured).map_err(invalid)?;
        let added = json!(tokenizer.get_added_vocabulary());
        let splits_special_tokens = settings["split_special_tokens"] == true;
        tokenizer.set_encode_special_tokens(splits_special_tokens);
        let is_changed = splits_special_tokens || added != of_file;
        let changed_by_settings = is_changed.then(|| json!([added, splits_special_tokens]).to_string());
        let continuation = without_leading_blank(&tokenizer).map_err(invalid)?;
        Ok(Codec { tokenizer, continuation, num_embeddings, changed_by_settings, growth, path: path.to_owned() })
    }

    /// What belongs to the identity of the tokenizer beside its tokenizer.json: the tokens that
    /// tokenizer_config.json adds, and whether it splits special ones. `None` if it does neither.
    pub(crate) fn changed_by_settings(&self) -> Option<&str> {
        self.changed_by_settings.as_deref()
    }

    /// Number of ids, including added tokens.
    pub(crate) fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }

    pub(crate) fn id_of(&self, token: &str) -> Option<i32> {
        self.tokenizer.token_to_id(token).map(|id| id as i32)
    }

    /// A token as the vocabulary has it.
    pub(crate) fn token_of(&self, id: i32) -> Option<String> {
        self.tokenizer.id_to_token(u32::try_from(id).ok()?)
    }

    /// Ids of a text, in which special tokens are recognised.
    ///
    /// # Errors
    /// When the tokenizer fails, or the text has a token that the model has no embedding for.
    pub(crate) fn encode(&self, text: &str) -> Result<Vec<i32>> {
        self.encode_with(&self.tokenizer, text, false)
    }

    /// Ids of a text between the special tokens that the tokenizer puts around it.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub(crate) fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<i32>> {
        self.encode_with(&self.tokenizer, text, true)
    }

    /// Ids of a text that follows another.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub(crate) fn encode_continuation(&self, text: &str) -> Result<Vec<i32>> {
        self.encode_with(self.continuation.as_ref().unwrap_or(&self.tokenizer), text, false)
    }

    fn encode_with(&self, tokenizer: &tokenizers::Tokenizer, text: &str, special_tokens: bool) -> Result<Vec<i32>> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(Error::usage(format!(
                "the text has {:.1} MB, and texts of up to {} MB are tokenized: shorten it",
                text.len() as f64 / 1e6,
                MAX_TEXT_BYTES / 1_000_000
            )));
        }
        self.growth.check_encoding(text.len()).map_err(|problem| self.refuses(&problem))?;
        let encoding =
            without_panics(|| tokenizer.encode(text, special_tokens)).map_err(|error| self.failed(&error))?;
        let unknown = |id: &u32| self.num_embeddings.is_some_and(|num_embeddings| *id >= num_embeddings);
        match encoding.get_ids().iter().position(unknown) {
            None => Ok(encoding.get_ids().iter().map(|&id| id as i32).collect()),
            Some(index) => {
                let (token, id) = (&encoding.get_tokens()[index], encoding.get_ids()[index]);
                let num_embeddings = self.num_embeddings.unwrap_or_default();
                let message = format!(
                    "the text has the token `{token}` (id {id}), but the model has embeddings for {num_embeddings} tokens \
                     only: remove it from the text, or resize the model's embedding"
                );
                Err(self.refuses(&message))
            }
        }
    }

    /// A whole text, without special tokens.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub(crate) fn decode(&self, ids: &[i32]) -> Result<String> {
        self.decode_unsigned(&ids.iter().map(|&id| id as u32).collect::<Vec<_>>())
    }

    fn decode_unsigned(&self, ids: &[u32]) -> Result<String> {
        let num_bytes = ids.len() * MAX_TOKEN_BYTES;
        self.growth.check_decoding(num_bytes).map_err(|problem| self.refuses(&problem))?;
        without_panics(|| self.tokenizer.decode(ids, true)).map_err(|error| self.failed(&error))
    }

    /// The error for a text that another may replace.
    fn refuses(&self, problem: &str) -> Error {
        Error::usage(format!("{}: {problem}", self.path.display()))
    }

    fn failed(&self, error: &tokenizers::Error) -> Error {
        Error::file(&self.path, format!("the tokenizer fails: {error}"))
    }

    /// The text of ids that follow others: what they add to the text of those.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub(crate) fn decode_continuation(&self, before: &[i32], ids: &[i32]) -> Result<String> {
        let num_before = self.decode(before)?.chars().count();
        Ok(self.decode(&[before, ids].concat())?.chars().skip(num_before).collect())
    }

    /// Decodes ids that follow others as they come.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub(crate) fn decode_stream(&self, before: &[i32]) -> Result<DecodeStream<'_>> {
        let ids: Vec<u32> = before.iter().map(|&id| id as u32).collect();
        let num_shown_chars = self.decode_unsigned(&ids)?.chars().count();
        Ok(DecodeStream { codec: self, num_shown_ids: ids.len(), ids, num_shown_chars })
    }

    /// Whether the token is one byte of a character, which SentencePiece decodes together with the
    /// bytes beside it.
    fn is_byte(&self, id: u32) -> bool {
        let token = self.tokenizer.id_to_token(id);
        token.is_some_and(|token| token.len() == 6 && token.starts_with("<0x") && token.ends_with('>'))
    }
}

/// Decodes tokens as they come. A character whose bytes are spread over several tokens is withheld
/// until its end is certain.
pub struct DecodeStream<'t> {
    codec: &'t Codec,
    /// The ids that the next text depends on.
    ids: Vec<u32>,
    /// How many of them, and how many characters of their text, have been returned.
    num_shown_ids: usize,
    num_shown_chars: usize,
}

impl DecodeStream<'_> {
    /// Returns the text that these tokens complete.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn push(&mut self, ids: &[i32]) -> Result<String> {
        let mut text = String::new();
        for &id in ids {
            text.push_str(&self.step(id as u32)?);
        }
        Ok(text)
    }

    fn step(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.codec.decode_unsigned(&self.ids)?;
        let new_text: String = text.chars().skip(self.num_shown_chars).collect();
        if new_text.is_empty() || text.ends_with('\u{fffd}') || self.codec.is_byte(id) {
            return Ok(String::new());
        }
        // The tokens of this text tell how the next ones are decoded; those before them no longer
        // matter.
        self.ids.drain(..self.num_shown_ids);
        self.num_shown_ids = self.ids.len();
        self.num_shown_chars = self.codec.decode_unsigned(&self.ids)?.chars().count();
        Ok(new_text)
    }

    /// Number of characters that are withheld only because the next token may belong to the last one.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn num_complete_chars(&self) -> Result<usize> {
        // SentencePiece decodes whole characters as broken ones if broken ones follow.
        for end in (self.num_shown_ids + 1..=self.ids.len()).rev().take(MAX_CHAR_BYTES) {
            let text = self.codec.decode_unsigned(&self.ids[..end])?;
            if !text.ends_with('\u{fffd}') {
                return Ok(text.chars().count().saturating_sub(self.num_shown_chars));
            }
        }
        Ok(0)
    }

    /// Returns the text that is still withheld: the incomplete character of an answer that was cut
    /// inside a character.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn finish(self) -> Result<String> {
        Ok(self.codec.decode_unsigned(&self.ids)?.chars().skip(self.num_shown_chars).collect())
    }
}

/// A tokenizer relies on what its file says, such as the offsets in a `precompiled_charsmap`.
fn without_panics<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic_message(&*panic);
        Err(format!("it is broken ({text})").into())
    })
}

/// Refuses a tokenizer with ids that no data set can hold, or that the model's embedding does not
/// have. Those of added tokens may be unused, such as a padding token that was added after training.
fn check_vocab_size(path: &Path, tokenizer: &tokenizers::Tokenizer, num_embeddings: Option<u32>) -> Result<()> {
    let (added, vocab) = (tokenizer.get_added_tokens_decoder(), tokenizer.get_vocab(false));
    // Data sets hold ids as int32.
    let max_id = i32::MAX as u32;
    if let Some(id) = added.keys().chain(vocab.values()).find(|&&id| id > max_id) {
        return Err(Error::file(path, format!("has the token id {id}: expected ids up to {max_id}")));
    }
    let Some(num_embeddings) = num_embeddings else { return Ok(()) };
    let ids = vocab.into_values().filter(|id| !added.contains_key(id));
    match ids.max().filter(|&largest| largest >= num_embeddings) {
        None => Ok(()),
        Some(largest) => {
            let message = format!(
                "has ids up to {largest}, but config.json has a vocabulary of {num_embeddings}: it belongs to another model"
            );
            Err(Error::file(path, message))
        }
    }
}

/// The tokens of tokenizer_config.json, which `transformers` adds to those of tokenizer.json: all
/// that `added_tokens_decoder` describes, then special tokens that no one has described.
fn configured_tokens(tokenizer: &tokenizers::Tokenizer, settings: &Value) -> Vec<AddedToken> {
    let numbered = settings["added_tokens_decoder"].as_object().into_iter().flatten();
    let mut numbered: Vec<(u32, &Value)> = numbered.filter_map(|(id, token)| Some((id.parse().ok()?, token))).collect();
    numbered.sort_by_key(|(id, _)| *id);
    let mut tokens: Vec<AddedToken> = numbered.into_iter().map(|(_, token)| added_token(token)).collect();
    let described = tokenizer.get_added_tokens_decoder();
    let extra = ["additional_special_tokens", "extra_special_tokens"].map(|key| &settings[key]);
    let extra = extra.into_iter().filter_map(Value::as_array).flatten();
    for token in SPECIAL_TOKENS.into_iter().map(|key| &settings[key]).chain(extra) {
        let token = added_token(token);
        if !described.values().chain(&tokens).any(|other| other.content == token.content) {
            tokens.push(AddedToken { special: true, ..token });
        }
    }
    tokens
}

/// A token that is written as its text, and is then a special one, or as an object.
fn added_token(token: &Value) -> AddedToken {
    let flag = |key: &str, default: bool| token[key].as_bool().unwrap_or(default);
    let special = flag("special", token.is_string());
    AddedToken {
        content: token_text(token).unwrap_or_default().to_owned(),
        single_word: flag("single_word", false),
        lstrip: flag("lstrip", false),
        rstrip: flag("rstrip", false),
        normalized: flag("normalized", !special),
        special,
    }
}

/// Text of a special token, which is written as a string or as `{"content": "..."}`.
pub(crate) fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or(value["content"].as_str())
}

/// A tokenizer that puts no blank before a text; `None` if this one puts none there.
fn without_leading_blank(tokenizer: &tokenizers::Tokenizer) -> tokenizers::Result<Option<tokenizers::Tokenizer>> {
    let normalizer = edited(tokenizer.get_normalizer())?;
    let pre_tokenizer = edited(tokenizer.get_pre_tokenizer())?;
    if normalizer.is_none() && pre_tokenizer.is_none() {
        return Ok(None);
    }
    let mut continuation = tokenizer.clone();
    if let Some(normalizer) = normalizer {
        continuation.with_normalizer(normalizer)?;
    }
    if let Some(pre_tokenizer) = pre_tokenizer {
        continuation.with_pre_tokenizer(pre_tokenizer);
    }
    Ok(Some(continuation))
}

/// The component without its leading blank; `None` if it has none.
fn edited<T: Serialize + DeserializeOwned>(component: Option<&T>) -> tokenizers::Result<Option<Option<T>>> {
    let original = serde_json::to_value(component)?;
    let mut edited = original.clone();
    remove_leading_blank(&mut edited);
    Ok(if edited == original { None } else { Some(serde_json::from_value(edited)?) })
}

fn remove_leading_blank(component: &mut Value) {
    match component["type"].as_str() {
        Some("Prepend") => *component = Value::Null,
        Some("Metaspace") => component["prepend_scheme"] = json!("never"),
        Some("ByteLevel") if component["add_prefix_space"] == true => component["add_prefix_space"] = json!(false),
        Some("Sequence") => {
            for list in ["normalizers", "pretokenizers"] {
                if let Some(components) = component.get_mut(list).and_then(Value::as_array_mut) {
                    components.iter_mut().for_each(remove_leading_blank);
                    components.retain(|component| !component.is_null());
                }
            }
        }
        _ => {}
    }
}
