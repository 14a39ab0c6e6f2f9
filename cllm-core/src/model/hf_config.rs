//! config.json as Hugging Face models have it: nearly everything is optional, and RoPE settings
//! have two spellings.
//!
//! `config.rs` resolves it to a [`super::ModelConfig`], in which nothing is optional.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::rope::RopeScaling;

/// The fields that are read. All others are ignored.
#[derive(Deserialize)]
pub(super) struct HfConfig {
    pub(super) model_type: String,
    pub(super) vocab_size: i64,
    pub(super) hidden_size: i64,
    pub(super) intermediate_size: i64,
    pub(super) num_hidden_layers: i64,
    pub(super) num_attention_heads: i64,
    pub(super) num_key_value_heads: Option<i64>,
    pub(super) head_dim: Option<i64>,
    pub(super) max_position_embeddings: Option<usize>,
    pub(super) rms_norm_eps: Option<f64>,
    pub(super) attention_bias: Option<bool>,
    pub(super) tie_word_embeddings: Option<bool>,
    pub(super) bos_token_id: Option<i64>,
    eos_token_id: Option<OneOrMany>,
    rope_theta: Option<f64>,
    rope_scaling: Option<HfRope>,
    /// The newer name of `rope_scaling`, which contains `rope_theta` as well.
    rope_parameters: Option<HfRope>,
    hidden_act: Option<String>,
    mlp_bias: Option<bool>,
    partial_rotary_factor: Option<f64>,
    sliding_window: Option<i64>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

#[derive(Deserialize)]
struct HfRope {
    rope_type: Option<String>,
    /// The older name of `rope_type`; many files have both.
    #[serde(rename = "type")]
    old_type: Option<String>,
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
    truncate: Option<bool>,
    partial_rotary_factor: Option<f64>,
}

impl HfConfig {
    fn rope(&self) -> Option<&HfRope> {
        self.rope_parameters.as_ref().or(self.rope_scaling.as_ref())
    }

    pub(super) fn rope_theta(&self) -> f64 {
        self.rope().and_then(|rope| rope.rope_theta).or(self.rope_theta).unwrap_or(10_000.0)
    }

    pub(super) fn eos_ids(&self) -> Vec<i64> {
        match &self.eos_token_id {
            None => Vec::new(),
            Some(OneOrMany::One(id)) => vec![*id],
            Some(OneOrMany::Many(ids)) => ids.clone(),
        }
    }

    /// Refuses what would change the model's output and is not implemented.
    pub(super) fn refuse_unsupported(&self, max_positions: usize) -> Result<(), String> {
        if let Some(activation) = self.hidden_act.as_deref().filter(|&name| name != "silu" && name != "swish") {
            return Err(format!("hidden_act `{activation}` is not supported: only silu"));
        }
        if self.quantization_config.as_ref().is_some_and(|value| !value.is_null()) {
            return Err("quantization_config: quantized weights are not supported; use the bf16 checkpoint".to_owned());
        }
        if self.mlp_bias == Some(true) {
            return Err("mlp_bias is not supported".to_owned());
        }
        let partial = self.partial_rotary_factor.or(self.rope().and_then(|rope| rope.partial_rotary_factor));
        if let Some(factor) = partial.filter(|&factor| factor != 1.0) {
            return Err(format!("partial_rotary_factor {factor} is not supported: only 1"));
        }
        if self.uses_sliding_window(max_positions) {
            return Err(
                "sliding-window attention is not supported; if the context you need is shorter than the window, \
                        set sliding_window to null and max_position_embeddings to that context"
                    .to_owned(),
            );
        }
        if let Some(layer_type) = self.layer_types.iter().flatten().find(|name| *name != "full_attention") {
            return Err(format!("layer_types with `{layer_type}` is not supported: only full_attention"));
        }
        Ok(())
    }

    fn uses_sliding_window(&self, max_positions: usize) -> bool {
        match self.model_type.as_str() {
            // A window as long as the context changes nothing.
            "mistral" => self.sliding_window.is_some_and(|window| usize::try_from(window).unwrap_or(0) < max_positions),
            _ => self.use_sliding_window == Some(true),
        }
    }

    pub(super) fn rope_scaling(&self, max_positions: usize) -> Result<RopeScaling, String> {
        let Some(rope) = self.rope() else { return Ok(RopeScaling::None) };
        let rope_type = rope.rope_type.as_deref().or(rope.old_type.as_deref()).unwrap_or("default");
        let required = |value: Option<f64>, name: &str| {
            value.ok_or_else(|| format!("rope_scaling of type {rope_type} needs `{name}`"))
        };
        let factor = || required(rope.factor, "factor").and_then(|factor| positive(factor, "rope_scaling.factor"));
        let original_max_positions = rope.original_max_position_embeddings.unwrap_or(max_positions as f64);
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
            "yarn" if rope.truncate == Some(false) => {
                Err("rope_scaling of type yarn with truncate false is not supported".to_owned())
            }
            "yarn" => {
                let factor = factor()?;
                Ok(RopeScaling::Yarn {
                    factor,
                    beta_fast: positive(rope.beta_fast.unwrap_or(32.0), "beta_fast")?,
                    beta_slow: positive(rope.beta_slow.unwrap_or(1.0), "beta_slow")?,
                    original_max_positions,
                    attention_factor: rope.yarn_attention_factor(factor),
                })
            }
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

/// Refuses numbers that cannot be a size or a scale.
pub(super) fn positive(value: f64, name: &str) -> Result<f64, String> {
    if value.is_finite() && value > 0.0 { Ok(value) } else { Err(format!("{name} must be above 0, found {value}")) }
}

/// `rope_scaling` in the spelling that every version of `transformers` reads.
pub(super) fn rope_scaling_json(scaling: &RopeScaling) -> Value {
    let (rope_type, numbers) = match scaling {
        RopeScaling::None => return Value::Null,
        RopeScaling::Linear { factor } => ("linear", vec![("factor", *factor)]),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => (
            "llama3",
            vec![
                ("factor", *factor),
                ("low_freq_factor", *low_freq_factor),
                ("high_freq_factor", *high_freq_factor),
                ("original_max_position_embeddings", *original_max_positions),
            ],
        ),
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_positions, attention_factor } => (
            "yarn",
            vec![
                ("factor", *factor),
                ("beta_fast", *beta_fast),
                ("beta_slow", *beta_slow),
                ("original_max_position_embeddings", *original_max_positions),
                ("attention_factor", *attention_factor),
            ],
        ),
    };
    let mut object = Map::from_iter([("rope_type".to_owned(), json!(rope_type))]);
    for (name, number) in numbers {
        // `transformers` requires the context to be an integer.
        let is_integer = name.starts_with("original");
        object.insert(name.to_owned(), if is_integer { json!(number as u64) } else { json!(number) });
    }
    Value::Object(object)
}
