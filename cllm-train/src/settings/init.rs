use std::path::PathBuf;

use garde::Validate;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A Llama with random weights.
#[derive(Debug, Clone, Serialize, Deserialize, Validate, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct InitSettings {
    /// Folder of the tokenizer (`cllm-train tokenizer` trains one).
    #[garde(custom(cllm_core::settings::required_path))]
    pub tokenizer: PathBuf,
    /// Width of the residual stream.
    #[garde(range(min = 2, max = 65_536))]
    pub hidden_size: i64,
    /// Width of the feed-forward layers.
    #[garde(range(min = 2, max = 1_048_576))]
    pub intermediate_size: i64,
    /// Number of layers.
    #[garde(range(min = 1, max = 1024))]
    pub num_layers: i64,
    /// Number of query heads.
    #[garde(range(min = 1, max = 1024))]
    pub num_heads: i64,
    /// Number of key and value heads.
    #[garde(range(min = 1, max = 1024))]
    pub num_kv_heads: i64,
    /// Maximum context length, in tokens.
    #[garde(range(min = 16, max = 16_777_216))]
    pub max_positions: i64,
}

impl Default for InitSettings {
    fn default() -> Self {
        InitSettings {
            tokenizer: PathBuf::new(),
            hidden_size: 128,
            intermediate_size: 384,
            num_layers: 4,
            num_heads: 4,
            num_kv_heads: 4,
            max_positions: 512,
        }
    }
}
