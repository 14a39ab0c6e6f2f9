//! How the byte-level tokenizers of the families split text into words before they merge bytes.

use serde_json::{Value, json};

/// How Llama 3 and Qwen2 split text into words. They differ in how many digits stay together.
const LLAMA3_WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A step of a pipeline that writes bytes as characters, or reads them back.
pub(crate) fn byte_level_step(use_regex: bool) -> Value {
    json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex })
}

fn split_step(pattern: &str) -> Value {
    json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
}

/// How a byte-level tokenizer splits text into words before it merges bytes.
pub(crate) struct WordSplit {
    pub(crate) normalizer: Value,
    pub(crate) pre_tokenizer: Value,
    /// Llama 3 keeps a word that is a token whole, without merging, and adds BOS by default.
    pub(crate) is_llama3: bool,
}

impl WordSplit {
    /// The split that llama.cpp calls `rule`.
    ///
    /// # Errors
    /// The rest of a sentence about a file with another rule.
    pub(crate) fn from_rule(rule: &str) -> Result<Self, String> {
        let digits = json!({ "type": "Digits", "individual_digits": true });
        let sequence = |steps: Vec<Value>| json!({ "type": "Sequence", "pretokenizers": steps });
        let (mut normalizer, mut is_llama3) = (Value::Null, false);
        let pre_tokenizer = match rule {
            "gpt-2" => byte_level_step(true),
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => {
                sequence(vec![digits, byte_level_step(true)])
            }
            "llama-bpe" | "llama3" | "llama-v3" => {
                is_llama3 = true;
                sequence(vec![split_step(LLAMA3_WORDS), byte_level_step(false)])
            }
            "qwen2" | "deepseek-r1-qwen" => {
                normalizer = json!({ "type": "NFC" });
                sequence(vec![split_step(QWEN2_WORDS), byte_level_step(false)])
            }
            "deepseek-coder" => {
                let patterns = ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+"];
                sequence(patterns.into_iter().map(split_step).chain([digits, byte_level_step(false)]).collect())
            }
            other => {
                return Err(format!(
                    "has a tokenizer that splits text by the rule `{other}`; only gpt-2, smollm, llama-bpe, qwen2 and \
                     deepseek-coder are supported"
                ));
            }
        };
        Ok(WordSplit { normalizer, pre_tokenizer, is_llama3 })
    }
}
