//! Python's methods, numbers and operators in templates, where minijinja's differ or are missing.

use std::sync::LazyLock;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Tuple, ValueKind};
use minijinja::{AutoEscape, Error, ErrorKind, Output, State, Value};
use regex::Regex;

/// Maximum depth of lists and dicts that are shown. Python's own limit is of this order.
const MAX_NESTING: usize = 500;

pub(super) fn failed(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// Accounts for text before it is made, so that no template makes more than its fuel is worth.
pub(super) fn charge(state: &State<'_, '_>, num_bytes: usize) -> Result<(), Error> {
    state.consume_fuel(num_bytes as u64 / 64 + 1)
}

/// Arguments of a function, by position or by name. `None` in place of an argument counts as not
/// given, as it does in all functions here.
pub(super) struct Arguments(Vec<Option<Value>>);

impl Arguments {
    /// Arguments of a method, of which the last may hold all named ones.
    fn new(function: &str, given: &[Value], names: &[&str]) -> Result<Self, Error> {
        match given.split_last() {
            Some((last, rest)) if last.is_kwargs() => {
                Arguments::named(function, rest, &Kwargs::try_from(last.clone())?, names)
            }
            _ => Arguments::named(function, given, &Kwargs::from_iter(Vec::<(String, Value)>::new()), names),
        }
    }

    /// Arguments of a filter, with names for them in the order of their positions.
    pub(super) fn named(function: &str, positional: &[Value], named: &Kwargs, names: &[&str]) -> Result<Self, Error> {
        if positional.len() > names.len() {
            return Err(failed(format!("{function} takes at most {} arguments", names.len())));
        }
        let mut values: Vec<Option<Value>> = positional.iter().cloned().map(Some).collect();
        for name in &names[positional.len()..] {
            values.push(if named.has(name) { Some(named.get(name)?) } else { None });
        }
        named.assert_all_used()?;
        Ok(Arguments(values.into_iter().map(|value| value.filter(|value| !value.is_none())).collect()))
    }

    pub(super) fn value(&self, index: usize) -> Option<&Value> {
        self.0[index].as_ref()
    }

    pub(super) fn flag(&self, index: usize) -> bool {
        self.value(index).is_some_and(Value::is_true)
    }

    pub(super) fn text(&self, index: usize) -> Result<Option<&str>, Error> {
        let text = |value: &'_ Value| -> Result<(), Error> {
            value.as_str().map(|_| ()).ok_or_else(|| failed(format!("expected text, not {}", value.kind())))
        };
        self.value(index).map(text).transpose()?;
        Ok(self.value(index).and_then(Value::as_str))
    }

    pub(super) fn required_text(&self, index: usize) -> Result<&str, Error> {
        self.text(index)?.ok_or_else(|| Error::from(ErrorKind::MissingArgument))
    }

    pub(super) fn integer(&self, index: usize) -> Result<Option<i64>, Error> {
        self.value(index).map(|value| i64::try_from(value.clone())).transpose()
    }
}

/// The methods of Python's `str`, `list` and `dict`.
pub(super) fn call_method(
    state: &mut State<'_, '_>,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let own = match value.kind() {
        ValueKind::String => value.as_str().and_then(|text| text_method(state, text, name, args)),
        ValueKind::Seq if name == "index" => {
            let found = args.first().and_then(|wanted| value.try_iter().ok()?.position(|item| item == *wanted));
            Some(found.map(Value::from).ok_or_else(|| failed("list.index: the value is not in the list")))
        }
        ValueKind::Seq | ValueKind::Map if name == "copy" => Some(Ok(value.clone())),
        _ => None,
    };
    own.unwrap_or_else(|| minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args))
}

fn text_method(state: &State<'_, '_>, text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    let searched = || -> Result<(Option<usize>, usize), Error> {
        let arguments = Arguments::new(name, args, &["sub", "start", "end"])?;
        let (slice, skipped) = slice(text, arguments.integer(1)?, arguments.integer(2)?);
        let wanted = arguments.required_text(0)?;
        let found = if name.starts_with('r') { slice.rfind(wanted) } else { slice.find(wanted) };
        Ok((found.map(|at| skipped + slice[..at].chars().count()), slice.matches(wanted).count()))
    };
    let result = match name {
        "split" | "rsplit" => split(text, name, args),
        "splitlines" => Arguments::new(name, args, &["keepends"]).map(|args| split_lines(text, args.flag(0))),
        "partition" | "rpartition" => partition(text, name, args),
        "removeprefix" => one_text(name, args).map(|prefix| text.strip_prefix(&*prefix).unwrap_or(text).into()),
        "removesuffix" => one_text(name, args).map(|suffix| text.strip_suffix(&*suffix).unwrap_or(text).into()),
        "strip" | "lstrip" | "rstrip" if args.iter().all(Value::is_none) => Ok(Value::from(strip(text, name))),
        "zfill" | "center" | "ljust" | "rjust" => pad(state, text, name, args),
        "find" | "rfind" => searched().map(|(at, _)| at.map_or(Value::from(-1), Value::from)),
        "index" | "rindex" => {
            searched().and_then(|(at, _)| at.map(Value::from).ok_or_else(|| failed("substring not found")))
        }
        "count" => searched().map(|(_, count)| Value::from(count)),
        "startswith" | "endswith" => starts_or_ends(text, name, args),
        "expandtabs" => Arguments::new(name, args, &["tabsize"])
            .and_then(|args| Ok(expand_tabs(state, text, args.integer(0)?.unwrap_or(8))?.into())),
        "swapcase" => Ok(text.chars().map(swap_case).collect::<String>().into()),
        "casefold" => Ok(text.to_lowercase().replace('ß', "ss").into()),
        "title" => Ok(title(text).into()),
        "isdecimal" => Ok(all(text, |character| character.is_numeric() && to_decimal(character))),
        "isdigit" => Ok(all(text, |character| to_decimal(character) || "²³¹⁰⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉".contains(character))),
        "istitle" => Ok(Value::from(text.chars().any(char::is_alphabetic) && title(text) == text)),
        "isidentifier" => Ok(Value::from(is_identifier(text))),
        "isprintable" => Ok(Value::from(text.chars().all(is_printable))),
        _ => return None,
    };
    Some(result)
}

fn one_text(name: &str, args: &[Value]) -> Result<String, Error> {
    Arguments::new(name, args, &["text"])?.required_text(0).map(str::to_owned)
}

/// Python's white space, which has four separators more than Unicode's.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

fn strip<'t>(text: &'t str, name: &str) -> &'t str {
    let left = if name == "rstrip" { text } else { text.trim_start_matches(is_space) };
    if name == "lstrip" { left } else { left.trim_end_matches(is_space) }
}

fn split(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let arguments = Arguments::new(name, args, &["sep", "maxsplit"])?;
    let max = arguments.integer(1)?.filter(|&max| max >= 0).map_or(usize::MAX - 1, |max| max as usize) + 1;
    let from_right = name == "rsplit";
    let mut parts: Vec<&str> = match (arguments.text(0)?, from_right) {
        (Some(""), _) => return Err(failed("empty separator")),
        (Some(separator), false) => text.splitn(max, separator).collect(),
        (Some(separator), true) => text.rsplitn(max, separator).collect(),
        (None, _) => split_at_spaces(text, max, from_right),
    };
    if from_right {
        parts.reverse();
    }
    Ok(Value::from_iter(parts))
}

/// At most `max` parts between runs of white space, from the left or from the right.
fn split_at_spaces(text: &str, max: usize, from_right: bool) -> Vec<&str> {
    let mut rest = strip(text, if from_right { "rstrip" } else { "lstrip" });
    let mut parts = Vec::new();
    while !rest.is_empty() {
        let cut = if from_right { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(at) = cut.filter(|_| parts.len() + 1 < max) else {
            parts.push(rest);
            break;
        };
        let (left, right) = rest.split_at(at);
        if from_right {
            parts.push(right.trim_start_matches(is_space));
            rest = left.trim_end_matches(is_space);
        } else {
            parts.push(left);
            rest = right.trim_start_matches(is_space);
        }
    }
    parts
}

fn split_lines(text: &str, keep_ends: bool) -> Value {
    let is_end = |character| {
        matches!(character, '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let (mut lines, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let content = rest.find(is_end).unwrap_or(rest.len());
        let after = &rest[content..];
        let end = if after.starts_with("\r\n") { 2 } else { after.chars().next().map_or(0, char::len_utf8) };
        lines.push(&rest[..content + if keep_ends { end } else { 0 }]);
        rest = &rest[content + end..];
    }
    Value::from_iter(lines)
}

fn partition(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let separator = one_text(name, args)?;
    let is_right = name == "rpartition";
    let cut = if is_right { text.rsplit_once(&*separator) } else { text.split_once(&*separator) };
    let parts = match cut {
        Some((left, right)) => [left, &separator, right],
        None if is_right => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from))))
}

fn pad(state: &State<'_, '_>, text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let arguments = Arguments::new(name, args, &["width", "fillchar"])?;
    let width = arguments.integer(0)?.ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
    let width = usize::try_from(width).unwrap_or(0);
    let missing = width.saturating_sub(text.chars().count());
    let fill = arguments.text(1)?.unwrap_or(" ");
    charge(state, missing.saturating_mul(fill.len()))?;
    let padded = match name {
        "zfill" => {
            let sign = text.starts_with(['+', '-']).into();
            format!("{}{}{}", &text[..sign], "0".repeat(missing), &text[sign..])
        }
        "ljust" => format!("{text}{}", fill.repeat(missing)),
        "rjust" => format!("{}{text}", fill.repeat(missing)),
        _ => centered(text, width, fill),
    };
    Ok(padded.into())
}

/// Python's `center`: CPython puts the odd character on the left if the width is odd.
pub(super) fn centered(text: &str, width: usize, fill: &str) -> String {
    let missing = width.saturating_sub(text.chars().count());
    let left = missing / 2 + (missing & width & 1);
    format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left))
}

/// `text[start:end]` in characters, and how many characters come before it.
fn slice(text: &str, start: Option<i64>, end: Option<i64>) -> (&str, usize) {
    let length = text.chars().count() as i64;
    let index = |at: i64| (if at < 0 { (length + at).max(0) } else { at.min(length) }) as usize;
    let (start, end) = (index(start.unwrap_or(0)), index(end.unwrap_or(length)));
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    (&text[byte(start)..byte(end.max(start))], start)
}

fn starts_or_ends(text: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let arguments = Arguments::new(name, args, &["prefix", "start", "end"])?;
    let (slice, _) = slice(text, arguments.integer(1)?, arguments.integer(2)?);
    let wanted = arguments.value(0).ok_or_else(|| Error::from(ErrorKind::MissingArgument))?;
    let texts: Vec<Value> = if wanted.as_str().is_some() { vec![wanted.clone()] } else { wanted.try_iter()?.collect() };
    let matches = |wanted: &str| if name == "startswith" { slice.starts_with(wanted) } else { slice.ends_with(wanted) };
    match texts.iter().find(|text| text.as_str().is_none()) {
        Some(other) => Err(failed(format!("{name} expects text, not {}", other.kind()))),
        None => Ok(Value::from(texts.iter().filter_map(Value::as_str).any(matches))),
    }
}

fn expand_tabs(state: &State<'_, '_>, text: &str, size: i64) -> Result<String, Error> {
    let (mut out, mut column) = (String::new(), 0);
    for character in text.chars() {
        match character {
            '\t' if size > 0 => {
                let blanks = size - column % size;
                charge(state, blanks as usize)?;
                out.push_str(&" ".repeat(blanks as usize));
                column += blanks;
            }
            '\t' => {}
            other => {
                out.push(other);
                column = if matches!(other, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(out)
}

fn swap_case(character: char) -> String {
    if character.is_uppercase() { character.to_lowercase().collect() } else { character.to_uppercase().collect() }
}

/// Upper case after every character without case: `It'S`.
fn title(text: &str) -> String {
    let mut out = String::new();
    let mut after_cased = false;
    for character in text.chars() {
        if after_cased {
            out.extend(character.to_lowercase())
        } else {
            out.extend(character.to_uppercase())
        }
        after_cased = character.is_lowercase() || character.is_uppercase();
    }
    out
}

fn all(text: &str, test: impl Fn(char) -> bool) -> Value {
    Value::from(!text.is_empty() && text.chars().all(test))
}

/// Whether a character is a decimal digit of some script: those come in runs of ten.
fn to_decimal(character: char) -> bool {
    const ZEROS: [u32; 24] = [
        0x30, 0x660, 0x6f0, 0x7c0, 0x966, 0x9e6, 0xa66, 0xae6, 0xb66, 0xbe6, 0xc66, 0xce6, 0xd66, 0xde6, 0xe50, 0xed0,
        0xf20, 0x1040, 0x17e0, 0x1810, 0x1946, 0xa620, 0xa8d0, 0xff10,
    ];
    ZEROS.iter().any(|&zero| (zero..zero + 10).contains(&(character as u32)))
}

fn is_identifier(text: &str) -> bool {
    let mut characters = text.chars();
    let first = characters.next().is_some_and(|first| first.is_alphabetic() || first == '_');
    first && characters.all(|other| other.is_alphanumeric() || other == '_')
}

fn is_printable(character: char) -> bool {
    let is_separator = (character.is_whitespace() && character != ' ')
        || matches!(character, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{feff}' | '\u{ad}');
    !character.is_control() && !is_separator
}

/// A number that is not an integer.
pub(super) fn float_of(value: &Value) -> Option<f64> {
    let is_float = value.kind() == ValueKind::Number && !value.is_integer();
    if is_float { f64::try_from(value.clone()).ok() } else { None }
}

/// Python's `repr` of a float.
pub(super) fn float_repr(float: f64) -> String {
    let scientific = format!("{float:e}");
    let Some((mantissa, exponent)) = scientific.split_once('e') else {
        return if float.is_nan() { "nan".to_owned() } else { scientific };
    };
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let text = float.to_string();
        return if text.contains('.') { text } else { text + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{mantissa}e{sign}{:02}", exponent.abs())
}

/// Python's `str` of a value.
pub(super) fn str_of(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    if value.as_str().is_some() { Ok(value.to_string()) } else { repr(state, value) }
}

/// Python's `repr` of a value. minijinja's own differs for floats and unprintable characters.
fn repr(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    write_repr(state, value, 0, &mut out)?;
    Ok(out)
}

fn write_repr(state: &State<'_, '_>, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
    check_nesting(state, depth)?;
    match (value.kind(), float_of(value)) {
        (_, Some(float)) => out.push_str(&float_repr(float)),
        (ValueKind::String, _) => out.push_str(&text_repr(value.as_str().unwrap_or_default())),
        (ValueKind::Seq, _) => {
            let is_tuple = value.is_tuple();
            out.push(if is_tuple { '(' } else { '[' });
            let mut count = 0;
            for item in value.try_iter()? {
                out.push_str(if count > 0 { ", " } else { "" });
                write_repr(state, &item, depth + 1, out)?;
                count += 1;
            }
            out.push_str(match (is_tuple, count) {
                (false, _) => "]",
                (true, 1) => ",)",
                (true, _) => ")",
            });
        }
        (ValueKind::Map, _) => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                write_repr(state, &key, depth + 1, out)?;
                out.push_str(": ");
                write_repr(state, &value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

/// Call it for each value that is shown: lists may hold each other deeper than a stack reaches, and
/// the same one so often that their text has no end.
pub(super) fn check_nesting(state: &State<'_, '_>, depth: usize) -> Result<(), Error> {
    if depth > MAX_NESTING {
        return Err(failed(format!("values are nested more than {MAX_NESTING} deep")));
    }
    state.consume_fuel(1)
}

fn text_repr(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            other if other == quote => out.extend(['\\', other]),
            other if is_printable(other) => out.push(other),
            other if (other as u32) < 0x100 => out.push_str(&format!("\\x{:02x}", other as u32)),
            other if (other as u32) < 0x10000 => out.push_str(&format!("\\u{:04x}", other as u32)),
            other => out.push_str(&format!("\\U{:08x}", other as u32)),
        }
    }
    out.push(quote);
    out
}

/// The text of a value with HTML's special characters escaped as MarkupSafe does it.
pub(super) fn escape(state: &State<'_, '_>, value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    for character in str_of(state, value)?.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    Ok(out)
}

/// Writes what `{{ value }}` shows.
pub(super) fn write_value(out: &mut Output<'_>, state: &mut State<'_, '_>, value: &Value) -> Result<(), Error> {
    let is_container = matches!(value.kind(), ValueKind::Seq | ValueKind::Map);
    if is_container || float_of(value).is_some() {
        return out.write_str(&repr(state, value)?).map_err(Error::from);
    }
    let is_escaped = *state.auto_escape() == AutoEscape::Html && !value.is_safe();
    if is_escaped {
        out.write_str(&escape(state, value)?).map_err(Error::from)
    } else {
        write!(out, "{value}").map_err(Error::from)
    }
}

/// Python's `left % right`: of numbers, or a text with conversions such as `%s` and their values.
pub(super) fn modulo(state: &State<'_, '_>, left: &Value, right: &Value) -> Result<Value, Error> {
    if let Some(template) = left.as_str() {
        return format_percent(state, template, right).map(Value::from);
    }
    let integers = (i64::try_from(left.clone()), i64::try_from(right.clone()));
    if let (true, (Ok(left), Ok(right))) = (left.is_integer() && right.is_integer(), integers) {
        let remainder = left.checked_rem(right).ok_or_else(|| failed("modulo by zero"))?;
        let is_other_side = remainder != 0 && (remainder < 0) != (right < 0);
        return Ok(Value::from(if is_other_side { remainder + right } else { remainder }));
    }
    let (left, right) = (f64::try_from(left.clone())?, f64::try_from(right.clone())?);
    if right == 0.0 {
        return Err(failed("modulo by zero"));
    }
    Ok(Value::from(left - right * (left / right).floor()))
}

/// A conversion of a text, such as `%s`, `%-5.2f` or `%(name)d`.
static CONVERSION: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(r"%(?:\((?<key>[^)]*)\))?(?<flags>[-#0 +]*\d*(?:\.\d*)?)[hlL]?(?<type>.?)")
        .expect("the pattern is valid")
});

fn format_percent(state: &State<'_, '_>, template: &str, right: &Value) -> Result<String, Error> {
    let is_map = right.kind() == ValueKind::Map;
    let values: Vec<Value> = if right.is_tuple() { right.try_iter()?.collect() } else { vec![right.clone()] };
    let mut values = values.into_iter();
    let (mut out, mut copied) = (String::new(), 0);
    for conversion in CONVERSION.captures_iter(template) {
        let whole = conversion.get_match();
        out.push_str(&template[copied..whole.start()]);
        copied = whole.end();
        if &conversion["type"] == "%" {
            out.push('%');
            continue;
        }
        let value = match conversion.name("key") {
            Some(key) => right.get_item(&Value::from(key.as_str()))?,
            None => values.next().ok_or_else(|| failed("not enough arguments for format string"))?,
        };
        let (kind, value) = match &conversion["type"] {
            "s" => ("s", Value::from(str_of(state, &value)?)),
            "r" | "a" => ("s", Value::from(repr(state, &value)?)),
            "d" | "i" | "u" => ("d", float_of(&value).map_or(value, |float| Value::from(float as i128))),
            other => (other, value),
        };
        // Width and precision.
        let numbers = conversion["flags"].split(|character: char| !character.is_ascii_digit());
        for number in numbers.filter(|number| !number.is_empty()) {
            charge(state, number.parse().unwrap_or(usize::MAX))?;
        }
        out.push_str(&format(FormatStyle::Printf, &format!("%{}{kind}", &conversion["flags"]), &[value])?);
    }
    if values.next().is_some() && !is_map {
        return Err(failed("not all arguments converted during string formatting"));
    }
    out.push_str(&template[copied..]);
    Ok(out)
}
