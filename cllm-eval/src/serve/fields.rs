//! The fields of a request's JSON object. Each is taken out by its name; what is left at the end is
//! not supported, and refused rather than ignored.

use std::ops::RangeInclusive;

use axum::http::StatusCode;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::api_error::ApiError;

pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// # Errors
    /// For a body that is no JSON object.
    pub(super) fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let invalid = |message: String| ApiError::new(StatusCode::BAD_REQUEST, message).with_code("invalid_json");
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Fields(fields)),
            Ok(_) => Err(invalid("the body is no JSON object: send one with a field for each parameter".to_owned())),
            Err(error) => Err(invalid(format!("the body is not valid JSON: {error}"))),
        }
    }

    /// Takes a field; `None` if it is missing or null. `expected` says what it has to be.
    ///
    /// # Errors
    /// For a value of another type.
    pub(super) fn take<T: DeserializeOwned>(&mut self, name: &str, expected: &str) -> Result<Option<T>, ApiError> {
        match self.0.shift_remove(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match serde_json::from_value(value) {
                Ok(value) => Ok(Some(value)),
                Err(_) => Err(ApiError::field(name, format!("expected {expected}"))),
            },
        }
    }

    /// Takes a number within bounds.
    ///
    /// # Errors
    /// For another type, or a number out of bounds.
    pub(super) fn take_within<T>(&mut self, name: &str, bounds: RangeInclusive<T>) -> Result<Option<T>, ApiError>
    where
        T: DeserializeOwned + PartialOrd + std::fmt::Display,
    {
        let expected = format!("a number from {} to {}", bounds.start(), bounds.end());
        let value = self.take(name, &expected)?;
        match value.as_ref().is_some_and(|value| !bounds.contains(value)) {
            true => Err(ApiError::field(name, format!("expected {expected}"))),
            false => Ok(value),
        }
    }

    /// Refuses every field that was not taken, unless its value asks for nothing.
    ///
    /// # Errors
    /// Names the first such field.
    pub(super) fn refuse_rest(self) -> Result<(), ApiError> {
        for (name, value) in self.0 {
            let neutral = neutral_values(&name);
            if value.is_null() || neutral.contains(&value) || name == "user" {
                continue;
            }
            let advice = match &neutral[..] {
                [] => "leave it out".to_owned(),
                [first, ..] => format!("leave it out, or set it to {first}"),
            };
            let message = format!("is not supported: {advice}");
            return Err(ApiError::field(name, message).with_code("unsupported_parameter"));
        }
        Ok(())
    }
}

/// The values of an unsupported field that change nothing.
fn neutral_values(name: &str) -> Vec<Value> {
    match name {
        "presence_penalty" | "frequency_penalty" => vec![json!(0), json!(0.0)],
        "best_of" => vec![json!(1)],
        "tools" | "functions" => vec![json!([])],
        "tool_choice" | "function_call" => vec![json!("none"), json!("auto")],
        "parallel_tool_calls" => vec![json!(true), json!(false)],
        "response_format" => vec![json!({ "type": "text" })],
        "modalities" => vec![json!(["text"])],
        "logit_bias" | "metadata" => vec![json!({})],
        "store" => vec![json!(false)],
        "service_tier" => vec![json!("auto"), json!("default")],
        "suffix" => vec![json!("")],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(value: Value) -> Fields {
        Fields::parse(value.to_string().as_bytes()).unwrap_or_else(|error| panic!("{error:?}"))
    }

    #[test]
    fn what_nobody_takes_is_refused_by_name_unless_it_asks_for_nothing() {
        fields(json!({ "best_of": 1, "frequency_penalty": 0.0, "user": "u", "tools": null })).refuse_rest().unwrap();
        for (value, name) in
            [(json!({ "logit_bias": { "5": 1 } }), "logit_bias"), (json!({ "no_such": false }), "no_such")]
        {
            let error = fields(value).refuse_rest().unwrap_err();
            assert_eq!((error.param.as_deref(), error.code), (Some(name), Some("unsupported_parameter")));
            assert!(error.message.starts_with(&format!("{name}: is not supported: leave it out")), "{error:?}");
        }
    }

    #[test]
    fn fields_of_a_wrong_type_or_out_of_bounds_are_refused_by_name() {
        let mut given = fields(json!({ "n": 3.5, "temperature": 7, "stop": null, "seed": 3 }));
        assert_eq!(given.take_within("n", 1..=8u64).unwrap_err().message, "n: expected a number from 1 to 8");
        let error = given.take_within("temperature", 0.0..=2.0).unwrap_err();
        assert_eq!(error.message, "temperature: expected a number from 0 to 2");
        assert!(given.take::<String>("stop", "text").unwrap().is_none());
        assert_eq!(given.take::<i64>("seed", "a whole number").unwrap(), Some(3));
        for body in [&b"[1]"[..], b"{", b"\xff", b""] {
            assert_eq!(Fields::parse(body).err().map(|error| error.status), Some(StatusCode::BAD_REQUEST));
        }
    }
}
