//! Published model shapes by name, to measure speed without downloading weights.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::config::ModelConfig;
use crate::{Error, Result};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ModelPreset {
    /// SmolLM2-135M.
    #[serde(rename = "135M")]
    SmolLm2_135M,
    /// SmolLM2-1.7B.
    #[serde(rename = "1.7B")]
    SmolLm2_1_7B,
    /// Llama 2 7B.
    #[serde(rename = "7B")]
    Llama2_7B,
}

impl ModelPreset {
    /// The configuration of the preset. `vocab_size`, if given, replaces the preset's own.
    ///
    /// # Errors
    /// [`Error::Usage`] when the vocabulary size is out of range.
    pub fn config(self, vocab_size: Option<usize>) -> Result<ModelConfig> {
        let mut config = match self {
            ModelPreset::SmolLm2_135M => json!({
                "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
                "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                "max_position_embeddings": 8192, "tie_word_embeddings": true,
            }),
            ModelPreset::SmolLm2_1_7B => json!({
                "model_type": "llama", "vocab_size": 49152, "hidden_size": 2048, "intermediate_size": 8192,
                "num_hidden_layers": 24, "num_attention_heads": 32,
                "max_position_embeddings": 8192, "tie_word_embeddings": true,
            }),
            ModelPreset::Llama2_7B => json!({
                "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
                "num_hidden_layers": 32, "num_attention_heads": 32,
                "max_position_embeddings": 4096,
            }),
        };
        if let Some(vocab_size) = vocab_size {
            config["vocab_size"] = json!(vocab_size);
        }
        ModelConfig::from_json(&config).map_err(Error::usage)
    }

    /// Its name in settings.
    pub fn name(self) -> &'static str {
        match self {
            ModelPreset::SmolLm2_135M => "135M",
            ModelPreset::SmolLm2_1_7B => "1.7B",
            ModelPreset::Llama2_7B => "7B",
        }
    }
}
