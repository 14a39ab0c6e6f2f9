//! The model configuration of a GGUF file, from its metadata and the names of its tensors.

use serde_json::{Value, json};

use super::file::{GgufFile, Parsed};
use cllm_core::model::ModelConfig;

/// The tensor with the factors by which Llama 3 scales its RoPE frequencies.
pub(super) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The configuration of the file's model.
pub(super) fn read(file: &GgufFile<'_>) -> Parsed<ModelConfig> {
    let architecture = file.text("general.architecture")?.ok_or("lacks the key `general.architecture`")?;
    if !matches!(architecture, "llama" | "qwen2") {
        return Err(format!("holds a model of architecture `{architecture}`; only llama and qwen2 are supported"));
    }
    let key = |name: &str| format!("{architecture}.{name}");
    let optional = |name: &str| file.integer(&key(name));
    let required = |name: &str| optional(name)?.ok_or_else(|| format!("lacks the key `{}`", key(name)));
    if optional("expert_count")?.unwrap_or(0) > 0 {
        return Err("holds a mixture of experts, which is not supported".to_owned());
    }
    let layers = required("block_count")?;
    if layers > file.tensors.len() as i64 {
        return Err(format!("claims to have {layers} layers, but has only {} tensors", file.tensors.len()));
    }
    let embedding = file.tensors.get("token_embd.weight").ok_or("lacks the tensor `token_embd.weight`")?;
    let (heads, hidden) = (required("attention.head_count")?, required("embedding_length")?);
    let head_dim = optional("attention.key_length")?.unwrap_or(hidden / heads.max(1));
    let rotated = optional("rope.dimension_count")?.unwrap_or(head_dim);
    if rotated != head_dim {
        return Err(format!("rotates {rotated} of the {head_dim} dimensions of a head, which is not supported"));
    }
    let context = required("context_length")?;
    let theta = file.float(&key("rope.freq_base"))?.unwrap_or(10_000.0);
    let epsilon = file.float(&key("attention.layer_norm_rms_epsilon"))?;
    let mut config = json!({
        "model_type": architecture,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": required("feed_forward_length")?,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": optional("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": epsilon.ok_or_else(|| format!("lacks the key `{}`", key("attention.layer_norm_rms_epsilon")))?,
        "rope_theta": theta,
        "rope_scaling": rope_scaling(file, architecture, theta, head_dim)?,
        "attention_bias": architecture == "llama" && file.tensors.contains_key("blk.0.attn_q.bias"),
        "tie_word_embeddings": !file.tensors.contains_key("output.weight"),
    });
    for (name, key) in [("bos_token_id", "bos"), ("eos_token_id", "eos")] {
        if let Some(id) = file.integer(&format!("tokenizer.ggml.{key}_token_id"))? {
            config[name] = json!(id);
        }
    }
    ModelConfig::from_json(&config)
}

fn rope_scaling(file: &GgufFile<'_>, architecture: &str, theta: f64, head_dim: i64) -> Parsed<Value> {
    if let Some(factors) = file.tensors.get(ROPE_FACTORS) {
        let mut stored = Vec::new();
        factors.format.dequantize(factors.data, &mut stored);
        return llama3_scaling(&stored, theta, head_dim);
    }
    let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
    // Old files have only this key.
    let old_factor = file.float(&format!("{architecture}.rope.scale_linear"))?.filter(|&factor| factor != 1.0);
    let kind = file.text(&key("type"))?.unwrap_or(if old_factor.is_some() { "linear" } else { "none" });
    let factor =
        || file.float(&key("factor"))?.or(old_factor).ok_or_else(|| format!("lacks the key `{}`", key("factor")));
    match kind {
        "none" => Ok(Value::Null),
        "linear" => Ok(json!({ "rope_type": "linear", "factor": factor()? })),
        "yarn" => {
            let mut scaling = json!({ "rope_type": "yarn", "factor": factor()? });
            if let Some(original) = file.integer(&key("original_context_length"))? {
                scaling["original_max_position_embeddings"] = json!(original);
            }
            Ok(scaling)
        }
        other => Err(format!("scales RoPE by the rule `{other}`; only linear, yarn and llama3 are supported")),
    }
}

/// Llama 3's scaling rule, recovered from the stored factors. All releases use the same bounds, so
/// the largest factor determines the rule. A rule that does not reproduce all stored factors is
/// refused.
fn llama3_scaling(stored: &[f32], theta: f64, head_dim: i64) -> Parsed<Value> {
    const CONTEXT: f64 = 8192.0;
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    let factor = f64::from(stored.iter().copied().fold(1.0, f32::max));
    let expected = |index: usize| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * index as f64 / head_dim as f64);
        let smooth = ((CONTEXT / wavelength - LOW) / (HIGH - LOW)).clamp(0.0, 1.0);
        1.0 / ((1.0 - smooth) / factor + smooth)
    };
    let is_reproduced = stored.len() as i64 == head_dim / 2
        && stored.iter().enumerate().all(|(index, &value)| (f64::from(value) / expected(index) - 1.0).abs() < 1e-3);
    if !is_reproduced {
        return Err(format!("has a `{ROPE_FACTORS}` that does not follow Llama 3's rule, the only one supported"));
    }
    Ok(json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": LOW, "high_freq_factor": HIGH,
        "original_max_position_embeddings": CONTEXT as i64,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_factors_are_recognised_and_others_refused() {
        // As llama.cpp computes them for Llama 3.1: wavelengths below 2048 are kept, those above
        // 8192 grow by a factor of 8.
        let mut factors: Vec<f32> = (0..64)
            .map(|index| {
                let wavelength = 2.0 * std::f64::consts::PI * 500_000f64.powf(index as f64 / 64.0);
                if wavelength < 2048.0 {
                    1.0
                } else if wavelength > 8192.0 {
                    8.0
                } else {
                    let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                    (1.0 / ((1.0 - smooth) / 8.0 + smooth)) as f32
                }
            })
            .collect();
        let scaling = llama3_scaling(&factors, 500_000.0, 128).unwrap();
        assert_eq!((scaling["rope_type"].as_str(), scaling["factor"].as_f64()), (Some("llama3"), Some(8.0)));
        factors[0] = 3.0;
        assert!(llama3_scaling(&factors, 500_000.0, 128).unwrap_err().contains("rope_freqs"));
    }
}
