//! Python's `json.dumps`, which the filter `tojson` calls.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, State, Value};

use super::filters::blanks;
use super::python::{Arguments, charge, check_nesting, failed, float_of, float_repr};

/// `tojson` as `transformers` defines it: it escapes nothing for HTML.
pub(super) fn to_json(
    state: &State<'_, '_>,
    value: &Value,
    positional: Rest<Value>,
    named: Kwargs,
) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let arguments = Arguments::named("tojson", &positional, &named, &names)?;
    let indent = match arguments.value(1) {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(_) => Some(blanks(state, arguments.integer(1)?.unwrap_or(0))?),
    };
    let separator = |index: i64, default: &str| match arguments.value(2) {
        None => Ok(default.to_owned()),
        Some(pair) => pair.get_item(&Value::from(index)).map(|text| text.to_string()),
    };
    let mut dump = Dump {
        state,
        out: String::new(),
        item_separator: separator(0, if indent.is_some() { "," } else { ", " })?,
        key_separator: separator(1, ": ")?,
        indent,
        ensure_ascii: arguments.flag(0),
        sort_keys: arguments.flag(3),
    };
    dump.write(value, 0)?;
    Ok(dump.out)
}

struct Dump<'s, 't, 'e> {
    state: &'s State<'t, 'e>,
    out: String,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Dump<'_, '_, '_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        check_nesting(self.state, depth)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool | ValueKind::Number => self.out.push_str(&scalar(value)),
            ValueKind::String => self.write_text(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.write_list(value, depth)?,
            ValueKind::Map => self.write_dict(value, depth)?,
            other => return Err(failed(format!("tojson: {other} is not JSON serializable"))),
        }
        Ok(())
    }

    fn write_list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let items: Vec<Value> = value.try_iter()?.collect();
        self.out.push('[');
        for (index, item) in items.iter().enumerate() {
            self.begin_item(index, depth + 1)?;
            self.write(item, depth + 1)?;
        }
        self.end(items.is_empty(), ']', depth)
    }

    fn write_dict(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut items = Vec::new();
        for key in value.try_iter()? {
            let item = value.get_item(&key)?;
            items.push((key.as_str().map_or_else(|| scalar(&key), str::to_owned), item));
        }
        if self.sort_keys {
            items.sort_by(|(a, _), (b, _)| a.cmp(b));
        }
        self.out.push('{');
        for (index, (key, item)) in items.iter().enumerate() {
            self.begin_item(index, depth + 1)?;
            self.write_text(key);
            self.out.push_str(&self.key_separator);
            self.write(item, depth + 1)?;
        }
        self.end(items.is_empty(), '}', depth)
    }

    fn begin_item(&mut self, index: usize, depth: usize) -> Result<(), Error> {
        charge(self.state, self.item_separator.len() + self.key_separator.len())?;
        if index > 0 {
            self.out.push_str(&self.item_separator);
        }
        self.new_line(depth)
    }

    fn end(&mut self, is_empty: bool, bracket: char, depth: usize) -> Result<(), Error> {
        if !is_empty {
            self.new_line(depth)?;
        }
        self.out.push(bracket);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) -> Result<(), Error> {
        if let Some(indent) = &self.indent {
            charge(self.state, indent.len().saturating_mul(depth))?;
            self.out.push('\n');
            self.out.push_str(&indent.repeat(depth));
        }
        Ok(())
    }

    fn write_text(&mut self, text: &str) {
        self.out.push('"');
        for character in text.chars() {
            match character {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                other if other < ' ' || (self.ensure_ascii && !(' '..='~').contains(&other)) => {
                    for unit in other.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                other => self.out.push(other),
            }
        }
        self.out.push('"');
    }
}

/// A number, a boolean or null, as a value or as a key.
fn scalar(value: &Value) -> String {
    match (value.kind(), float_of(value)) {
        (ValueKind::None, _) => "null".to_owned(),
        (ValueKind::Bool, _) => value.is_true().to_string(),
        (_, Some(float)) if float.is_nan() => "NaN".to_owned(),
        (_, Some(float)) if float.is_infinite() => if float > 0.0 { "Infinity" } else { "-Infinity" }.to_owned(),
        (_, Some(float)) => float_repr(float),
        _ => value.to_string(),
    }
}
