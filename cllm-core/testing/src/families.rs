//! Every family, RoPE scaling and form of sliding windows as a tiny random model.

use cllm_core::fingerprint;
use cllm_core::model::{ModelConfig, Transformer};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

/// The names and the config.json of all of them.
pub fn shapes() -> Vec<(&'static str, Value)> {
    let base = json!({
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    });
    let with = |extra: Value| {
        let mut config = base.clone();
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        config
    };
    vec![
        ("llama", with(json!({"model_type": "llama", "tie_word_embeddings": true}))),
        ("mistral", with(json!({"model_type": "mistral", "head_dim": 16}))),
        ("qwen2", with(json!({"model_type": "qwen2"}))),
        ("qwen3", with(json!({"model_type": "qwen3", "head_dim": 16, "num_key_value_heads": 4}))),
        ("linear", with(json!({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}))),
        (
            "llama3",
            with(json!({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}})),
        ),
        (
            "yarn",
            with(json!({"model_type": "qwen2", "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
            "original_max_position_embeddings": 64}})),
        ),
        ("mistral-window", with(json!({"model_type": "mistral", "head_dim": 16, "sliding_window": 6}))),
        (
            "qwen2-window",
            with(json!({"model_type": "qwen2", "use_sliding_window": true, "sliding_window": 9,
            "max_window_layers": 1})),
        ),
        (
            "qwen3-window",
            with(json!({"model_type": "qwen3", "head_dim": 16, "use_sliding_window": true, "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention"]})),
        ),
    ]
}

/// A random model with logits that are far enough apart for a clear maximum.
pub fn random_model(config: &Value, seed: u64) -> Transformer {
    let model = Transformer::random(ModelConfig::from_json(config).unwrap(), seed, Device::Cpu, Kind::Float);
    let _no_grad = tch::no_grad_guard();
    for (name, mut tensor) in model.named_parameters() {
        if name.ends_with("bias") {
            tensor.copy_(&(waves(&name, &tensor, seed) * 0.7));
        } else if !name.ends_with("norm.weight") {
            tensor *= 12.0;
        }
    }
    model
}

/// Numbers between -1 and 1 for the weight of a name, in its shape. They do not come from libtorch's
/// generator, which all threads of the process share.
pub(crate) fn waves(name: &str, weight: &Tensor, seed: u64) -> Tensor {
    let phase = (fingerprint::derive_seed(seed, name) % 1000) as f64;
    let numbers = Tensor::arange(weight.numel() as i64, (Kind::Float, Device::Cpu));
    (numbers * 1.3 + phase).sin().view_as(weight)
}
