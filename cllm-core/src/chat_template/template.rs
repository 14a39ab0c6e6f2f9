//! One compiled template.

use std::sync::LazyLock;

use jiff::civil::Date;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, State, Value};
use regex::Regex;
use serde_json::Map;

use super::dates::strftime;
use super::{filters, percent, python};
use crate::{Error, Result};

/// The function with which templates print the date.
pub(super) const STRFTIME_NOW: &str = "strftime_now";
/// The variable that holds the date of a rendering, for `strftime_now`.
const DATE: &str = "cllm_date";

/// The tag with which `transformers` marks the assistant's text. We replace it by `if true`, which
/// renders the same text and keeps the effect that the tag's dashes and line end have on white
/// space.
static GENERATION_TAG: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("the pattern is valid"));

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// When the template is not valid Jinja.
    pub fn new(source: &str) -> Result<Self> {
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let mut environment = Environment::new();
        environment.set_syntax(syntax.expect("the syntax is valid"));
        environment.set_unknown_method_callback(python::call_method);
        environment.set_formatter(python::write_value);
        filters::add_to(&mut environment);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<String, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function(STRFTIME_NOW, strftime_now);
        let source = percent::replace_operator(&source.replace("\r\n", "\n").replace('\r', "\n"));
        let source = GENERATION_TAG.replace_all(&source, |tag: &regex::Captures<'_>| {
            let word = if tag.get(2).is_some() { "endif" } else { "if true" };
            format!("{{%{} {word} {}%}}", &tag[1], &tag[3])
        });
        environment
            .add_template_owned("chat", source.into_owned())
            .map_err(|error| Error::usage(format!("the chat template cannot be read{}", reason(&error))))?;
        Ok(ChatTemplate { environment })
    }

    /// Renders the template with these variables, on this date.
    ///
    /// # Errors
    /// When the template rejects the conversation (`raise_exception`).
    pub fn render(&self, values: &Map<String, serde_json::Value>, date: Date) -> Result<String> {
        let mut values = values.clone();
        values.insert(DATE.to_owned(), date.to_string().into());
        self.environment
            .get_template("chat")
            .and_then(|template| template.render(Value::from(Serde(values))))
            .map_err(|error| Error::usage(format!("the chat template rejects the conversation{}", reason(&error))))
    }
}

/// ` (line 3): Only user and assistant roles are supported!`
fn reason(error: &minijinja::Error) -> String {
    let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
    match error.detail() {
        Some(detail) => format!("{line}: {detail}"),
        None => format!("{line}: {}", error.kind()),
    }
}

/// Python's `datetime.now().strftime(format)`, at midnight of the date of the rendering.
fn strftime_now(state: &State<'_, '_>, format: &str) -> std::result::Result<String, minijinja::Error> {
    let date = state.lookup(DATE).map(|date| date.to_string()).unwrap_or_default();
    let date = date.parse().map_err(|error: jiff::Error| python::failed(error.to_string()))?;
    Ok(strftime(format, date))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str, values: serde_json::Value) -> Result<String> {
        let date = "2026-11-28".parse().unwrap();
        ChatTemplate::new(source)?.render(values.as_object().unwrap(), date)
    }

    #[test]
    fn a_template_that_refuses_a_conversation_says_why() {
        let message = render("{{ raise_exception('one only') }}", json!({})).unwrap_err().to_string();
        assert_eq!(message, "the chat template rejects the conversation (line 1): one only");
    }

    #[test]
    fn the_date_is_the_one_that_was_given() {
        assert_eq!(render("{{ strftime_now('%d %b %Y %H:%M') }}", json!({})).unwrap(), "28 Nov 2026 00:00");
    }
}
