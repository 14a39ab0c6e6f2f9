//! Filters, tests and functions of Jinja that minijinja lacks or defines otherwise.

use std::sync::{Arc, Mutex, PoisonError};

use minijinja::value::{Kwargs, Object, Rest, Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::python::{Arguments, centered, charge, escape, failed, float_of, modulo, str_of};
use super::{json, percent};

pub(super) fn add_to(environment: &mut Environment<'_>) {
    environment.add_filter("tojson", json::to_json);
    environment.add_filter(percent::MODULO, modulo);
    environment.add_filter("string", str_of);
    environment.add_filter("e", to_markup_once);
    environment.add_filter("escape", to_markup_once);
    environment.add_filter("forceescape", to_markup);
    environment.add_filter("striptags", |text: String| minijinja_contrib::filters::striptags(text));
    environment.add_filter("truncate", truncate);
    environment.add_filter("filesizeformat", minijinja_contrib::filters::filesizeformat);
    environment.add_filter("wordcount", |text: String| {
        text.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).count()
    });
    environment.add_filter("wordwrap", word_wrap);
    environment.add_filter("center", center);
    environment.add_filter("indent", indent);
    environment.add_filter("urlencode", url_encode);
    environment.add_filter("xmlattr", xml_attributes);
    environment.add_filter("int", to_int);
    environment.add_filter("float", to_float);
    environment.add_filter("dictsort", sort_dict);
    environment.add_filter("unique", unique);
    environment.add_filter("attr", attribute);
    environment.add_test("callable", |value: &Value| {
        value.kind() == ValueKind::Plain && value.to_string().contains("function")
    });
    // minijinja also iterates over none.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::String | ValueKind::Seq | ValueKind::Map)
    });
    environment.add_function("cycler", cycler);
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
}

fn to_markup(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    escape(state, value).map(Value::from_safe_string)
}

fn to_markup_once(state: &State<'_, '_>, value: &Value) -> Result<Value, Error> {
    if value.is_safe() { Ok(value.clone()) } else { to_markup(state, value) }
}

/// Jinja's `cycler`, which minijinja's lacks `reset` of.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    position: Mutex<usize>,
}

impl Object for Cycler {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let position = *self.position.lock().unwrap_or_else(PoisonError::into_inner);
        if key.as_str() == Some("current") { self.items.get(position).cloned() } else { None }
    }

    fn call_method(self: &Arc<Self>, _: &mut State<'_, '_>, name: &str, _: &[Value]) -> Result<Value, Error> {
        let mut position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        match name {
            "next" => {
                let item = self.items[*position].clone();
                *position = (*position + 1) % self.items.len();
                Ok(item)
            }
            "reset" => {
                *position = 0;
                Ok(Value::from(()))
            }
            _ => Err(Error::from(ErrorKind::UnknownMethod)),
        }
    }
}

fn cycler(items: Rest<Value>) -> Result<Value, Error> {
    if items.is_empty() {
        return Err(failed("cycler: at least one item has to be provided"));
    }
    Ok(Value::from_object(Cycler { items: items.0, position: Mutex::new(0) }))
}

fn truncate(text: String, positional: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let arguments = Arguments::named("truncate", &positional, &named, &["length", "killwords", "end", "leeway"])?;
    let length = arguments.integer(0)?.unwrap_or(255).max(0) as usize;
    let end = arguments.text(2)?.unwrap_or("...");
    let leeway = arguments.integer(3)?.unwrap_or(5).max(0) as usize;
    if text.chars().count() <= length + leeway {
        return Ok(text);
    }
    let kept: String = text.chars().take(length.saturating_sub(end.chars().count())).collect();
    let words = kept.rsplit_once(' ').map_or(kept.as_str(), |(words, _)| words);
    Ok(format!("{}{end}", if arguments.flag(1) { &kept } else { words }))
}

/// Wraps each line at `width` characters; a longer word is cut.
fn word_wrap(state: &State<'_, '_>, text: String, positional: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let names = ["width", "break_long_words", "wrapstring", "break_on_hyphens"];
    let arguments = Arguments::named("wordwrap", &positional, &named, &names)?;
    let width = arguments.integer(0)?.unwrap_or(79).max(1) as usize;
    let break_words = arguments.value(1).is_none_or(Value::is_true);
    let end = arguments.text(2)?.unwrap_or("\n");
    let mut lines: Vec<String> = Vec::new();
    for paragraph in text.lines() {
        let (mut line, mut length) = (String::new(), 0);
        for word in paragraph.split_whitespace() {
            let (mut word, mut word_length) = (word, word.chars().count());
            if !line.is_empty() && length + 1 + word_length <= width {
                line.push(' ');
                length += 1;
            } else if !line.is_empty() {
                lines.push(std::mem::take(&mut line));
                length = 0;
            }
            while break_words && line.is_empty() && word_length > width {
                let cut = word.char_indices().nth(width).map_or(word.len(), |(at, _)| at);
                lines.push(word[..cut].to_owned());
                (word, word_length) = (&word[cut..], word_length - width);
            }
            line.push_str(word);
            length += word_length;
        }
        lines.push(line);
    }
    charge(state, end.len().saturating_mul(lines.len()))?;
    Ok(lines.join(end))
}

fn center(state: &State<'_, '_>, text: String, width: Option<usize>) -> Result<String, Error> {
    charge(state, width.unwrap_or(80))?;
    Ok(centered(&text, width.unwrap_or(80), " "))
}

fn indent(state: &State<'_, '_>, text: String, positional: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let arguments = Arguments::named("indent", &positional, &named, &["width", "first", "blank"])?;
    let indentation = match arguments.value(0) {
        Some(text) if text.as_str().is_some() => text.to_string(),
        _ => blanks(state, arguments.integer(0)?.unwrap_or(4))?,
    };
    charge(state, indentation.len().saturating_mul(text.matches('\n').count()))?;
    let is_indented = |index: usize, line: &str| {
        if index == 0 { arguments.flag(1) } else { arguments.flag(2) || !line.is_empty() }
    };
    let lines = text.split('\n').enumerate();
    let lines =
        lines.map(|(index, line)| if is_indented(index, line) { indentation.clone() + line } else { line.to_owned() });
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

/// An indentation; a negative width is none.
pub(super) fn blanks(state: &State<'_, '_>, width: i64) -> Result<String, Error> {
    let width = usize::try_from(width).unwrap_or(0);
    charge(state, width)?;
    Ok(" ".repeat(width))
}

fn url_encode(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    let quote = |text: &str, for_query: bool| {
        let mut out = String::new();
        for byte in text.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(char::from(byte)),
                b'/' if !for_query => out.push('/'),
                b' ' if for_query => out.push('+'),
                other => out.push_str(&format!("%{other:02X}")),
            }
        }
        out
    };
    if value.kind() != ValueKind::Map {
        return Ok(quote(&str_of(state, value)?, false));
    }
    let part = |value: &Value| Ok::<_, Error>(quote(&str_of(state, value)?, true));
    let pair = |key: Value| Ok(format!("{}={}", part(&key)?, part(&value.get_item(&key)?)?));
    Ok(value.try_iter()?.map(pair).collect::<Result<Vec<_>, Error>>()?.join("&"))
}

fn xml_attributes(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    for key in value.try_iter()? {
        let item = value.get_item(&key)?;
        if !item.is_none() && !item.is_undefined() {
            out.push_str(&format!(" {key}=\"{}\"", escape(state, &item)?));
        }
    }
    Ok(out)
}

/// Jinja's `int`: what is not a number becomes the default.
fn to_int(value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let arguments = Arguments::named("int", &positional, &named, &["default", "base"])?;
    let base = arguments.integer(1)?.unwrap_or(10) as u32;
    let default = || arguments.value(0).cloned().unwrap_or(Value::from(0));
    let Some(text) = value.as_str() else {
        return Ok(match (value.kind(), float_of(value)) {
            (_, Some(float)) if float.is_finite() => Value::from(float as i128),
            (ValueKind::Number, None) => value.clone(),
            (ValueKind::Bool, _) => Value::from(i64::from(value.is_true())),
            _ => default(),
        });
    };
    let digits = text.trim().to_lowercase().replace('_', "");
    let prefix =
        [(16, "0x"), (8, "0o"), (2, "0b")].into_iter().find(|(of, _)| *of == base).map_or("", |(_, prefix)| prefix);
    let integer = i128::from_str_radix(digits.strip_prefix(prefix).unwrap_or(&digits), base.clamp(2, 36)).ok();
    let float = || digits.parse::<f64>().ok().filter(|float| float.is_finite()).map(|float| float as i128);
    Ok(integer.or_else(float).map(Value::from).unwrap_or_else(default))
}

fn to_float(value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let arguments = Arguments::named("float", &positional, &named, &["default"])?;
    let parsed = match value.as_str() {
        Some(text) => text.trim().parse().ok(),
        None => f64::try_from(value.clone()).ok(),
    };
    Ok(parsed.map(Value::from).unwrap_or_else(|| arguments.value(0).cloned().unwrap_or(Value::from(0.0))))
}

/// A value as sorting without regard to case sees it.
fn sort_key(value: &Value, case_sensitive: bool) -> Value {
    match value.as_str() {
        Some(text) if !case_sensitive => Value::from(text.to_lowercase()),
        _ => value.clone(),
    }
}

fn sort_dict(value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let arguments = Arguments::named("dictsort", &positional, &named, &["case_sensitive", "by", "reverse"])?;
    let by_value = match arguments.text(1)? {
        None | Some("key") => false,
        Some("value") => true,
        Some(other) => return Err(failed(format!("dictsort: cannot sort by {other}"))),
    };
    let pair = |key: Value| Ok((key.clone(), value.get_item(&key)?));
    let mut pairs = value.try_iter()?.map(pair).collect::<Result<Vec<(Value, Value)>, Error>>()?;
    let key = |(key, value): &(Value, Value)| sort_key(if by_value { value } else { key }, arguments.flag(0));
    let kinds_differ = pairs.windows(2).any(|pair| key(&pair[0]).kind() != key(&pair[1]).kind());
    if kinds_differ {
        return Err(failed("dictsort: the items cannot be compared"));
    }
    pairs.sort_by_key(key);
    if arguments.flag(2) {
        pairs.reverse();
    }
    Ok(pairs.into_iter().map(|(key, value)| Value::from(Tuple::from([key, value]))).collect())
}

fn unique(state: &State<'_, '_>, value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let arguments = Arguments::named("unique", &positional, &named, &["case_sensitive", "attribute"])?;
    let mut seen = Vec::new();
    let mut kept = Vec::new();
    for item in value.try_iter()? {
        let key = match arguments.text(1)? {
            Some(path) => path.split('.').try_fold(item.clone(), |value, name| value.get_attr(name))?,
            None => item.clone(),
        };
        let key = sort_key(&key, arguments.flag(0));
        state.consume_fuel(seen.len() as u64)?;
        if !seen.contains(&key) {
            seen.push(key);
            kept.push(item);
        }
    }
    Ok(Value::from(kept))
}

/// Jinja's `attr` looks at attributes alone, which the items of a `dict` are not.
fn attribute(value: &Value, name: &str) -> Result<Value, Error> {
    if value.kind() == ValueKind::Map { Ok(Value::UNDEFINED) } else { value.get_attr(name) }
}
