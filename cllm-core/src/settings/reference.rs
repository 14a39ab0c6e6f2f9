//! The settings of a verb as a Markdown table, drawn from the struct itself: doc comments say what a key does, `Default`
//! and the rules of `garde` give the rest.

use std::collections::HashSet;

use garde::Validate;
use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

/// Describes every key of `T` under a heading; not those of a section marked `elsewhere`, which another heading has.
pub fn reference<T: JsonSchema + Default + Validate<Context = ()>>(heading: &str) -> String {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    let schema = settings.into_generator().into_root_schema_for::<T>();
    // What the rules refuse unless it is given.
    let demanded = match T::default().validate() {
        Ok(()) => HashSet::new(),
        Err(report) => report.iter().map(|(path, _)| path.to_string()).collect(),
    };
    let mut rows = Vec::new();
    describe("", schema.as_object().unwrap_or(&Map::new()), &demanded, &mut rows);
    let header = "| key | type | default | allowed | what it does |\n| --- | --- | --- | --- | --- |";
    format!("### {heading}\n\n{header}\n{}\n", rows.join("\n"))
}

/// Adds a row for each key of a section, and for those of the sections in it.
fn describe(prefix: &str, section: &Map<String, Value>, demanded: &HashSet<String>, rows: &mut Vec<String>) {
    for (key, schema) in section.get("properties").and_then(Value::as_object).into_iter().flatten() {
        let key = format!("{prefix}{key}");
        let inner = not_null(schema);
        let is_section = inner.get("properties").is_some();
        let default = match &schema["default"] {
            _ if demanded.contains(&key) => "must be given".to_owned(),
            Value::Null => "none".to_owned(),
            Value::String(text) if text.is_empty() => "empty".to_owned(),
            Value::String(text) => format!("`{text}`"),
            _ if is_section => String::new(),
            other => format!("`{other}`"),
        };
        let kind = if is_section { "section".to_owned() } else { kind(inner) };
        let mut lines = vec![text(&schema["description"])];
        lines.extend(choices(inner));
        let cells = [format!("`{key}`"), kind, default, allowed(inner), lines.join("<br>")];
        rows.push(format!("| {} |", cells.map(|cell| cell.replace('|', "\\|")).join(" | ")));
        let elsewhere = schema["elsewhere"] == true;
        if let (true, false, Some(inner)) = (is_section, elsewhere, inner.as_object()) {
            describe(&format!("{key}."), inner, demanded, rows);
        }
    }
}

/// The schema of a value that may be left out, as if it may not.
fn not_null(schema: &Value) -> &Value {
    let either = schema["anyOf"].as_array();
    either.and_then(|either| either.iter().find(|one| one["type"] != "null")).unwrap_or(schema)
}

fn kind(schema: &Value) -> String {
    let name = match &schema["type"] {
        Value::Array(names) => names.iter().find(|name| *name != "null").and_then(Value::as_str),
        name => name.as_str(),
    };
    match name {
        Some("array") => format!("list of {}s", kind(&schema["items"])),
        Some(name) => name.to_owned(),
        None => "choice".to_owned(),
    }
}

/// Each variant of an enum, or of the items of a list, with its doc comment.
fn choices(schema: &Value) -> Vec<String> {
    let variants = schema["oneOf"].as_array().or(schema["items"]["oneOf"].as_array());
    let choice = |variant: &Value| {
        let name = match (&variant["const"], variant["properties"].as_object().and_then(|fields| fields.iter().next()))
        {
            (Value::String(name), _) => name.clone(),
            (_, Some((name, fields))) => {
                let fields = fields["properties"].as_object().into_iter().flatten();
                let fields: Vec<_> = fields.map(|(field, schema)| format!("{field}: {}", kind(schema))).collect();
                format!("{name}: {{{}}}", fields.join(", "))
            }
            _ => String::new(),
        };
        format!("`{name}`: {}", text(&variant["description"]))
    };
    variants.into_iter().flatten().map(choice).collect()
}

fn allowed(schema: &Value) -> String {
    // Bounds of an integer's machine type say nothing to a user.
    let bound = |name: &str| schema.get(name).filter(|bound| bound.as_f64().is_some_and(|bound| bound.abs() < 1e9));
    match (bound("minimum"), bound("maximum")) {
        (Some(least), Some(most)) => format!("{least} to {most}"),
        (Some(least), None) => format!("at least {least}"),
        (None, Some(most)) => format!("at most {most}"),
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

    /// How it is done.
    #[derive(serde::Serialize, serde::Deserialize, JsonSchema)]
    #[serde(rename_all = "lowercase")]
    enum Way {
        /// Slowly.
        Slow,
        /// In steps.
        Steps {
            /// So many.
            n: usize,
        },
    }

    #[derive(serde::Serialize, serde::Deserialize, JsonSchema, Validate)]
    #[serde(default)]
    struct Inner {
        /// a || b.
        #[garde(range(min = 0.5, max = 1.0))]
        rate: f64,
    }

    #[derive(serde::Serialize, serde::Deserialize, JsonSchema, Validate)]
    #[serde(default)]
    struct Top {
        /// Where
        /// it goes.
        #[garde(length(min = 1))]
        output: String,
        /// Perhaps.
        #[garde(dive)]
        inner: Option<Inner>,
        /// As there.
        #[garde(skip)]
        #[schemars(extend("elsewhere" = true))]
        other: Inner,
        /// The way.
        #[garde(skip)]
        way: Way,
        /// The first so many.
        #[garde(range(min = 2))]
        limit: Option<usize>,
    }

    impl Default for Inner {
        fn default() -> Self {
            Inner { rate: 1e-8 }
        }
    }

    impl Default for Top {
        fn default() -> Self {
            Top { output: String::new(), inner: None, other: Inner::default(), way: Way::Slow, limit: Some(3) }
        }
    }

    #[test]
    fn every_key_has_a_row_with_what_the_struct_says_of_it() {
        let text = reference::<Top>("x");
        let rows: Vec<&str> = text.lines().skip(4).collect();
        assert_eq!(
            rows,
            [
                "| `output` | string | must be given | not empty | Where it goes. |",
                "| `inner` | section | none |  | Perhaps. |",
                "| `inner.rate` | number | `1e-8` | 0.5 to 1.0 | a \\|\\| b. |",
                "| `other` | section |  |  | As there. |",
                "| `way` | choice | `slow` |  | The way.<br>`slow`: Slowly.<br>`steps: {n: integer}`: In steps. |",
                "| `limit` | integer | `3` | at least 2 | The first so many. |",
            ]
        );
    }
}
