//! config.json as the model uses it: nothing optional.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::hf_config::{RawConfig, positive, rope_json};

/// Larger sizes are mistakes; below it no product of two overflows.
const LARGEST_SIZE: i64 = 1 << 31;

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
    /// The token before every text, where the model has one.
    pub bos_id: Option<i64>,
    /// The tokens that end a text, as far as config.json knows them.
    pub eos_ids: Vec<i64>,
    /// config.json as it was read; what is written back keeps its other fields.
    raw: Value,
}

impl ModelConfig {
    /// Resolves a config.json.
    ///
    /// # Errors
    /// What is missing, wrong or not supported, in words.
    pub fn from_json(value: &Value) -> Result<Self, String> {
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
        let max_positions = raw.max_position_embeddings.unwrap_or(2048);
        raw.refuse_unsupported(family, max_positions)?;
        let head_dim = raw.head_dim.unwrap_or(match family {
            // What `transformers` takes for a Qwen3 that does not say.
            Family::Qwen3 => 128,
            _ => raw.hidden_size / raw.num_attention_heads.max(1),
        });
        let attention_bias = raw.attention_bias.unwrap_or(false);
        let config = ModelConfig {
            family,
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            num_layers: raw.num_hidden_layers,
            num_heads: raw.num_attention_heads,
            num_kv_heads: raw.num_key_value_heads.unwrap_or(raw.num_attention_heads),
            head_dim,
            max_positions,
            rms_norm_eps: positive(raw.rms_norm_eps.unwrap_or(1e-6), "rms_norm_eps")?,
            rope_theta: positive(raw.rope_theta(), "rope_theta")?,
            rope_scaling: raw.rope_scaling(max_positions)?,
            // Qwen2 always has it and Mistral never, whatever the file says.
            qkv_bias: match family {
                Family::Qwen2 => true,
                Family::Mistral => false,
                Family::Llama | Family::Qwen3 => attention_bias,
            },
            output_bias: matches!(family, Family::Llama | Family::Qwen3) && attention_bias,
            tied_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            bos_id: raw.bos_token_id,
            eos_ids: raw.eos_ids(),
            raw: value.clone(),
        };
        config.check_sizes()?;
        Ok(config)
    }

    /// Number of weights, tied ones once.
    pub fn num_parameters(&self) -> i64 {
        self.parameter_shapes().iter().map(|(_, shape)| shape.iter().product::<i64>()).sum()
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
            // Every default is written out: those of `transformers` differ between families and versions.
            for (key, value) in [
                ("hidden_act", json!("silu")),
                ("num_key_value_heads", json!(self.num_kv_heads)),
                ("head_dim", json!(self.head_dim)),
                ("max_position_embeddings", json!(self.max_positions)),
                ("rms_norm_eps", json!(self.rms_norm_eps)),
                ("rope_theta", json!(self.rope_theta)),
                ("rope_scaling", rope_json(&self.rope_scaling)),
                ("attention_bias", json!(self.output_bias)),
                ("tie_word_embeddings", json!(self.tied_embeddings)),
                ("sliding_window", Value::Null),
                ("torch_dtype", json!(dtype)),
            ] {
                object.insert(key.to_owned(), value);
            }
            for newer_name in ["dtype", "rope_parameters"] {
                object.shift_remove(newer_name);
            }
        }
        raw
    }

    /// Name and shape of every weight, in file order.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<i64>)> {
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

    fn check_sizes(&self) -> Result<(), String> {
        let sizes = [self.vocab_size, self.hidden_size, self.intermediate_size, self.num_layers, self.num_heads];
        if let Some(size) = sizes
            .iter()
            .chain([&self.num_kv_heads, &self.head_dim, &(self.max_positions as i64)])
            .find(|size| !(1..LARGEST_SIZE).contains(*size))
        {
            return Err(format!("every size must lie between 1 and 2^31, found {size}"));
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
