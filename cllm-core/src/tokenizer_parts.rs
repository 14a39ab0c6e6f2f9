//! What the parts of a tokenizer.json may do. They come from strangers, and nothing else bounds how
//! many there are, how deep they nest, and how much they make of a text.

use serde::Deserialize;
use serde_json::Value;

/// Limits on the parts of one kind. Published tokenizers have at most 8, in one sequence.
const MAX_PARTS: usize = 64;
const MAX_NESTING: usize = 4;
/// Most bytes that a text may become.
const MAX_TEXT_BYTES: usize = 1 << 30;

/// The parts of a tokenizer.json that change texts.
#[derive(Deserialize)]
struct Parts {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
}

/// How many bytes the parts can make of one.
pub(crate) struct Growth {
    encoding: f64,
    decoding: f64,
}

impl Growth {
    /// Reads the parts of a tokenizer.json, given as its text.
    ///
    /// # Errors
    /// When there are too many of them, or they nest too deep.
    pub(crate) fn read(text: &str) -> Result<Self, String> {
        let parts: Parts = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let growth = |kind: &str, part: &Value| {
            let (mut count, mut factor) = (0, 1.0);
            add(part, 0, &mut count, &mut factor).map_err(|problem| format!("{kind}: {problem}"))?;
            Ok::<f64, String>(factor)
        };
        growth("post_processor", &parts.post_processor)?;
        Ok(Growth {
            encoding: growth("normalizer", &parts.normalizer)? * growth("pre_tokenizer", &parts.pre_tokenizer)?,
            decoding: growth("decoder", &parts.decoder)?,
        })
    }

    /// # Errors
    /// When the text could become too long.
    pub(crate) fn check_encoding(&self, num_bytes: usize) -> Result<(), String> {
        check(self.encoding, num_bytes)
    }

    /// # Errors
    /// When the text of tokens with these bytes in all could become too long.
    pub(crate) fn check_decoding(&self, num_bytes: usize) -> Result<(), String> {
        check(self.decoding, num_bytes)
    }
}

fn check(factor: f64, num_bytes: usize) -> Result<(), String> {
    if num_bytes as f64 * factor <= MAX_TEXT_BYTES as f64 {
        return Ok(());
    }
    Err(format!(
        "could make {factor:.0} bytes of each of the {num_bytes} bytes of a text, more than {MAX_TEXT_BYTES} in all: shorten \
         the text, or get a tokenizer that you trust"
    ))
}

fn add(part: &Value, depth: usize, count: &mut usize, factor: &mut f64) -> Result<(), String> {
    let lists = ["normalizers", "pretokenizers", "processors", "decoders"];
    let inner: Vec<&Value> = lists.iter().filter_map(|list| part[list].as_array()).flatten().collect();
    *count += 1;
    *factor *= growth_of(part);
    if *count > MAX_PARTS {
        return Err(format!("there are more than {MAX_PARTS} parts"));
    }
    if depth > MAX_NESTING {
        return Err(format!("parts are nested more than {MAX_NESTING} deep"));
    }
    inner.into_iter().try_for_each(|part| add(part, depth + 1, count, factor))
}

/// How many bytes a part makes of one, at most.
fn growth_of(part: &Value) -> f64 {
    let length = |value: &Value| value.as_str().map_or(0, str::len) as f64;
    match part["type"].as_str() {
        Some("Replace") => match part["pattern"]["String"].as_str() {
            Some(pattern) => (length(&part["content"]) / pattern.len().max(1) as f64).max(1.0),
            // A match of nothing leaves the text as it is around it.
            None => 1.0 + length(&part["content"]),
        },
        // In front of a text that has a byte at least.
        Some("Prepend") => 1.0 + length(&part["prepend"]),
        // The longest form of a character is 18 of them (U+FDFA).
        Some("NFKC" | "NFKD" | "Precompiled") => 18.0,
        Some("NFC" | "NFD" | "Lowercase" | "BertNormalizer" | "Metaspace") => 3.0,
        Some("ByteLevel") => 2.0,
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn growth(parts: Value) -> Result<Growth, String> {
        Growth::read(&parts.to_string())
    }

    #[test]
    fn parts_that_are_many_or_nested_are_refused() {
        let lower = json!({ "type": "Lowercase" });
        let mut nested = lower.clone();
        for _ in 0..40 {
            nested = json!({ "type": "Sequence", "normalizers": [nested] });
        }
        let many = json!({ "type": "Sequence", "normalizers": vec![lower; 100] });
        for (normalizer, part) in [(nested, "nested"), (many, "more than 64")] {
            let message = growth(json!({ "normalizer": normalizer })).err().unwrap();
            assert!(message.starts_with("normalizer: ") && message.contains(part), "{message}");
        }
    }

    #[test]
    fn a_text_that_parts_could_make_too_long_is_refused() {
        let blank = json!({ "type": "Replace", "pattern": { "String": " " }, "content": "▁" });
        let llama = growth(json!({ "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" }, blank,
        ] } }))
        .unwrap();
        assert!(llama.check_encoding(30 << 20).is_ok());
        let double = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aa" });
        let parts = vec![double; 40];
        let hostile = growth(json!({
            "normalizer": { "type": "Sequence", "normalizers": parts },
            "decoder": { "type": "Sequence", "decoders": parts },
        }));
        let hostile = hostile.unwrap();
        for refusal in [hostile.check_encoding(1), hostile.check_decoding(1)] {
            assert!(refusal.unwrap_err().contains("could make 1099511627776 bytes"));
        }
    }
}
