//! config.json as it is written (`RawConfig`) and as the model uses it ([`ModelConfig`]: nothing optional).

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{Error, Result};

/// Families that are supported; they differ in biases and in the norm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Llama 1-3, SmolLM2, TinyLlama, Vicuna, DeepSeek-Coder.
    Llama,
    /// Mistral without sliding windows.
    Mistral,
    /// Qwen2, Qwen2.5.
    Qwen2,
    /// Qwen3.
    Qwen3,
}

/// How rotary positions are stretched past the trained context.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Positions divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// Llama 3: long wavelengths divided by a factor, short ones kept, a ramp between.
    Llama3 {
        /// The factor.
        factor: f64,
        /// Bound of the long wavelengths.
        low_freq_factor: f64,
        /// Bound of the short wavelengths.
        high_freq_factor: f64,
        /// The trained context.
        original_max_positions: f64,
    },
    /// YaRN (Peng et al., arXiv 2309.00071).
    Yarn {
        /// The factor.
        factor: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is divided.
        beta_slow: f64,
        /// The trained context.
        original_max_positions: f64,
        /// Scale of cosine and sine.
        attention_factor: f64,
    },
}

/// A resolved model configuration: no field is optional any more.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family.
    pub family: Family,
    /// Ids of the vocabulary.
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the feed-forward layer.
    pub intermediate_size: i64,
    /// Layers.
    pub num_layers: i64,
    /// Query heads.
    pub num_heads: i64,
    /// Key and value heads; each serves `num_heads / num_kv_heads` query heads.
    pub num_kv_heads: i64,
    /// Width of a head.
    pub head_dim: i64,
    /// Most positions the model knows.
    pub max_positions: usize,
    /// Added to the variance in the norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary wavelengths.
    pub rope_theta: f64,
    /// Stretching of positions.
    pub rope_scaling: RopeScaling,
    /// Bias of the query, key and value projections.
    pub qkv_bias: bool,
    /// Bias of the attention's output projection.
    pub output_bias: bool,
    /// Whether the output projection is the embedding.
    pub tied_embeddings: bool,
    /// config.json as it was read; what is written back.
    raw: Value,
}

#[derive(Deserialize)]
struct RawConfig {
    model_type: String,
    vocab_size: i64,
    hidden_size: i64,
    intermediate_size: i64,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_key_value_heads: Option<i64>,
    head_dim: Option<i64>,
    #[serde(default = "default_max_positions")]
    max_position_embeddings: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    #[serde(alias = "rope_parameters")]
    rope_scaling: Option<RawRope>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    #[serde(default)]
    mlp_bias: bool,
    tie_word_embeddings: Option<bool>,
    sliding_window: Option<i64>,
    use_sliding_window: Option<bool>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
struct RawRope {
    #[serde(alias = "type")]
    rope_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
}

fn default_max_positions() -> usize {
    2048
}

fn default_eps() -> f64 {
    1e-6
}

impl ModelConfig {
    /// Reads config.json of a model folder.
    ///
    /// # Errors
    /// [`Error::File`] when it is missing or broken, or names a family or feature that is not supported.
    pub fn load(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::file(folder, "there is no such model folder"));
        }
        let path = folder.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let raw: Value = serde_json::from_str(&text).map_err(|error| Error::file(&path, format!("{error}")))?;
        Self::from_json(&raw).map_err(|message| Error::file(&path, message))
    }

    /// Resolves a config.json.
    ///
    /// # Errors
    /// What is missing, wrong or not supported, in words.
    pub fn from_json(value: &Value) -> std::result::Result<Self, String> {
        let raw: RawConfig = serde_path_to_error::deserialize(value).map_err(|error| error.to_string())?;
        let family = match raw.model_type.as_str() {
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            other => {
                return Err(format!("model_type `{other}` is not supported: use llama, mistral, qwen2 or qwen3"));
            }
        };
        refuse_unsupported(&raw, family)?;
        let config = ModelConfig {
            family,
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_layers: raw.num_hidden_layers,
            num_heads: raw.num_attention_heads,
            num_kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim: raw.head_dim.unwrap_or(raw.hidden_size / raw.num_attention_heads.max(1)),
            max_positions: raw.max_position_embeddings,
            rms_norm_eps: raw.rms_norm_eps,
            rope_theta: raw
                .rope_theta
                .or(raw.rope_scaling.as_ref().and_then(|rope| rope.rope_theta))
                .unwrap_or(10_000.0),
            rope_scaling: rope_scaling(raw.rope_scaling.as_ref(), raw.max_position_embeddings)?,
            qkv_bias: raw.attention_bias.unwrap_or(family == Family::Qwen2),
            output_bias: matches!(family, Family::Llama | Family::Qwen3) && raw.attention_bias.unwrap_or(false),
            tied_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            raw: value.clone(),
        };
        config.check_sizes()?;
        Ok(config)
    }

    /// Number of weights, tied ones once.
    pub fn parameter_count(&self) -> i64 {
        self.shapes().iter().map(|(_, shape)| shape.iter().product::<i64>()).sum()
    }

    /// config.json for weights of type `dtype` (`float32`, `bfloat16`, `float16`).
    pub fn to_json(&self, dtype: &str) -> Value {
        let mut raw = self.raw.clone();
        if let Some(object) = raw.as_object_mut() {
            let architecture = match self.family {
                Family::Llama => "LlamaForCausalLM",
                Family::Mistral => "MistralForCausalLM",
                Family::Qwen2 => "Qwen2ForCausalLM",
                Family::Qwen3 => "Qwen3ForCausalLM",
            };
            object.entry("architectures").or_insert_with(|| json!([architecture]));
            object.entry("hidden_act").or_insert_with(|| json!("silu"));
            object.insert("torch_dtype".into(), json!(dtype));
            object.shift_remove("dtype");
        }
        raw
    }

    /// Name and shape of every weight, in file order.
    pub fn shapes(&self) -> Vec<(String, Vec<i64>)> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (queries, keys) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden])];
        for layer in 0..self.num_layers {
            let mut add =
                |name: &str, shape: &[i64]| shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            add("input_layernorm.weight", &[hidden]);
            for (name, rows) in [("q", queries), ("k", keys), ("v", keys)] {
                add(&format!("self_attn.{name}_proj.weight"), &[rows, hidden]);
                if self.qkv_bias {
                    add(&format!("self_attn.{name}_proj.bias"), &[rows]);
                }
            }
            if self.family == Family::Qwen3 {
                add("self_attn.q_norm.weight", &[self.head_dim]);
                add("self_attn.k_norm.weight", &[self.head_dim]);
            }
            add("self_attn.o_proj.weight", &[hidden, queries]);
            if self.output_bias {
                add("self_attn.o_proj.bias", &[hidden]);
            }
            add("post_attention_layernorm.weight", &[hidden]);
            add("mlp.gate_proj.weight", &[inner, hidden]);
            add("mlp.up_proj.weight", &[inner, hidden]);
            add("mlp.down_proj.weight", &[hidden, inner]);
        }
        shapes.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !self.tied_embeddings {
            shapes.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        shapes
    }

    fn check_sizes(&self) -> std::result::Result<(), String> {
        let sizes = [self.vocab_size, self.hidden_size, self.intermediate_size, self.num_layers, self.num_heads];
        if sizes.iter().chain([&self.num_kv_heads, &self.head_dim]).any(|&size| size < 1) {
            return Err("every size must be at least 1".to_owned());
        }
        if self.num_heads % self.num_kv_heads != 0 {
            return Err(format!(
                "num_attention_heads ({}) must be a multiple of num_key_value_heads ({})",
                self.num_heads, self.num_kv_heads
            ));
        }
        if self.head_dim % 2 != 0 {
            return Err(format!("head_dim ({}) must be even for rotary positions", self.head_dim));
        }
        Ok(())
    }
}

fn refuse_unsupported(raw: &RawConfig, family: Family) -> std::result::Result<(), String> {
    if let Some(activation) = raw.hidden_act.as_deref().filter(|&name| name != "silu" && name != "swish") {
        return Err(format!("hidden_act `{activation}` is not supported: only silu"));
    }
    if raw.quantization_config.is_some() {
        return Err("quantization_config: quantised weights are not supported; use the bf16 checkpoint".to_owned());
    }
    if raw.mlp_bias {
        return Err("mlp_bias is not supported".to_owned());
    }
    let window_in_use = match family {
        Family::Mistral => raw.sliding_window.is_some_and(|window| (window as usize) < raw.max_position_embeddings),
        _ => raw.use_sliding_window == Some(true),
    };
    if window_in_use {
        return Err("sliding-window attention is not supported; set sliding_window to null if the context you need \
                    is shorter than the window, and max_position_embeddings to that context"
            .to_owned());
    }
    Ok(())
}

fn rope_scaling(raw: Option<&RawRope>, max_positions: usize) -> std::result::Result<RopeScaling, String> {
    let Some(raw) = raw else { return Ok(RopeScaling::None) };
    let kind = raw.rope_type.as_deref().unwrap_or("default");
    let need =
        |value: Option<f64>, name: &str| value.ok_or_else(|| format!("rope_scaling of type {kind} needs `{name}`"));
    let original = raw.original_max_position_embeddings.unwrap_or(max_positions as f64);
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: need(raw.factor, "factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: need(raw.factor, "factor")?,
            low_freq_factor: need(raw.low_freq_factor, "low_freq_factor")?,
            high_freq_factor: need(raw.high_freq_factor, "high_freq_factor")?,
            original_max_positions: original,
        }),
        "yarn" => {
            if raw.mscale.is_some() || raw.mscale_all_dim.is_some() {
                return Err("rope_scaling of type yarn with mscale is not supported".to_owned());
            }
            let factor = need(raw.factor, "factor")?;
            Ok(RopeScaling::Yarn {
                factor,
                beta_fast: raw.beta_fast.unwrap_or(32.0),
                beta_slow: raw.beta_slow.unwrap_or(1.0),
                original_max_positions: original,
                attention_factor: raw.attention_factor.unwrap_or(if factor <= 1.0 {
                    1.0
                } else {
                    0.1 * factor.ln() + 1.0
                }),
            })
        }
        other => Err(format!("rope_scaling of type `{other}` is not supported: use linear, llama3 or yarn")),
    }
}
