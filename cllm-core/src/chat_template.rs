//! Chat templates: Jinja programs in a model's tokenizer files that turn a conversation into a
//! prompt. They are written for `transformers`, so this module reproduces its Jinja settings and
//! the functions that it adds, byte for byte.

use std::sync::LazyLock;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, ErrorKind, Value, context};
use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Map;

use crate::{Error, Result};

/// The tag with which `transformers` marks the assistant's text. We replace it by `if true`, which
/// renders the same text and keeps the effect that the tag's dashes and line end have on white
/// space.
static GENERATION_TAG: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("the pattern is valid"));

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant` or `tool`.
    pub role: String,
    pub content: String,
    /// Other keys, which some templates read, such as `tool_calls`, `name` or `reasoning_content`.
    #[serde(flatten)]
    pub other: Map<String, serde_json::Value>,
}

impl Message {
    /// A message without other keys.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into(), other: Map::new() }
    }
}

/// What a chat template renders: messages, and what they need besides.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conversation {
    pub messages: Vec<Message>,
    /// The tools that the model may call, each as a JSON schema. Empty: none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tools: Vec<serde_json::Value>,
    /// Variables of the template, such as `enable_thinking`.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub chat_template_kwargs: Map<String, serde_json::Value>,
}

impl From<Vec<Message>> for Conversation {
    fn from(messages: Vec<Message>) -> Self {
        Conversation { messages, ..Conversation::default() }
    }
}

/// A compiled chat template with the special tokens that it may use.
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos_token: String,
    eos_token: String,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// When the template is not valid Jinja.
    pub fn new(source: &str, bos_token: &str, eos_token: &str) -> Result<Self> {
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let mut environment = Environment::new();
        environment.set_syntax(syntax.expect("the syntax is valid"));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<String, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_function("strftime_now", |format: String| jiff::ZonedDateTime::now().strftime(&format).to_string());
        // minijinja's own filter escapes `<` and others for HTML; transformers does not.
        environment.add_filter("tojson", to_json);
        let source = GENERATION_TAG.replace_all(source, |tag: &regex::Captures<'_>| {
            let word = if tag.get(2).is_some() { "endif" } else { "if true" };
            format!("{{%{} {word} {}%}}", &tag[1], &tag[3])
        });
        let source = source.into_owned();
        environment
            .add_template_owned("chat", source)
            .map_err(|error| Error::usage(format!("the chat template cannot be read: {error:#}")))?;
        Ok(ChatTemplate { environment, bos_token: bos_token.to_owned(), eos_token: eos_token.to_owned() })
    }

    /// Renders a conversation as the model's prompt. `add_generation_prompt` opens the assistant's
    /// turn.
    ///
    /// # Errors
    /// When the template rejects the conversation (`raise_exception`).
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let values = context! {
            messages => Value::from(Serde(messages)),
            add_generation_prompt => add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
        };
        self.environment
            .get_template("chat")
            .and_then(|template| template.render(values))
            .map_err(|error| Error::usage(format!("the chat template rejects the conversation: {error:#}")))
    }
}

/// The `tojson` filter, with the output of Python's `json.dumps`.
fn to_json(value: Value, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let indent: Option<usize> = options.get("indent")?;
    let failed = |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let mut bytes = Vec::new();
    let spaces = " ".repeat(indent.unwrap_or(0));
    if indent.is_some() {
        let format = serde_json::ser::PrettyFormatter::with_indent(spaces.as_bytes());
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, format)).map_err(failed)?;
    } else {
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, Spaced)).map_err(failed)?;
    }
    String::from_utf8(bytes).map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string()))
}

/// Python's default separators: `, ` and `: `.
struct Spaced;

impl serde_json::ser::Formatter for Spaced {
    fn begin_array_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + std::io::Write>(&mut self, writer: &mut W, first: bool) -> std::io::Result<()> {
        if first { Ok(()) } else { writer.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, writer: &mut W) -> std::io::Result<()> {
        writer.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(role: &str, content: &str) -> Message {
        Message::new(role, content)
    }

    #[test]
    fn chatml_renders_as_transformers_does() {
        let source = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let template = ChatTemplate::new(source, "", "<|im_end|>").unwrap();
        let text = template.render(&[message("user", "a < b"), message("assistant", "yes")], true).unwrap();
        assert_eq!(
            text,
            "<|im_start|>user\na < b<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn exceptions_json_and_python_methods_work() {
        let template = ChatTemplate::new(
            "{% if messages|length > 1 %}{{ raise_exception('one only') }}{% endif %}{{ messages[0].content.strip() }} {{ {'a': '<'} | tojson }}",
            "",
            "",
        )
        .unwrap();
        assert_eq!(template.render(&[message("user", " x ")], true).unwrap(), "x {\"a\": \"<\"}");
        let refused = template.render(&[message("user", "x"), message("user", "y")], true).unwrap_err();
        assert!(refused.to_string().contains("one only"));
    }
}
