//! The tokenizer files of a model, from the tokens, merges and scores in a GGUF file.

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::file::{GgufFile, Parsed};
use crate::word_split::{WordSplit, byte_level_step};
use cllm_core::{Error, Result, atomic_file};

// Kinds of tokens in `tokenizer.ggml.token_type`.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;

/// The contents of the tokenizer's files.
pub(super) struct TokenizerFiles {
    tokenizer: Value,
    config: Value,
    generation: Value,
}

impl TokenizerFiles {
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join("tokenizer.json");
        let text = self.tokenizer.to_string();
        // A tokenizer that cannot be read back must not be written.
        text.parse::<tokenizers::Tokenizer>()
            .map_err(|error| Error::usage(format!("its tokenizer is inconsistent: {error}")))?;
        atomic_file::write(&path, text.as_bytes())?;
        atomic_file::write_json(&folder.join("tokenizer_config.json"), &self.config)?;
        atomic_file::write_json(&folder.join("generation_config.json"), &self.generation)
    }
}

/// Reads the tokenizer of a model with `vocab_size` ids.
pub(super) fn read(file: &GgufFile<'_>, vocab_size: i64) -> Parsed<TokenizerFiles> {
    let vocabulary = Vocabulary::read(file, vocab_size)?;
    let model = file.text("tokenizer.ggml.model")?.ok_or("lacks the key `tokenizer.ggml.model`")?;
    let (mut tokenizer, adds_bos) = match model {
        "gpt2" => byte_level(file, &vocabulary)?,
        "llama" => sentencepiece(file, &vocabulary)?,
        other => {
            let message = format!("has a tokenizer of type `{other}`; only gpt2 and llama are supported");
            return Err(message);
        }
    };
    let adds_bos = file.bool("tokenizer.ggml.add_bos_token")?.unwrap_or(adds_bos);
    let bos = vocabulary.special(file, "bos")?;
    if let Some((id, token)) = bos.filter(|_| adds_bos) {
        let first = json!({ "SpecialToken": { "id": token, "type_id": 0 } });
        let sequence = |name: &str, kind: u32| json!({ "Sequence": { "id": name, "type_id": kind } });
        tokenizer["post_processor"] = json!({
            "type": "TemplateProcessing",
            "single": [first, sequence("A", 0)],
            "pair": [first, sequence("A", 0), sequence("B", 1)],
            "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
        });
    }
    tokenizer["added_tokens"] = vocabulary.added();
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": false,
    });
    let mut generation = Map::new();
    for (key, name) in [("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")] {
        if let Some((id, token)) = vocabulary.special(file, key)? {
            config[format!("{name}_token")] = json!(token);
            if name != "unk" {
                generation.insert(format!("{name}_token_id"), json!(id));
            }
        }
    }
    if let Some(template) = file.text("tokenizer.chat_template")? {
        config["chat_template"] = json!(template);
    }
    let ends = ["eos", "eot"].map(|key| Ok(vocabulary.special(file, key)?.map(|(id, _)| id)));
    let mut ends: Vec<usize> = ends.into_iter().collect::<Parsed<Vec<_>>>()?.into_iter().flatten().collect();
    ends.sort_unstable();
    ends.dedup();
    if ends.len() > 1 {
        generation.insert("eos_token_id".to_owned(), json!(ends));
    }
    Ok(TokenizerFiles { tokenizer, config, generation: generation.into() })
}

/// Tokens and their kinds, by id.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    kinds: Vec<i64>,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a GgufFile<'_>, vocab_size: i64) -> Parsed<Self> {
        let tokens = file.texts("tokenizer.ggml.tokens")?.ok_or("holds no tokenizer (`tokenizer.ggml.tokens`)")?;
        if tokens.len() as i64 > vocab_size {
            return Err(format!("has a tokenizer with {} ids, but an embedding with only {vocab_size}", tokens.len()));
        }
        let kinds = file.integers("tokenizer.ggml.token_type")?.unwrap_or_else(|| vec![NORMAL; tokens.len()]);
        if kinds.len() != tokens.len() {
            return Err(format!("has {} tokens but {} token types", tokens.len(), kinds.len()));
        }
        Ok(Vocabulary { tokens, kinds })
    }

    /// Ids by token, without the entries that only pad the embedding.
    fn ids(&self) -> Parsed<HashMap<&'a str, usize>> {
        let mut ids = HashMap::new();
        for (id, (&token, &kind)) in self.tokens.iter().zip(&self.kinds).enumerate() {
            if kind == UNUSED && token.starts_with("[PAD") {
                continue;
            }
            if let Some(other) = ids.insert(token, id) {
                return Err(format!("has a tokenizer whose ids {other} and {id} are both `{token}`"));
            }
        }
        Ok(ids)
    }

    /// Tokens that are matched in a text before it is split into words.
    fn added(&self) -> Value {
        let all = self.tokens.iter().zip(&self.kinds).enumerate();
        all.filter(|(_, (_, kind))| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED))
            .map(|(id, (token, kind))| {
                json!({
                    "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": *kind != USER_DEFINED,
                })
            })
            .collect()
    }

    /// The id and text of the token that the metadata name for a purpose, such as `eos`.
    fn special(&self, file: &GgufFile<'_>, purpose: &str) -> Parsed<Option<(usize, &'a str)>> {
        let key = format!("tokenizer.ggml.{purpose}_token_id");
        let Some(id) = file.integer(&key)? else { return Ok(None) };
        let token = usize::try_from(id).ok().and_then(|id| Some((id, *self.tokens.get(id)?)));
        token.map(Some).ok_or_else(|| format!("`{key}` is {id}, but the tokenizer has {} ids", self.tokens.len()))
    }
}

/// A byte-level BPE tokenizer, and whether it adds BOS by default.
fn byte_level(file: &GgufFile<'_>, vocabulary: &Vocabulary<'_>) -> Parsed<(Value, bool)> {
    let merges = file.texts("tokenizer.ggml.merges")?.ok_or("has a tokenizer without `tokenizer.ggml.merges`")?;
    let pairs = merges.iter().map(|merge| {
        let (left, right) = merge.split_once(' ').ok_or_else(|| format!("has a merge `{merge}` that is not a pair"))?;
        Ok([left, right])
    });
    let pairs = pairs.collect::<Parsed<Vec<_>>>()?;
    let rule = file
        .text("tokenizer.ggml.pre")?
        .ok_or("does not say how its tokenizer splits text (`tokenizer.ggml.pre`); convert the model to GGUF again")?;
    let WordSplit { normalizer, pre_tokenizer, is_llama3 } = WordSplit::from_rule(rule)?;
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": byte_level_step(true),
        "decoder": byte_level_step(true),
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": is_llama3, "vocab": vocab_json(&vocabulary.ids()?), "merges": pairs,
        },
    });
    Ok((tokenizer, is_llama3))
}

/// A SentencePiece BPE tokenizer with byte fallback, as in Llama 2, and whether it adds BOS by
/// default. SentencePiece always joins the pair whose result has the best score, so every split of
/// a token into two tokens becomes a merge, ranked by the score of the whole.
fn sentencepiece(file: &GgufFile<'_>, vocabulary: &Vocabulary<'_>) -> Parsed<(Value, bool)> {
    let scores = file.floats("tokenizer.ggml.scores")?.ok_or("has a tokenizer without `tokenizer.ggml.scores`")?;
    if scores.len() != vocabulary.tokens.len() {
        return Err(format!("has {} tokens but {} scores", vocabulary.tokens.len(), scores.len()));
    }
    let ids = vocabulary.ids()?;
    let mut merges = Vec::new();
    for ((&token, &score), _) in
        vocabulary.tokens.iter().zip(&scores).zip(&vocabulary.kinds).filter(|(_, kind)| **kind == NORMAL)
    {
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(first), Some(second)) = (ids.get(left), ids.get(right)) {
                merges.push((score, first, second, [left, right]));
            }
        }
    }
    merges.sort_by(|one, two| two.0.total_cmp(&one.0).then(one.1.cmp(two.1)).then(one.2.cmp(two.2)));
    let pairs: Vec<_> = merges.into_iter().map(|(_, _, _, pair)| pair).collect();
    let adds_space = file.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let mut normalizers = vec![replace(" ", "▁")];
    let mut decoders = vec![replace("▁", " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    if adds_space {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": "▁" }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    let unknown = vocabulary.special(file, "unknown")?.map(|(_, token)| token);
    let unknown = unknown.or(ids.contains_key("<unk>").then_some("<unk>"));
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": { "type": "Sequence", "normalizers": normalizers },
        "pre_tokenizer": null,
        "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": decoders },
        "model": {
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab_json(&ids), "merges": pairs,
        },
    });
    Ok((tokenizer, true))
}

/// The vocabulary as JSON, sorted by id, so that the same file always gives the same bytes.
fn vocab_json(ids: &HashMap<&str, usize>) -> Value {
    let mut entries: Vec<_> = ids.iter().collect();
    entries.sort_unstable_by_key(|(_, id)| **id);
    entries.into_iter().map(|(token, id)| ((*token).to_owned(), json!(id))).collect::<Map<_, _>>().into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::gguf::file::Value as Stored;

    #[test]
    fn a_sentencepiece_vocabulary_merges_by_score_and_falls_back_to_bytes() {
        let mut tokens: Vec<(String, i64, f64)> =
            vec![("<unk>".into(), UNKNOWN, 0.0), ("<s>".into(), CONTROL, 0.0), ("</s>".into(), CONTROL, 0.0)];
        tokens.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 6, 0.0)));
        // `bc` has a better score than `ab`, so `abc` becomes a + bc although `ab` comes first in
        // the text.
        for (rank, token) in ["bc", "ab", "▁a", "▁", "a", "b", "c"].into_iter().enumerate() {
            tokens.push((token.into(), NORMAL, -(rank as f64)));
        }
        let list = |items: Vec<Stored>| Stored::List(items);
        let values = BTreeMap::from([
            ("tokenizer.ggml.model".to_owned(), Stored::Text("llama".into())),
            (
                "tokenizer.ggml.tokens".to_owned(),
                list(tokens.iter().map(|token| Stored::Text(token.0.clone())).collect()),
            ),
            (
                "tokenizer.ggml.token_type".to_owned(),
                list(tokens.iter().map(|token| Stored::Integer(token.1)).collect()),
            ),
            ("tokenizer.ggml.scores".to_owned(), list(tokens.iter().map(|token| Stored::Float(token.2)).collect())),
            ("tokenizer.ggml.bos_token_id".to_owned(), Stored::Integer(1)),
            ("tokenizer.ggml.eos_token_id".to_owned(), Stored::Integer(2)),
        ]);
        let file = GgufFile { values, tensors: BTreeMap::new() };
        let dir = tempfile::tempdir().unwrap();
        read(&file, 300).unwrap().write(dir.path()).unwrap();
        let tokenizer = tokenizers::Tokenizer::from_file(dir.path().join("tokenizer.json")).unwrap();
        let encoding = tokenizer.encode("abc é</s>", true).unwrap();
        assert_eq!(encoding.get_tokens(), ["<s>", "▁a", "bc", "▁", "<0xC3>", "<0xA9>", "</s>"]);
        assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), "abc é");
        assert_eq!(read(&file, 100).err().unwrap(), "has a tokenizer with 266 ids, but an embedding with only 100");
    }
}
