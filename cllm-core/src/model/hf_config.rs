//! config.json as Hugging Face models have it: nearly everything is optional, defaults differ
//! between families, and RoPE settings have two spellings. What wins over what is as in
//! `transformers` 5.17, so that a folder means the same there and here.
//!
//! `config.rs` resolves it to a [`super::ModelConfig`], in which nothing is optional.

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value, json};

use super::config::Family;
use super::rope::RopeScaling;

/// Mistral's and Qwen's window where config.json has no `sliding_window`.
pub(super) const DEFAULT_WINDOW: i64 = 4096;
/// Qwen's `max_window_layers` where config.json has none.
pub(super) const DEFAULT_MAX_WINDOW_LAYERS: i64 = 28;

/// The fields that are read. All others are ignored.
#[derive(Deserialize)]
pub(super) struct HfConfig {
    pub(super) model_type: String,
    pub(super) vocab_size: i64,
    pub(super) hidden_size: i64,
    pub(super) intermediate_size: i64,
    pub(super) num_hidden_layers: i64,
    pub(super) num_attention_heads: i64,
    /// Absent means the family's default, `null` as many as query heads.
    #[serde(default, deserialize_with = "present")]
    num_key_value_heads: Option<Option<i64>>,
    pub(super) head_dim: Option<i64>,
    pub(super) max_position_embeddings: Option<usize>,
    pub(super) rms_norm_eps: Option<f64>,
    pub(super) attention_bias: Option<bool>,
    pub(super) tie_word_embeddings: Option<bool>,
    pub(super) bos_token_id: Option<i64>,
    eos_token_id: Option<OneOrMany>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Map<String, Value>>,
    /// The newer name of `rope_scaling`, which contains `rope_theta` as well.
    rope_parameters: Option<Map<String, Value>>,
    /// The context before scaling. Here it has precedence over the one among the RoPE settings.
    original_max_position_embeddings: Option<f64>,
    hidden_act: Option<String>,
    mlp_bias: Option<bool>,
    partial_rotary_factor: Option<f64>,
    /// Absent means the family's default, `null` no window.
    #[serde(default, deserialize_with = "present")]
    sliding_window: Option<Option<i64>>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<i64>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
    per_layer_config: Option<Value>,
    transformers_weights: Option<Value>,
}

/// Reads a key that is there, so that its `null` can be told from its absence.
fn present<'de, T: Deserialize<'de>, D: Deserializer<'de>>(key: D) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(key).map(Some)
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

#[derive(Default, Deserialize)]
pub(super) struct HfRope {
    rope_type: Option<String>,
    /// The older name of `rope_type`; many files have both.
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    /// `null` lets YaRN derive it from the two contexts.
    #[serde(default, deserialize_with = "present")]
    factor: Option<Option<f64>>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    attention_factor: Option<f64>,
    mscale: Option<f64>,
    mscale_all_dim: Option<f64>,
    truncate: Option<bool>,
    partial_rotary_factor: Option<f64>,
}

impl HfConfig {
    /// The RoPE settings. As in `transformers`, a `rope_scaling` that is not empty replaces
    /// `rope_parameters` as a whole, its `rope_theta` included.
    pub(super) fn rope(&self) -> Result<HfRope, String> {
        let spellings = [("rope_scaling", &self.rope_scaling), ("rope_parameters", &self.rope_parameters)];
        let given = spellings
            .into_iter()
            .find_map(|(name, rope)| Some((name, rope.as_ref()?)).filter(|(_, rope)| !rope.is_empty()));
        let Some((name, rope)) = given else { return Ok(HfRope::default()) };
        if let Some((key, _)) = rope.iter().find(|(_, value)| value.is_object()) {
            return Err(format!(
                "{name} has settings of its own for `{key}`, which is not supported: if every layer has the same \
                 settings, write them into {name} itself"
            ));
        }
        serde_path_to_error::deserialize(&Value::Object(rope.clone())).map_err(|error| format!("{name}.{error}"))
    }

    pub(super) fn rope_theta(&self, rope: &HfRope) -> f64 {
        rope.rope_theta.or(self.rope_theta).unwrap_or(10_000.0)
    }

    pub(super) fn max_position_embeddings(&self, family: Family) -> usize {
        self.max_position_embeddings.unwrap_or(match family {
            Family::Llama => 2048,
            Family::Mistral => 131_072,
            Family::Qwen2 | Family::Qwen3 => 32_768,
        })
    }

    pub(super) fn num_kv_heads(&self, family: Family) -> i64 {
        let default = match family {
            Family::Llama => None,
            Family::Mistral => Some(8),
            Family::Qwen2 | Family::Qwen3 => Some(32),
        };
        self.num_key_value_heads.unwrap_or(default).unwrap_or(self.num_attention_heads)
    }

    pub(super) fn eos_ids(&self) -> Vec<i64> {
        match &self.eos_token_id {
            None => Vec::new(),
            Some(OneOrMany::One(id)) => vec![*id],
            Some(OneOrMany::Many(ids)) => ids.clone(),
        }
    }

    /// Refuses what would change the model's output and is not implemented.
    pub(super) fn refuse_unsupported(&self, family: Family, rope: &HfRope) -> Result<(), String> {
        if let Some(activation) = self.hidden_act.as_deref().filter(|&name| name != "silu" && name != "swish") {
            return Err(format!("hidden_act `{activation}` is not supported: only silu"));
        }
        let is_set = |value: &Option<Value>| value.as_ref().is_some_and(|value| !value.is_null());
        if is_set(&self.quantization_config) {
            return Err("quantization_config: quantized weights are not supported; use the bf16 checkpoint".to_owned());
        }
        if is_set(&self.per_layer_config) {
            return Err("per_layer_config: layers that differ from each other are not supported".to_owned());
        }
        if is_set(&self.transformers_weights) {
            return Err(
                "transformers_weights is not supported: rename the file that it names to model.safetensors, and \
                        remove the key"
                    .to_owned(),
            );
        }
        if family == Family::Llama && self.mlp_bias == Some(true) {
            return Err("mlp_bias is not supported: only feed-forward layers without biases".to_owned());
        }
        let partial = rope.partial_rotary_factor.or(self.partial_rotary_factor);
        if let Some(factor) = partial.filter(|&factor| factor != 1.0) {
            return Err(format!(
                "partial_rotary_factor {factor} is not supported: remove it if the model rotates whole heads"
            ));
        }
        Ok(())
    }

    /// The sliding window of each layer ([`super::ModelConfig::sliding_windows`]). One as long as the
    /// context changes nothing and counts as none.
    pub(super) fn sliding_windows(&self, family: Family, max_positions: usize) -> Result<Vec<Option<i32>>, String> {
        let is_qwen = matches!(family, Family::Qwen2 | Family::Qwen3);
        let has_window = family == Family::Mistral || (is_qwen && self.use_sliding_window == Some(true));
        let window = self.sliding_window.unwrap_or(Some(DEFAULT_WINDOW)).filter(|_| has_window);
        if let Some(window) = window.filter(|&window| window < 1) {
            return Err(format!("sliding_window must be at least 1, or null for no window, found {window}"));
        }
        let first_layer = if is_qwen { self.max_window_layers.unwrap_or(DEFAULT_MAX_WINDOW_LAYERS) } else { 0 };
        let mut has_windows: Vec<bool> =
            (0..self.num_hidden_layers).map(|layer| window.is_some() && layer >= first_layer).collect();
        if let Some(layer_types) = &self.layer_types {
            let from_types = has_windows_from_types(layer_types)?;
            // `transformers` reads the types for Qwen alone, so others may only repeat that no layer
            // has a window.
            let is_possible =
                if from_types.contains(&true) { is_qwen && window.is_some() } else { is_qwen || window.is_none() };
            if from_types.len() != has_windows.len() || !is_possible {
                return Err(format!(
                    "layer_types does not fit {} layers of model_type {} with the other settings of sliding windows: \
                     correct or remove it",
                    has_windows.len(),
                    self.model_type
                ));
            }
            has_windows = from_types;
        }
        let window =
            window.filter(|&window| window < max_positions as i64).and_then(|window| i32::try_from(window).ok());
        Ok(has_windows.into_iter().map(|has_window| window.filter(|_| has_window)).collect())
    }

    pub(super) fn rope_scaling(&self, rope: &HfRope, max_position_embeddings: usize) -> Result<RopeScaling, String> {
        let rope_type = rope.rope_type.as_deref().or(rope.old_type.as_deref()).unwrap_or("default");
        let required = |value: Option<f64>, name: &str| {
            value.ok_or_else(|| format!("rope_scaling of type {rope_type} needs `{name}`"))
        };
        let factor =
            || required(rope.factor.flatten(), "factor").and_then(|factor| positive(factor, "rope_scaling.factor"));
        let original = self.original_max_position_embeddings.or(rope.original_max_position_embeddings);
        let original_max_positions = original.unwrap_or(max_position_embeddings as f64);
        let original_max_positions = positive(original_max_positions, "original_max_position_embeddings")?;
        match rope_type {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
            "llama3" => {
                let low_freq_factor = required(rope.low_freq_factor, "low_freq_factor")?;
                let high_freq_factor = required(rope.high_freq_factor, "high_freq_factor")?;
                if low_freq_factor >= high_freq_factor {
                    return Err(format!(
                        "low_freq_factor ({low_freq_factor}) must be below high_freq_factor ({high_freq_factor})"
                    ));
                }
                let factor = factor()?;
                Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions })
            }
            "yarn" => {
                let factor = match rope.factor {
                    Some(None) => max_position_embeddings as f64 / original_max_positions,
                    _ => factor()?,
                };
                // 0 stands for the default, as in `transformers`.
                let beta = |value: Option<f64>, default| value.filter(|&beta| beta != 0.0).unwrap_or(default);
                Ok(RopeScaling::Yarn {
                    factor,
                    beta_fast: positive(beta(rope.beta_fast, 32.0), "beta_fast")?,
                    beta_slow: positive(beta(rope.beta_slow, 1.0), "beta_slow")?,
                    original_max_positions,
                    attention_factor: rope.yarn_attention_factor(factor),
                    truncate: rope.truncate.unwrap_or(true),
                })
            }
            "dynamic" => Err("rope_scaling of type `dynamic` is not supported: set it to null, because it changes \
                              nothing within max_position_embeddings"
                .to_owned()),
            other => Err(format!("rope_scaling of type `{other}` is not supported: use linear, llama3 or yarn")),
        }
    }
}

impl HfRope {
    /// Derived as in `transformers` if the file does not set it.
    fn yarn_attention_factor(&self, factor: f64) -> f64 {
        let scale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
        let derived = match (self.mscale, self.mscale_all_dim) {
            (Some(numerator), Some(denominator)) if numerator != 0.0 && denominator != 0.0 => {
                scale(numerator) / scale(denominator)
            }
            _ => scale(1.0),
        };
        self.attention_factor.unwrap_or(derived)
    }
}

/// Which layers have a sliding window by their `layer_types`.
fn has_windows_from_types(layer_types: &[String]) -> Result<Vec<bool>, String> {
    let has_window = |name: &String| match name.as_str() {
        "full_attention" => Ok(false),
        "sliding_attention" => Ok(true),
        other => Err(format!("layer_types with `{other}` is not supported: only full_attention and sliding_attention")),
    };
    layer_types.iter().map(has_window).collect()
}

/// Refuses numbers that cannot be a size or a scale.
pub(super) fn positive(value: f64, name: &str) -> Result<f64, String> {
    if value.is_finite() && value > 0.0 { Ok(value) } else { Err(format!("{name} must be above 0, found {value}")) }
}

/// `rope_scaling` in the spelling that every version of `transformers` reads.
pub(super) fn rope_scaling_json(scaling: &RopeScaling) -> Value {
    match *scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": context_json(original_max_positions),
        }),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_positions, attention_factor, truncate } => {
            let mut scaling = json!({
                "rope_type": "yarn",
                "factor": factor,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "original_max_position_embeddings": context_json(original_max_positions),
                "attention_factor": attention_factor,
            });
            // Older versions do not know the key, and its absence means true.
            if !truncate {
                scaling["truncate"] = json!(false);
            }
            scaling
        }
    }
}

/// `transformers` asks for an integer.
fn context_json(context: f64) -> Value {
    if context.fract() == 0.0 { json!(context as u64) } else { json!(context) }
}
