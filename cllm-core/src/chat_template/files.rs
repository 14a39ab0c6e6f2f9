//! The chat templates and special tokens in a model's tokenizer files, found as `transformers`
//! finds them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::codec::token_text;
use crate::{Error, Result, text_file};

/// The file of a model's template, next to tokenizer.json.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The folder of its other templates, each in a file that bears its name.
pub const TEMPLATE_FOLDER: &str = "chat_templates";

/// The special tokens that templates may name, such as `bos_token`.
pub type SpecialTokens = BTreeMap<String, String>;

/// What the tokenizer classes of `transformers` take for a special token whose key is absent.
const CLASS_DEFAULTS: [(&str, &[(&str, &str)]); 6] = [
    ("LlamaTokenizer", &[("bos_token", "<s>"), ("eos_token", "</s>"), ("unk_token", "<unk>")]),
    (
        "CodeLlamaTokenizer",
        &[
            ("bos_token", "<s>"),
            ("eos_token", "</s>"),
            ("unk_token", "<unk>"),
            ("prefix_token", "▁<PRE>"),
            ("middle_token", "▁<MID>"),
            ("suffix_token", "▁<SUF>"),
            ("eot_token", "▁<EOT>"),
            ("fill_token", "<FILL_ME>"),
        ],
    ),
    ("Qwen2Tokenizer", &[("eos_token", ENDOFTEXT), ("unk_token", ENDOFTEXT), ("pad_token", ENDOFTEXT)]),
    ("GPT2Tokenizer", &[("bos_token", ENDOFTEXT), ("eos_token", ENDOFTEXT), ("unk_token", ENDOFTEXT)]),
    (
        "GPTNeoXTokenizer",
        &[("bos_token", ENDOFTEXT), ("eos_token", ENDOFTEXT), ("unk_token", ENDOFTEXT), ("pad_token", "<|padding|>")],
    ),
    (
        "GemmaTokenizer",
        &[
            ("bos_token", "<bos>"),
            ("eos_token", "<eos>"),
            ("unk_token", "<unk>"),
            ("pad_token", "<pad>"),
            ("mask_token", "<mask>"),
        ],
    ),
];
const ENDOFTEXT: &str = "<|endoftext|>";

/// The sources of a model's templates by their names. Template files replace what
/// tokenizer_config.json holds; a template without a name is `default`.
pub(super) fn template_sources(folder: &Path, config: &Value) -> Result<BTreeMap<String, String>> {
    let mut sources = BTreeMap::new();
    let file = folder.join(TEMPLATE_FILE);
    if file.exists() {
        sources.insert("default".to_owned(), text_file::read(&file)?);
    }
    let named = folder.join(TEMPLATE_FOLDER);
    if named.is_dir() {
        for entry in std::fs::read_dir(&named).map_err(Error::io(&named))? {
            let path = entry.map_err(Error::io(&named))?.path();
            let stem = path.file_stem().and_then(|stem| stem.to_str());
            if let (Some(name), true) = (stem, path.extension().is_some_and(|extension| extension == "jinja")) {
                sources.insert(name.to_owned(), text_file::read(&path)?);
            }
        }
    }
    if sources.is_empty() {
        sources.extend(configured_templates(&config["chat_template"]));
    }
    Ok(sources)
}

/// The file or folder that holds a model's own templates, for messages.
pub(super) fn template_path(folder: &Path) -> PathBuf {
    let own = [TEMPLATE_FILE, TEMPLATE_FOLDER].map(|name| folder.join(name));
    own.into_iter().find(|path| path.exists()).unwrap_or_else(|| folder.join("tokenizer_config.json"))
}

/// The templates in tokenizer_config.json: one text, a list of `{name, template}`, or an object.
fn configured_templates(value: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    match value {
        Value::String(source) => vec![("default".to_owned(), source.clone())],
        Value::Array(named) => {
            named.iter().filter_map(|entry| Some((text(&entry["name"])?, text(&entry["template"])?))).collect()
        }
        Value::Object(named) => named.iter().filter_map(|(name, source)| Some((name.clone(), text(source)?))).collect(),
        _ => Vec::new(),
    }
}

/// The special tokens of tokenizer_config.json: the keys that end in `_token`, the named extra
/// tokens of some models, and what the class of the tokenizer adds. Where the configuration is of
/// the older form without `added_tokens_decoder`, special_tokens_map.json wins. A token that is null
/// is not defined in templates either.
pub(super) fn special_tokens(folder: &Path, config: &Value) -> Result<SpecialTokens> {
    let mut fields = config.as_object().cloned().unwrap_or_default();
    let map = folder.join("special_tokens_map.json");
    if config.get("added_tokens_decoder").is_none() && map.exists() {
        let map: Value = text_file::read_json(&map)?;
        fields.extend(map.as_object().cloned().unwrap_or_default());
    }
    for key in ["extra_special_tokens", "model_specific_special_tokens"] {
        fields.extend(fields.get(key).and_then(Value::as_object).cloned().unwrap_or_default());
    }
    let class = config["tokenizer_class"].as_str().unwrap_or_default();
    let class = class.strip_suffix("Fast").unwrap_or(class);
    for (name, token) in CLASS_DEFAULTS.iter().filter(|(name, _)| *name == class).flat_map(|(_, tokens)| *tokens) {
        fields.entry(*name).or_insert_with(|| (*token).into());
    }
    let tokens = fields.into_iter().filter(|(name, _)| name.ends_with("_token"));
    Ok(tokens.filter_map(|(name, value)| Some((name, token_text(&value)?.to_owned()))).collect())
}
