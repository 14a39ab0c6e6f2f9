//! config.json as files have it: nearly everything optional, two spellings of the rotary settings.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::config::{Family, RopeScaling};

/// The fields that are read; others change nothing here.
#[derive(Deserialize)]
pub(crate) struct RawConfig {
    pub model_type: String,
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    pub num_key_value_heads: Option<i64>,
    pub head_dim: Option<i64>,
    pub max_position_embeddings: Option<usize>,
    pub rms_norm_eps: Option<f64>,
    pub attention_bias: Option<bool>,
    pub tie_word_embeddings: Option<bool>,
    pub bos_token_id: Option<i64>,
    pub eos_token_id: Option<Ids>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    /// The newer name of `rope_scaling`, which holds `rope_theta` too.
    rope_parameters: Option<RawRope>,
    hidden_act: Option<String>,
    mlp_bias: Option<bool>,
    partial_rotary_factor: Option<f64>,
    sliding_window: Option<i64>,
    use_sliding_window: Option<bool>,
    layer_types: Option<Vec<String>>,
    quantization_config: Option<Value>,
}

/// One id or several.
#[derive(Deserialize)]
#[serde(untagged)]
pub(crate) enum Ids {
    One(i64),
    Several(Vec<i64>),
}

#[derive(Deserialize)]
struct RawRope {
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

impl RawConfig {
    fn rope(&self) -> Option<&RawRope> {
        self.rope_parameters.as_ref().or(self.rope_scaling.as_ref())
    }

    pub fn rope_theta(&self) -> f64 {
        self.rope().and_then(|rope| rope.rope_theta).or(self.rope_theta).unwrap_or(10_000.0)
    }

    pub fn eos_ids(&self) -> Vec<i64> {
        match &self.eos_token_id {
            None => Vec::new(),
            Some(Ids::One(id)) => vec![*id],
            Some(Ids::Several(ids)) => ids.clone(),
        }
    }

    pub fn refuse_unsupported(&self, family: Family, max_positions: usize) -> Result<(), String> {
        if let Some(activation) = self.hidden_act.as_deref().filter(|&name| name != "silu" && name != "swish") {
            return Err(format!("hidden_act `{activation}` is not supported: only silu"));
        }
        if self.quantization_config.as_ref().is_some_and(|value| !value.is_null()) {
            return Err("quantization_config: quantised weights are not supported; use the bf16 checkpoint".to_owned());
        }
        if self.mlp_bias == Some(true) {
            return Err("mlp_bias is not supported".to_owned());
        }
        let partial = self.partial_rotary_factor.or(self.rope().and_then(|rope| rope.partial_rotary_factor));
        if let Some(factor) = partial.filter(|&factor| factor != 1.0) {
            return Err(format!("partial_rotary_factor {factor} is not supported: only 1"));
        }
        let window_in_use = match family {
            Family::Mistral => {
                self.sliding_window.is_some_and(|window| usize::try_from(window).unwrap_or(0) < max_positions)
            }
            _ => self.use_sliding_window == Some(true),
        };
        if window_in_use {
            return Err("sliding-window attention is not supported; set sliding_window to null if the context you \
                        need is shorter than the window, and max_position_embeddings to that context"
                .to_owned());
        }
        if let Some(kind) = self.layer_types.iter().flatten().find(|kind| *kind != "full_attention") {
            return Err(format!("layer_types with `{kind}` is not supported: only full_attention"));
        }
        Ok(())
    }

    pub fn rope_scaling(&self, max_positions: usize) -> Result<RopeScaling, String> {
        let Some(raw) = self.rope() else { return Ok(RopeScaling::None) };
        let kind = raw.rope_type.as_deref().or(raw.old_type.as_deref()).unwrap_or("default");
        let need =
            |value: Option<f64>, name: &str| value.ok_or_else(|| format!("rope_scaling of type {kind} needs `{name}`"));
        let factor = || need(raw.factor, "factor").and_then(|factor| positive(factor, "rope_scaling.factor"));
        let original = raw.original_max_position_embeddings.unwrap_or(max_positions as f64);
        let original = positive(original, "original_max_position_embeddings")?;
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: factor()? }),
            "llama3" => {
                let (low, high) =
                    (need(raw.low_freq_factor, "low_freq_factor")?, need(raw.high_freq_factor, "high_freq_factor")?);
                if low >= high {
                    return Err(format!("low_freq_factor ({low}) must be below high_freq_factor ({high})"));
                }
                let (low_freq_factor, high_freq_factor) = (low, high);
                let factor = factor()?;
                Ok(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions: original })
            }
            "yarn" if raw.truncate == Some(false) => {
                Err("rope_scaling of type yarn with truncate false is not supported".to_owned())
            }
            "yarn" => {
                let factor = factor()?;
                let scale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
                let derived = match (raw.mscale, raw.mscale_all_dim) {
                    (Some(above), Some(below)) if above != 0.0 && below != 0.0 => scale(above) / scale(below),
                    _ => scale(1.0),
                };
                Ok(RopeScaling::Yarn {
                    factor,
                    beta_fast: positive(raw.beta_fast.unwrap_or(32.0), "beta_fast")?,
                    beta_slow: positive(raw.beta_slow.unwrap_or(1.0), "beta_slow")?,
                    original_max_positions: original,
                    attention_factor: raw.attention_factor.unwrap_or(derived),
                })
            }
            other => Err(format!("rope_scaling of type `{other}` is not supported: use linear, llama3 or yarn")),
        }
    }
}

/// Refuses what no size or scale can be.
pub(crate) fn positive(value: f64, name: &str) -> Result<f64, String> {
    if value.is_finite() && value > 0.0 { Ok(value) } else { Err(format!("{name} must be above 0, found {value}")) }
}

/// `rope_scaling` in the form that every version of `transformers` reads.
pub(crate) fn rope_json(scaling: &RopeScaling) -> Value {
    let (kind, numbers) = match scaling {
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
    let mut object = Map::from_iter([("rope_type".to_owned(), json!(kind))]);
    for (name, number) in numbers {
        // `transformers` checks that the context is an integer.
        let whole = name.starts_with("original");
        object.insert(name.to_owned(), if whole { json!(number as u64) } else { json!(number) });
    }
    Value::Object(object)
}
