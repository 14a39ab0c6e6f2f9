//! The chat templates and special tokens in a model's tokenizer files, found as `transformers`
//! finds them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use crate::{Error, Result, text_file};

/// The file of a model's template, next to tokenizer.json.
pub const TEMPLATE_FILE: &str = "chat_template.jinja";
/// The folder of its other templates, each in a file that bears its name.
pub const TEMPLATE_FOLDER: &str = "chat_templates";

/// The special tokens that templates may name, such as `bos_token`.
pub type SpecialTokens = BTreeMap<String, String>;

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

/// Text of a special token, which is written as a string or as `{"content": "..."}`.
pub(super) fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or(value["content"].as_str())
}

/// The special tokens of tokenizer_config.json: the keys that end in `_token`, and the named extra
/// tokens of some models. A token that is null or absent is not defined in templates either.
pub(super) fn special_tokens(config: &Value) -> SpecialTokens {
    let fields = |value: &Value| value.as_object().cloned().unwrap_or_default();
    let own = fields(config).into_iter().filter(|(name, _)| name.ends_with("_token"));
    let extra = ["extra_special_tokens", "model_specific_special_tokens"].map(|key| fields(&config[key]));
    let all = own.chain(extra.into_iter().flatten());
    all.filter_map(|(name, value)| Some((name, token_text(&value)?.to_owned()))).collect()
}
