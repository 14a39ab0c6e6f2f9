//! The published models by name: their config.json without their weights, to measure speed and to
//! rehearse a job on random weights.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::ModelConfig;
use crate::{Error, Result};

/// The shape of a published model: its family and sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ModelShape {
    /// Qwen3 0.6B.
    #[serde(rename = "qwen3-0.6b")]
    Qwen3_0_6B,
    /// Qwen3 1.7B.
    #[serde(rename = "qwen3-1.7b")]
    Qwen3_1_7B,
    /// Qwen3 4B.
    #[serde(rename = "qwen3-4b")]
    Qwen3_4B,
    /// Qwen3 8B.
    #[serde(rename = "qwen3-8b")]
    Qwen3_8B,
    /// Llama 3.2 1B.
    #[serde(rename = "llama-3.2-1b")]
    Llama3_2_1B,
    /// Llama 3.2 3B.
    #[serde(rename = "llama-3.2-3b")]
    Llama3_2_3B,
    /// Llama 3.1 8B.
    #[serde(rename = "llama-3.1-8b")]
    Llama3_1_8B,
    /// Qwen2.5 0.5B.
    #[serde(rename = "qwen2.5-0.5b")]
    Qwen2_5_0_5B,
    /// Qwen2.5 1.5B.
    #[serde(rename = "qwen2.5-1.5b")]
    Qwen2_5_1_5B,
    /// Qwen2.5 3B.
    #[serde(rename = "qwen2.5-3b")]
    Qwen2_5_3B,
    /// Qwen2.5 7B.
    #[serde(rename = "qwen2.5-7b")]
    Qwen2_5_7B,
    /// Mistral 7B v0.3.
    #[serde(rename = "mistral-7b")]
    Mistral7B,
    /// SmolLM2 135M.
    #[serde(rename = "smollm2-135m")]
    SmolLm2_135M,
    /// SmolLM2 1.7B.
    #[serde(rename = "smollm2-1.7b")]
    SmolLm2_1_7B,
    /// Llama 2 7B.
    #[serde(rename = "llama-2-7b")]
    Llama2_7B,
    /// Not published: a Qwen3 of 140 thousand weights, to try a rehearsal in seconds on a CPU.
    #[serde(rename = "qwen3-tiny")]
    Qwen3Tiny,
}

impl ModelShape {
    /// config.json as published with the instruct model, for weights in bfloat16.
    pub fn json(self) -> Value {
        match self {
            ModelShape::Qwen3_0_6B => qwen3([1024, 3072, 28, 16], true),
            ModelShape::Qwen3_1_7B => qwen3([2048, 6144, 28, 16], true),
            ModelShape::Qwen3_4B => qwen3([2560, 9728, 36, 32], true),
            ModelShape::Qwen3_8B => qwen3([4096, 12288, 36, 32], false),
            ModelShape::Llama3_2_1B => llama3([2048, 8192, 16, 32], Some(64), 32.0, true),
            ModelShape::Llama3_2_3B => llama3([3072, 8192, 28, 24], Some(128), 32.0, true),
            ModelShape::Llama3_1_8B => llama3([4096, 14336, 32, 32], None, 8.0, false),
            ModelShape::Qwen2_5_0_5B => qwen2([896, 4864, 24, 14, 2], [151_936, 21, 32_768], true),
            ModelShape::Qwen2_5_1_5B => qwen2([1536, 8960, 28, 12, 2], [151_936, 21, 32_768], true),
            ModelShape::Qwen2_5_3B => qwen2([2048, 11008, 36, 16, 2], [151_936, 70, 32_768], true),
            ModelShape::Qwen2_5_7B => qwen2([3584, 18944, 28, 28, 4], [152_064, 28, 131_072], false),
            ModelShape::Mistral7B => mistral_7b(),
            ModelShape::SmolLm2_135M => smollm2([576, 1536, 30, 9, 3], 100_000),
            ModelShape::SmolLm2_1_7B => smollm2([2048, 8192, 24, 32, 32], 130_000),
            ModelShape::Llama2_7B => llama2_7b(),
            ModelShape::Qwen3Tiny => qwen3_tiny(),
        }
    }

    /// The configuration. `vocab_size`, if given, replaces the model's own.
    ///
    /// # Errors
    /// [`Error::Usage`] when the vocabulary size is out of range.
    pub fn config(self, vocab_size: Option<usize>) -> Result<ModelConfig> {
        let mut config = self.json();
        if let Some(vocab_size) = vocab_size {
            config["vocab_size"] = json!(vocab_size);
        }
        ModelConfig::from_json(&config).map_err(Error::usage)
    }
}

/// Its name in settings.
impl fmt::Display for ModelShape {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(out)
    }
}

/// A config.json with `sizes` (hidden, intermediate, layers, query heads, and key and value heads)
/// and the other fields of its family.
fn with_sizes<const N: usize>(sizes: [i64; N], family: Value) -> Value {
    let names = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"];
    let mut config = family;
    for (name, size) in names.into_iter().zip(sizes) {
        config[name] = json!(size);
    }
    config
}

/// Qwen3 in its version of April 2025, whose models think or do not.
fn qwen3(sizes: [i64; 4], is_tied: bool) -> Value {
    let family = json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu",
        "num_key_value_heads": 8, "head_dim": 128, "attention_bias": false, "attention_dropout": 0.0,
        "bos_token_id": 151_643, "eos_token_id": 151_645, "initializer_range": 0.02,
        "max_position_embeddings": 40_960, "max_window_layers": sizes[2], "rms_norm_eps": 1e-6,
        "rope_scaling": null, "rope_theta": 1_000_000, "sliding_window": null, "use_sliding_window": false,
        "tie_word_embeddings": is_tied, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
        "use_cache": true, "vocab_size": 151_936,
    });
    with_sizes(sizes, family)
}

fn qwen3_tiny() -> Value {
    let mut config = qwen3([64, 128, 2, 4], false);
    for (key, value) in [("num_key_value_heads", 2), ("head_dim", 16), ("vocab_size", 512), ("bos_token_id", 400)] {
        config[key] = json!(value);
    }
    config["eos_token_id"] = json!(402);
    config
}

/// Llama 3.1 and 3.2, whose contexts are extended by `rope_factor`. The file of 3.1 names no
/// `head_dim`.
fn llama3(sizes: [i64; 4], head_dim: Option<i64>, rope_factor: f64, is_tied: bool) -> Value {
    let mut family = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "num_key_value_heads": 8, "attention_bias": false, "attention_dropout": 0.0, "mlp_bias": false,
        "bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009], "initializer_range": 0.02,
        "max_position_embeddings": 131_072, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": rope_factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3",
        },
        "rope_theta": 500_000.0, "tie_word_embeddings": is_tied, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1", "use_cache": true, "vocab_size": 128_256,
    });
    if let Some(head_dim) = head_dim {
        family["head_dim"] = json!(head_dim);
    }
    with_sizes(sizes, family)
}

/// Qwen2.5, with the sizes of its vocabulary, and of windows that are not used.
fn qwen2(sizes: [i64; 5], [vocab_size, max_window_layers, sliding_window]: [i64; 3], is_tied: bool) -> Value {
    let family = json!({
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "attention_dropout": 0.0, "bos_token_id": 151_643, "eos_token_id": 151_645, "initializer_range": 0.02,
        "max_position_embeddings": 32_768, "max_window_layers": max_window_layers, "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0, "sliding_window": sliding_window, "use_sliding_window": false,
        "tie_word_embeddings": is_tied, "torch_dtype": "bfloat16", "transformers_version": "4.43.1",
        "use_cache": true, "vocab_size": vocab_size,
    });
    with_sizes(sizes, family)
}

/// Mistral 7B v0.3.
fn mistral_7b() -> Value {
    json!({
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.02, "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0, "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.42.0", "use_cache": true, "vocab_size": 32_768,
    })
}

fn smollm2(sizes: [i64; 5], rope_theta: i64) -> Value {
    let family = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "attention_bias": false, "attention_dropout": 0.0, "mlp_bias": false, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2, "initializer_range": 0.02, "max_position_embeddings": 8192, "pretraining_tp": 1,
        "rms_norm_eps": 1e-5, "rope_scaling": null, "rope_theta": rope_theta, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49_152,
    });
    with_sizes(sizes, family)
}

/// Llama 2 7B, whose published weights are in float16.
fn llama2_7b() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02,
        "max_position_embeddings": 4096, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_scaling": null,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.32.0",
        "use_cache": true, "vocab_size": 32_000,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_has_the_number_of_weights_of_the_published_model() {
        let published = [
            ("qwen3-0.6b", 596_049_920),
            ("qwen3-1.7b", 1_720_574_976),
            ("qwen3-4b", 4_022_468_096),
            ("qwen3-8b", 8_190_735_360),
            ("llama-3.2-1b", 1_235_814_400),
            ("llama-3.2-3b", 3_212_749_824),
            ("llama-3.1-8b", 8_030_261_248),
            ("qwen2.5-0.5b", 494_032_768),
            ("qwen2.5-1.5b", 1_543_714_304),
            ("qwen2.5-3b", 3_085_938_688),
            ("qwen2.5-7b", 7_615_616_512),
            ("mistral-7b", 7_248_023_552),
            ("smollm2-135m", 134_515_008),
            ("smollm2-1.7b", 1_711_376_384),
            ("llama-2-7b", 6_738_415_616),
        ];
        for (name, num_parameters) in published {
            let shape: ModelShape = serde_json::from_value(json!(name)).unwrap();
            assert_eq!(shape.to_string(), name);
            let config = shape.config(None).unwrap();
            assert_eq!(config.num_parameters(), num_parameters, "{name}");
            // A folder that is written back says the same.
            let written = ModelConfig::from_json(&config.to_json("bfloat16")).unwrap();
            assert_eq!((written.head_dim, &written.rope_scaling), (config.head_dim, &config.rope_scaling), "{name}");
        }
        assert_eq!(ModelShape::Qwen3Tiny.config(Some(300)).unwrap().vocab_size, 300);
    }
}
