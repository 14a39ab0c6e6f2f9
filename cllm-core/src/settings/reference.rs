//! The settings of a verb as a Markdown table. It is made from the struct itself, so that it cannot
//! go out of date: doc comments say what a key does, and the rest comes from `Default` and the
//! rules of `garde`.

use std::collections::HashSet;

use garde::Validate;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

use super::written;

/// Describes every key of `T` under a heading. A section that is marked `elsewhere` gets one row,
/// since its keys are described under a heading of their own.
pub fn reference<T: JsonSchema + Default + Validate<Context = ()>>(heading: &str) -> String {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<T>();
    // A key is required if its default does not pass the rules.
    let required = match T::default().validate() {
        Ok(()) => HashSet::new(),
        Err(report) => report.iter().map(|(path, _)| path.to_string()).collect(),
    };
    let mut rows = Vec::new();
    add_rows("", schema.as_object().unwrap_or(&Map::new()), &required, &mut rows);
    let header = "| key | type | default | allowed | what it does |\n| --- | --- | --- | --- | --- |";
    format!("### {heading}\n\n{header}\n{}\n", rows.join("\n"))
}

/// A settings file with every key of `T` at its default, each below a comment that says what it does.
pub fn template<T: JsonSchema>() -> String {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<T>();
    let mut lines = Vec::new();
    add_lines("", schema.as_object().unwrap_or(&Map::new()), &mut lines);
    lines.join("\n") + "\n"
}

/// Adds the comment and the value of each key of a section, and those of the sections in it.
fn add_lines(indent: &str, section: &Map<String, Value>, lines: &mut Vec<String>) {
    const MAX_COLUMNS: usize = 90;
    for (key, schema) in section.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let mut comment = format!("{indent}#");
        for word in text(&schema["description"]).split(' ') {
            if comment.len() + 1 + word.len() > MAX_COLUMNS {
                lines.push(std::mem::replace(&mut comment, format!("{indent}#")));
            }
            comment = format!("{comment} {word}");
        }
        lines.push(comment);
        let inner = not_null(schema);
        match (&schema["default"], inner.as_object()) {
            (Value::Object(_), Some(inner)) if inner.contains_key("properties") => {
                lines.push(format!("{indent}{key}:"));
                add_lines(&format!("{indent}  "), inner, lines);
            }
            (default, _) => lines.push(format!("{indent}{key}: {}", written(default))),
        }
    }
}

/// Adds a row for each key of a section and of the sections in it.
fn add_rows(prefix: &str, section: &Map<String, Value>, required: &HashSet<String>, rows: &mut Vec<String>) {
    for (key, schema) in section.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let key = format!("{prefix}{key}");
        let inner = not_null(schema);
        let is_section = inner.get("properties").is_some();
        let default = match &schema["default"] {
            _ if required.contains(&key) => "required".to_owned(),
            Value::Null => "none".to_owned(),
            Value::String(text) if text.is_empty() => "empty".to_owned(),
            Value::String(text) => format!("`{text}`"),
            _ if is_section => String::new(),
            other => format!("`{}`", written(other)),
        };
        let type_name = if is_section { "section".to_owned() } else { type_name(inner) };
        let mut lines = vec![text(&schema["description"])];
        lines.extend(choices(inner));
        let cells = [format!("`{key}`"), type_name, default, allowed(inner), lines.join("<br>")];
        rows.push(format!("| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | ")));
        let elsewhere = schema["elsewhere"] == true;
        if let (true, false, Some(inner)) = (is_section, elsewhere, inner.as_object()) {
            add_rows(&format!("{key}."), inner, required, rows);
        }
    }
}

/// The schema of a value that may also be null, without the null.
fn not_null(schema: &Value) -> &Value {
    let alternatives = schema["anyOf"].as_array();
    alternatives.and_then(|schemas| schemas.iter().find(|schema| schema["type"] != "null")).unwrap_or(schema)
}

fn type_name(schema: &Value) -> String {
    if let Some(alternatives) = schema["anyOf"].as_array() {
        let names = alternatives.iter().filter(|schema| schema["type"] != "null");
        let names = names.map(|schema| schema["const"].as_str().map_or_else(|| type_name(schema), str::to_owned));
        return names.collect::<Vec<_>>().join(" or ");
    }
    let name = match &schema["type"] {
        Value::Array(names) => names.iter().find(|name| *name != "null").and_then(Value::as_str),
        name => name.as_str(),
    };
    match name {
        Some("array") => format!("list of {}s", type_name(&schema["items"])),
        Some(name) => name.to_owned(),
        None => "choice".to_owned(),
    }
}

/// Each variant of an enum (or of a list's items) with its doc comment.
fn choices(schema: &Value) -> Vec<String> {
    let variants = schema["oneOf"].as_array().or(schema["items"]["oneOf"].as_array());
    let choice = |variant: &Value| {
        let name = match (&variant["const"], variant["properties"].as_object().and_then(|fields| fields.iter().next()))
        {
            (Value::String(name), _) => name.clone(),
            (_, Some((name, fields))) => {
                let fields = fields["properties"].as_object().into_iter().flatten();
                let fields: Vec<_> = fields.map(|(field, schema)| format!("{field}: {}", type_name(schema))).collect();
                format!("{name}: {{{}}}", fields.join(", "))
            }
            _ => String::new(),
        };
        format!("`{name}`: {}", text(&variant["description"]))
    };
    variants.into_iter().flatten().map(choice).collect()
}

fn allowed(schema: &Value) -> String {
    // The bounds of an integer's machine type are of no use to a reader.
    let bound = |name: &str| schema.get(name).filter(|bound| bound.as_f64().is_some_and(|bound| bound.abs() < 1e9));
    match (bound("minimum"), bound("maximum")) {
        (Some(min), Some(max)) => format!("{min} to {max}"),
        (Some(min), None) => format!("at least {min}"),
        (None, Some(max)) => format!("at most {max}"),
        (None, None) if schema["minLength"] == 1 || schema["minItems"] == 1 => "not empty".to_owned(),
        (None, None) => String::new(),
    }
}

/// A doc comment on one line.
fn text(description: &Value) -> String {
    description.as_str().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How the work is done.
    #[derive(serde::Serialize, serde::Deserialize, JsonSchema)]
    #[serde(rename_all = "lowercase")]
    enum Way {
        /// Slowly.
        Slow,
        /// In steps.
        Steps {
            /// Number of steps.
            n: usize,
        },
    }

    #[derive(serde::Serialize, serde::Deserialize, JsonSchema, Validate)]
    #[serde(default)]
    struct Inner {
        /// a || b.
        #[garde(range(min = 0.5, max = 1.0))]
        ratio: f64,
    }

    #[derive(serde::Serialize, serde::Deserialize, JsonSchema, Validate)]
    #[serde(default)]
    struct Top {
        /// Folder for
        /// the results.
        #[garde(length(min = 1))]
        output: String,
        /// An optional section.
        #[garde(dive)]
        inner: Option<Inner>,
        /// Has its own heading.
        #[garde(skip)]
        #[schemars(extend("elsewhere" = true))]
        other: Inner,
        /// The way.
        #[garde(skip)]
        way: Way,
        /// Use only the first N.
        #[garde(range(min = 2))]
        limit: Option<usize>,
    }

    impl Default for Inner {
        fn default() -> Self {
            Inner { ratio: 1e-8 }
        }
    }

    impl Default for Top {
        fn default() -> Self {
            Top { output: String::new(), inner: None, other: Inner::default(), way: Way::Slow, limit: Some(3) }
        }
    }

    #[test]
    fn every_key_has_a_row_made_from_its_field() {
        let text = reference::<Top>("x");
        let rows: Vec<&str> = text.lines().skip(4).collect();
        assert_eq!(
            rows,
            [
                "| `output` | string | required | not empty | Folder for the results. |",
                "| `inner` | section | none |  | An optional section. |",
                "| `inner.ratio` | number | `1e-8` | 0.5 to 1.0 | a \\|\\| b. |",
                "| `other` | section |  |  | Has its own heading. |",
                "| `way` | choice | `slow` |  | The way.<br>`slow`: Slowly.<br>`steps: {n: integer}`: In steps. |",
                "| `limit` | integer | `3` | at least 2 | Use only the first N. |",
            ]
        );
    }
}
