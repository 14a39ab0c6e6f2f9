//! One compiled template.

use std::sync::{Arc, LazyLock};

use jiff::civil::Date;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, State, Value};
use regex::Regex;
use serde_json::Map;

use super::dates::strftime;
use super::percent::{self, LongTag, MAX_TAG_BYTES};
use super::{filters, python};
use crate::{Error, Result, deep_stack};

/// The function with which templates print the date.
pub(super) const STRFTIME_NOW: &str = "strftime_now";
/// The variable that holds the date of a rendering, for `strftime_now`.
const DATE: &str = "cllm_date";

/// What a rendering may cost: an instruction or 64 bytes of data each. Thousands of messages cost a
/// hundredth of it.
const FUEL: u64 = 5_000_000;
/// Maximum bytes of a template, whose nesting is parsed by functions that call themselves. Those of
/// published models have at most 20 kB.
const MAX_BYTES: usize = 1 << 20;

/// The tag with which `transformers` marks the assistant's text. We replace it by `if true`, which
/// renders the same text and keeps the effect that the tag's dashes and line end have on white
/// space.
static GENERATION_TAG: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("the pattern is valid"));

/// A compiled chat template.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
}

impl ChatTemplate {
    /// Compiles a template.
    ///
    /// # Errors
    /// When the template is not valid Jinja, or too long.
    pub fn new(source: &str) -> Result<Self> {
        let source = source.to_owned();
        deep_stack::run(move || Self::compile(&source))?
    }

    fn compile(source: &str) -> Result<Self> {
        let invalid = |why: &str| Error::usage(format!("the chat template cannot be read{why}"));
        if source.len() > MAX_BYTES {
            return Err(invalid(&format!(": it has {} bytes, more than {MAX_BYTES}", source.len())));
        }
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        let mut environment = Environment::new();
        environment.set_syntax(syntax.expect("the syntax is valid"));
        environment.set_unknown_method_callback(python::call_method);
        environment.set_formatter(python::write_value);
        environment.set_fuel(Some(FUEL));
        filters::add_to(&mut environment);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<String, _> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function(STRFTIME_NOW, strftime_now);
        let source = percent::replace_operator(&source.replace("\r\n", "\n").replace('\r', "\n")).map_err(
            |LongTag { line }| invalid(&format!(" (line {line}): a tag has more than {MAX_TAG_BYTES} bytes")),
        )?;
        let source = GENERATION_TAG.replace_all(&source, |tag: &regex::Captures<'_>| {
            let word = if tag.get(2).is_some() { "endif" } else { "if true" };
            format!("{{%{} {word} {}%}}", &tag[1], &tag[3])
        });
        environment.add_template_owned("chat", source.into_owned()).map_err(|error| invalid(&reason(&error)))?;
        Ok(ChatTemplate { environment: Arc::new(environment) })
    }

    /// Renders the template with these variables, on this date.
    ///
    /// # Errors
    /// When the template rejects the conversation (`raise_exception`), or has no end.
    pub fn render(&self, values: &Map<String, serde_json::Value>, date: Date) -> Result<String> {
        let mut values = values.clone();
        values.insert(DATE.to_owned(), date.to_string().into());
        let environment = Arc::clone(&self.environment);
        deep_stack::run(move || {
            let template = environment.get_template("chat");
            template.and_then(|template| template.render(Value::from(Serde(values)))).map_err(|error| refusal(&error))
        })?
    }
}

fn refusal(error: &minijinja::Error) -> Error {
    if error.kind() == ErrorKind::OutOfFuel {
        let line = error.line().map(|line| format!(" (line {line})")).unwrap_or_default();
        let what = "the chat template takes too many steps or makes too much text";
        return Error::usage(format!("{what}{line}: shorten the conversation, or set chat_template=FILE to another"));
    }
    Error::usage(format!("the chat template rejects the conversation{}", reason(error)))
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

    #[test]
    fn hostile_templates_are_refused() {
        let many = |text: &str| text.repeat(20_000);
        let deep = |step: &str| {
            format!(
                "{{% set ns = namespace(x=[]) %}}{{% for i in range(99999) %}}{{% for j in range(99) %}}{{% set ns.x = {step} %}}{{% endfor %}}{{% endfor %}}"
            )
        };
        let double = "{% set ns = namespace(x='xxxxxxxx', l=[1]) %}{% for i in range(60) %}";
        for source in [
            // They take for ever.
            "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
            "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}",
            "{{ range(99999)|unique|list|length }}",
            &format!("{double}{{% set ns.l = [ns.l, ns.l] %}}{{% endfor %}}{{{{ ns.l }}}}"),
            &format!("{double}{{% set ns.l = [ns.l, ns.l] %}}{{% endfor %}}{{{{ ns.l|tojson }}}}"),
            &format!("{double}{{% set ns.l = [ns.l, ns.l] %}}{{% endfor %}}{{{{ ns.l|string }}}}"),
            // They take all memory.
            &format!("{double}{{% set ns.x = ns.x ~ ns.x %}}{{% endfor %}}"),
            &format!("{double}{{% set ns.x = ns.x + ns.x %}}{{% endfor %}}"),
            &format!("{double}{{% set ns.x = ns.x|replace('x', 'xx') %}}{{% endfor %}}"),
            &format!("{double}{{% set ns.x = '%s%s' % (ns.x, ns.x) %}}{{% endfor %}}"),
            "{{ 'x' * 9999999999 }}",
            "{{ 'x\ny'|indent(9999999999) }}",
            "{{ 'x'|center(9999999999) }}",
            "{{ 'x'.ljust(9999999999) }}",
            "{{ 'x'.zfill(9999999999) }}",
            "{{ '\t'.expandtabs(9999999999) }}",
            "{{ '%9999999999d' % 1 }}",
            "{{ '%.9999999999f' % 1.5 }}",
            "{{ [1]|tojson(indent=4000000000) }}",
            "{{ range(99999)|list|tojson(indent='x' * 9999) }}",
            // They nest deeper than a stack reaches.
            &format!("{{{{ {}1{} }}}}", many("("), many(")")),
            &format!("{{{{ {}1 }}}}", many("not ")),
            &format!("{{{{ {}1 }}}}", many("1 + ")),
            &format!("{{{{ {}1 }}}}", many("1 % ")),
            &format!("{}{}", many("{% if a %}"), many("{% endif %}")),
            &deep("[ns.x]"),
            &deep("{'a': ns.x}"),
        ] {
            let error = render(source, json!({})).err();
            assert!(error.is_some_and(|error| error.exit_code() == 2), "{source:.200}");
        }
        // What is only long is rendered, and lists that hold each other stop where Python's would.
        let chain = format!("{{{{ 1{} }}}}", " + 1".repeat(7000));
        assert_eq!(render(&chain, json!({})).unwrap(), "7001");
        let elif = format!("{{% if a %}}{}{{% else %}}x{{% endif %}}", "{% elif a %}".repeat(20_000));
        assert_eq!(render(&elif, json!({})).unwrap(), "x");
        let nested =
            "{% set ns = namespace(x=1) %}{% for i in range(1000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}";
        assert!(render(nested, json!({})).is_err());
    }
}
