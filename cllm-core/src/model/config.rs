//! The configuration of a model, resolved from config.json: nothing is optional any more.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::hf_config::{DEFAULT_MAX_WINDOW_LAYERS, DEFAULT_WINDOW, HfConfig, positive, rope_scaling_json};
use super::rope::RopeScaling;

/// Sizes from this one on are refused as mistakes. Products of two smaller sizes do not overflow.
const SIZE_LIMIT: i64 = 1 << 31;
/// Several times as many as any published model has. Every layer is listed, whatever files hold it.
const MAX_LAYERS: i64 = 1024;

/// The supported families. They differ in their biases and in the norm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Llama 1-3, SmolLM2, TinyLlama, Vicuna, DeepSeek-Coder.
    Llama,
    /// Mistral 7B.
    Mistral,
    /// Qwen2, Qwen2.5.
    Qwen2,
    /// Qwen3.
    Qwen3,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub vocab_size: i64,
    /// Width of the residual stream.
    pub hidden_size: i64,
    /// Width of the feed-forward layer.
    pub intermediate_size: i64,
    pub num_layers: i64,
    /// Query heads.
    pub num_heads: i64,
    /// Key and value heads; each serves `num_heads / num_kv_heads` query heads.
    pub num_kv_heads: i64,
    pub head_dim: i64,
    /// Longest context, in tokens: the extended one if RoPE is scaled
    /// ([`RopeScaling::max_positions`]).
    pub max_positions: usize,
    /// For each layer, the number of tokens that a token attends to, itself included; `None` if it
    /// attends to all before it.
    pub sliding_windows: Vec<Option<i32>>,
    /// Added to the variance in the norms.
    pub rms_norm_eps: f64,
    /// Base of the frequencies of RoPE.
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection of the attention has a bias.
    pub output_bias: bool,
    /// Whether the embedding is the output projection too.
    pub tied_embeddings: bool,
    /// The token before every text, if the model has one.
    pub bos_id: Option<i64>,
    /// The tokens that end a text, as far as config.json names them.
    pub eos_ids: Vec<i64>,
    /// The context in config.json, before RoPE is scaled.
    max_position_embeddings: usize,
    /// config.json as it was read. Its other fields are kept when it is written back.
    json: Value,
}

impl ModelConfig {
    /// Resolves a config.json.
    ///
    /// # Errors
    /// A message that says what is missing, invalid or not supported.
    pub fn from_json(json: &Value) -> Result<Self, String> {
        let hf: HfConfig = serde_path_to_error::deserialize(json).map_err(|error| error.to_string())?;
        let family = match hf.model_type.as_str() {
            "llama" => Family::Llama,
            "mistral" => Family::Mistral,
            "qwen2" => Family::Qwen2,
            "qwen3" => Family::Qwen3,
            other => {
                return Err(format!("model_type `{other}` is not supported: use llama, mistral, qwen2 or qwen3"));
            }
        };
        if !(1..=MAX_LAYERS).contains(&hf.num_hidden_layers) {
            return Err(format!(
                "num_hidden_layers must be between 1 and {MAX_LAYERS}, found {}",
                hf.num_hidden_layers
            ));
        }
        let max_position_embeddings = hf.max_position_embeddings(family);
        let rope = hf.rope()?;
        hf.refuse_unsupported(family, &rope)?;
        let rope_scaling = hf.rope_scaling(&rope, max_position_embeddings)?;
        let max_positions = rope_scaling.max_positions(max_position_embeddings);
        let head_dim = hf.head_dim.unwrap_or(match family {
            // The default of `transformers`.
            Family::Qwen3 => 128,
            _ => hf.hidden_size / hf.num_attention_heads.max(1),
        });
        let attention_bias = hf.attention_bias.unwrap_or(false);
        let config = ModelConfig {
            family,
            vocab_size: hf.vocab_size,
            hidden_size: hf.hidden_size,
            intermediate_size: hf.intermediate_size,
            num_layers: hf.num_hidden_layers,
            num_heads: hf.num_attention_heads,
            num_kv_heads: hf.num_kv_heads(family),
            head_dim,
            max_positions,
            sliding_windows: hf.sliding_windows(family, max_positions)?,
            rms_norm_eps: positive(hf.rms_norm_eps.unwrap_or(1e-6), "rms_norm_eps")?,
            rope_theta: positive(hf.rope_theta(&rope), "rope_theta")?,
            rope_scaling,
            // Qwen2 always has biases and Mistral never, whatever the file says.
            qkv_bias: match family {
                Family::Qwen2 => true,
                Family::Mistral => false,
                Family::Llama | Family::Qwen3 => attention_bias,
            },
            output_bias: matches!(family, Family::Llama | Family::Qwen3) && attention_bias,
            tied_embeddings: hf.tie_word_embeddings.unwrap_or(false),
            bos_id: hf.bos_token_id,
            eos_ids: hf.eos_ids(),
            max_position_embeddings,
            json: json.clone(),
        };
        config.check_sizes()?;
        Ok(config)
    }

    /// Number of parameters; tied ones count once.
    pub fn num_parameters(&self) -> i64 {
        self.parameter_shapes().iter().map(|(_, shape)| shape.iter().product::<i64>()).sum()
    }

    /// config.json for weights of type `dtype` (`float32`, `bfloat16`, `float16`).
    pub fn to_json(&self, dtype: &str) -> Value {
        let mut config = self.json.clone();
        if let Some(object) = config.as_object_mut() {
            let architecture = match self.family {
                Family::Llama => "LlamaForCausalLM",
                Family::Mistral => "MistralForCausalLM",
                Family::Qwen2 => "Qwen2ForCausalLM",
                Family::Qwen3 => "Qwen3ForCausalLM",
            };
            object.entry("architectures").or_insert_with(|| json!([architecture]));
            // Defaults are written out, because those of `transformers` differ between families and
            // versions.
            for (key, value) in [
                ("hidden_act", json!("silu")),
                ("num_key_value_heads", json!(self.num_kv_heads)),
                ("head_dim", json!(self.head_dim)),
                ("max_position_embeddings", json!(self.max_position_embeddings)),
                ("rms_norm_eps", json!(self.rms_norm_eps)),
                ("rope_theta", json!(self.rope_theta)),
                ("rope_scaling", rope_scaling_json(&self.rope_scaling)),
                ("attention_bias", json!(self.output_bias)),
                ("tie_word_embeddings", json!(self.tied_embeddings)),
                ("torch_dtype", json!(dtype)),
            ] {
                object.insert(key.to_owned(), value);
            }
            if self.family != Family::Llama {
                object.entry("sliding_window").or_insert_with(|| json!(DEFAULT_WINDOW));
            }
            if matches!(self.family, Family::Qwen2 | Family::Qwen3) {
                object.entry("use_sliding_window").or_insert_with(|| json!(false));
                object.entry("max_window_layers").or_insert_with(|| json!(DEFAULT_MAX_WINDOW_LAYERS));
            }
            // Newer names of what is written above.
            for key in ["dtype", "rope_parameters", "original_max_position_embeddings"] {
                object.shift_remove(key);
            }
        }
        config
    }

    /// Name and shape of every weight, in the order of the file.
    pub fn parameter_shapes(&self) -> Vec<(String, Vec<i64>)> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let (q_width, kv_width) = (self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim);
        let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![self.vocab_size, hidden])];
        for layer in 0..self.num_layers {
            let mut add =
                |name: &str, shape: &[i64]| shapes.push((format!("model.layers.{layer}.{name}"), shape.to_vec()));
            add("input_layernorm.weight", &[hidden]);
            for (name, width) in [("q", q_width), ("k", kv_width), ("v", kv_width)] {
                add(&format!("self_attn.{name}_proj.weight"), &[width, hidden]);
                if self.qkv_bias {
                    add(&format!("self_attn.{name}_proj.bias"), &[width]);
                }
            }
            if self.family == Family::Qwen3 {
                add("self_attn.q_norm.weight", &[self.head_dim]);
                add("self_attn.k_norm.weight", &[self.head_dim]);
            }
            add("self_attn.o_proj.weight", &[hidden, q_width]);
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
            .find(|size| !(1..SIZE_LIMIT).contains(*size))
        {
            return Err(format!("every size must be between 1 and 2^31, found {size}"));
        }
        if self.num_heads % self.num_kv_heads != 0 {
            return Err(format!(
                "num_attention_heads ({}) must be a multiple of num_key_value_heads ({})",
                self.num_heads, self.num_kv_heads
            ));
        }
        if self.head_dim % 2 != 0 {
            return Err(format!("head_dim ({}) must be even for rotary embeddings", self.head_dim));
        }
        Ok(())
    }
}
