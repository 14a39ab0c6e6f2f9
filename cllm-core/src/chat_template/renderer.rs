//! Renders conversations for one model, with its own templates or the one that the settings name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::files::{SpecialTokens, special_tokens, template_path, template_sources};
use super::template::STRFTIME_NOW;
use super::{ChatTemplate, Conversation, Rendering, RenderingRecord};
use crate::{Error, Result, fingerprint};

/// The template for conversations without tools, or for all.
const DEFAULT: &str = "default";
/// The template for conversations with tools, where a model has one.
const TOOL_USE: &str = "tool_use";
/// Tokens that end a turn in widespread chat formats. Some configurations do not list them as EOS.
const TURN_ENDS: [&str; 3] = ["<|im_end|>", "<|eot_id|>", "<|end|>"];

/// The templates of a model with everything else that they render.
pub struct Renderer {
    /// Sources by name.
    sources: BTreeMap<String, String>,
    /// The compiled ones among them that may be used.
    templates: BTreeMap<&'static str, ChatTemplate>,
    special_tokens: SpecialTokens,
    rendering: Rendering,
    /// The file or folder of the templates, for messages.
    path: PathBuf,
}

impl Renderer {
    /// Reads the templates next to a tokenizer whose tokenizer_config.json is `config`, unless
    /// `rendering` replaces them.
    ///
    /// # Errors
    /// Files that cannot be read, and templates that are not valid Jinja.
    pub fn load(folder: &Path, config: &Value, rendering: &Rendering) -> Result<Self> {
        let sources = match &rendering.chat_template {
            Some(source) => BTreeMap::from([(DEFAULT.to_owned(), source.clone())]),
            None => template_sources(folder, config)?,
        };
        let path = rendering.chat_template_path.clone().unwrap_or_else(|| template_path(folder));
        let compile = |name| Some((name, ChatTemplate::new(sources.get(name)?).map_err(|error| error.in_file(&path))));
        let compiled = [DEFAULT, TOOL_USE].into_iter().filter_map(compile);
        Ok(Renderer {
            templates: compiled.map(|(name, template)| Ok((name, template?))).collect::<Result<_>>()?,
            special_tokens: special_tokens(folder, config)?,
            rendering: rendering.clone(),
            sources,
            path,
        })
    }

    /// Renders a conversation. `add_generation_prompt` opens the assistant's turn.
    ///
    /// # Errors
    /// When the model has no template, or its template refuses the conversation.
    pub fn render(&self, conversation: &Conversation, add_generation_prompt: bool) -> Result<String> {
        let mut values = serde_json::Map::new();
        values.extend(self.special_tokens.iter().map(|(name, token)| (name.clone(), json!(token))));
        values.extend(["tools", "documents"].map(|name| (name.to_owned(), Value::Null)));
        values.extend(self.rendering.chat_template_kwargs.clone());
        // What a row says wins.
        if !conversation.tools.is_empty() {
            values.insert("tools".to_owned(), json!(conversation.tools));
        }
        values.extend(conversation.chat_template_kwargs.clone());
        values.insert("messages".to_owned(), json!(conversation.messages));
        values.insert("add_generation_prompt".to_owned(), json!(add_generation_prompt));
        let template = self.pick(!values["tools"].is_null())?;
        template.render(&values, self.rendering.date).map_err(|error| error.in_file(&self.path))
    }

    fn pick(&self, has_tools: bool) -> Result<&ChatTemplate> {
        let tool_use = self.templates.get(TOOL_USE).filter(|_| has_tools);
        tool_use.or(self.templates.get(DEFAULT)).ok_or_else(|| {
            let names: Vec<&str> = self.sources.keys().map(String::as_str).collect();
            let message = match names[..] {
                [] => "the prompt is a conversation, but the model has no chat template: set chat_template=FILE, or \
                       use plain-text prompts"
                    .to_owned(),
                _ => format!(
                    "the model has no chat template named `default`, only {}: set chat_template=FILE to one of them",
                    names.join(", ")
                ),
            };
            Error::file(&self.path, message)
        })
    }

    /// The token that ends a turn in the template for plain chats, if it is a well-known one.
    pub fn turn_end(&self) -> Option<&'static str> {
        let source = self.sources.get(DEFAULT)?;
        TURN_ENDS.into_iter().find(|end| source.contains(end))
    }

    /// The text of a special token, such as `eos_token`.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.special_tokens.get(name).map(String::as_str)
    }

    /// Whether a template may print the date. Where none does, the same prompts on another day are the
    /// same texts.
    fn prints_date(&self) -> bool {
        self.templates.keys().any(|&name| self.sources[name].contains(STRFTIME_NOW))
    }

    /// What is stored with the things that are made from rendered prompts.
    pub fn record(&self) -> RenderingRecord {
        let source = (!self.sources.is_empty()).then(|| json!([self.sources, self.special_tokens]).to_string());
        RenderingRecord {
            chat_template: source.map(|source| fingerprint::hash_bytes(source.as_bytes())),
            chat_template_kwargs: self.rendering.chat_template_kwargs.clone(),
            date: self.prints_date().then_some(self.rendering.date),
        }
    }
}
