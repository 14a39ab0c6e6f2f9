//! Shapes of models to measure without their weights.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::ModelConfig;
use crate::{Error, Result};

/// A shape that is known by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
pub enum ModelPreset {
    /// SmolLM2-135M.
    #[serde(rename = "135M")]
    #[value(name = "135M")]
    Small,
    /// SmolLM2-1.7B.
    #[serde(rename = "1.7B")]
    #[value(name = "1.7B")]
    Middle,
    /// Llama 2 7B.
    #[serde(rename = "7B")]
    #[value(name = "7B")]
    Large,
}

impl ModelPreset {
    /// Its configuration, with another number of ids than its own if one is given.
    ///
    /// # Errors
    /// A vocabulary of no size.
    pub fn config(self, vocab_size: Option<usize>) -> Result<ModelConfig> {
        let mut value = match self {
            ModelPreset::Small => {
                json!({ "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                "max_position_embeddings": 8192, "tie_word_embeddings": true })
            }
            ModelPreset::Middle => json!({ "model_type": "llama", "vocab_size": 49152, "hidden_size": 2048,
                "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
                "max_position_embeddings": 8192, "tie_word_embeddings": true }),
            ModelPreset::Large => json!({ "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
                "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                "max_position_embeddings": 4096 }),
        };
        if let Some(ids) = vocab_size {
            value["vocab_size"] = json!(ids);
        }
        ModelConfig::from_json(&value).map_err(Error::usage)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            ModelPreset::Small => "135M",
            ModelPreset::Middle => "1.7B",
            ModelPreset::Large => "7B",
        }
    }
}
