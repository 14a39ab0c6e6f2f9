//! The width of a rolling window.

use std::borrow::Cow;
use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Number of tokens of a window. In settings and files a number, or `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// The same number in every forward.
    Fixed(usize),
    /// Chosen for every forward.
    Auto,
}

const AUTO: &str = "auto";

impl fmt::Display for Width {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Width::Fixed(n) => n.fmt(out),
            Width::Auto => out.write_str(AUTO),
        }
    }
}

impl Serialize for Width {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Width::Fixed(n) => n.serialize(serializer),
            Width::Auto => serializer.serialize_str(AUTO),
        }
    }
}

impl<'de> Deserialize<'de> for Width {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NumberOrAuto;
        impl Visitor<'_> for NumberOrAuto {
            type Value = Width;

            fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(out, "a whole number or {AUTO}")
            }

            fn visit_u64<E: Error>(self, n: u64) -> Result<Width, E> {
                let too_large = |_| E::invalid_value(Unexpected::Unsigned(n), &self);
                usize::try_from(n).map(Width::Fixed).map_err(too_large)
            }

            fn visit_i64<E: Error>(self, n: i64) -> Result<Width, E> {
                let negative = |_| E::invalid_value(Unexpected::Signed(n), &self);
                u64::try_from(n).map_err(negative).and_then(|n| self.visit_u64(n))
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Width, E> {
                if text == AUTO { Ok(Width::Auto) } else { Err(E::invalid_value(Unexpected::Str(text), &self)) }
            }
        }
        deserializer.deserialize_any(NumberOrAuto)
    }
}

impl JsonSchema for Width {
    fn schema_name() -> Cow<'static, str> {
        "Width".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "integer", "minimum": 0 }, { "const": AUTO }] })
    }
}
