//! Values of settings as a user writes them: flow-style YAML without needless quotes.

use serde_json::Value;

/// A value as it stands behind `key=` on the command line, such as `[ar, {rolling: {n: 16}}]`.
pub fn written(value: &Value) -> String {
    match value {
        Value::String(text) => quoted_if_needed(text),
        Value::Array(items) => format!("[{}]", items.iter().map(written).collect::<Vec<_>>().join(", ")),
        Value::Object(section) => {
            let entries = section.iter().map(|(key, value)| format!("{key}: {}", written(value)));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

/// Quotes a text that YAML would read otherwise, or that would not end where it ends.
fn quoted_if_needed(text: &str) -> String {
    let is_read_as_text = serde_saphyr::from_str::<Value>(&format!("[{text}]"))
        .is_ok_and(|list| list.as_array().is_some_and(|items| items[..] == [Value::from(text)]));
    if is_read_as_text { text.to_owned() } else { Value::from(text).to_string() }
}

/// How a setting has changed, as a clause: `was started with seed=1; this command says 2`. `verb` is
/// such as `was started`.
pub fn change(verb: &str, key: &str, then: &Value, now: &Value) -> String {
    format!("{verb} with {key}={}; this command says {}", written(then), written(now))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_written_as_on_the_command_line() {
        for (value, expected) in [
            (json!(["ar", { "rolling": { "n": 16 } }]), "[ar, {rolling: {n: 16}}]"),
            (json!("runs/clean"), "runs/clean"),
            (json!(["runs/clean", "2024", "a, b", ""]), r#"[runs/clean, "2024", "a, b", ""]"#),
            (json!({ "rank": 4, "on": null }), "{rank: 4, on: null}"),
            (json!(0.5), "0.5"),
        ] {
            assert_eq!(written(&value), expected);
            assert_eq!(serde_saphyr::from_str::<Value>(expected).unwrap(), value);
        }
    }
}
