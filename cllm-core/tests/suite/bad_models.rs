//! Broken model folders: every error names the file, and the tensor or the key, that is to blame.

use std::path::Path;

use cllm_core::Error;
use cllm_core::checkpoint;
use cllm_core::model::{ModelConfig, Transformer};
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::parity::fixture_folder;

/// Damages a copy of a recorded model, and returns the message of the attempt to load it.
fn refusal(name: &str, damage: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture_folder(name).join(file), dir.path().join(file)).unwrap();
    }
    damage(dir.path());
    let error = checkpoint::load(dir.path(), Device::Cpu, Kind::Float).err().expect("it must be refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

fn edit_config(folder: &Path, edit: impl FnOnce(&mut Value)) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
}

#[track_caller]
fn assert_mentions(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

#[test]
fn a_missing_folder_or_file_is_named() {
    let error = checkpoint::load(Path::new("no/such/model"), Device::Cpu, Kind::Float).err().unwrap();
    assert!(matches!(error, Error::File { .. }));
    assert_mentions(&error.to_string(), &["no/such/model", "no such model folder"]);
    assert_mentions(
        &refusal("llama", |folder| std::fs::remove_file(folder.join("config.json")).unwrap()),
        &["config.json"],
    );
    let no_weights = refusal("llama", |folder| std::fs::remove_file(folder.join("model.safetensors")).unwrap());
    assert_mentions(&no_weights, &["model.safetensors", "model.safetensors.index.json"]);
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    for number in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let message = refusal("llama", |folder| {
            let path = folder.join("model.safetensors");
            let mut bytes = std::fs::read(&path).unwrap();
            let last = bytes.len() - 4;
            bytes[last..].copy_from_slice(&number.to_le_bytes());
            std::fs::write(&path, bytes).unwrap();
        });
        assert_mentions(&message, &["model.safetensors", "weight", "not finite"]);
    }
}

#[test]
fn a_truncated_file_is_named() {
    let complete = std::fs::read(fixture_folder("llama").join("model.safetensors")).unwrap();
    for length in [0, 5, 100, complete.len() / 2, complete.len() - 1] {
        let message = refusal("llama", |folder| {
            std::fs::write(folder.join("model.safetensors"), &complete[..length]).unwrap();
        });
        assert_mentions(&message, &["model.safetensors", "not a complete safetensors file"]);
    }
    let config =
        refusal("llama", |folder| std::fs::write(folder.join("config.json"), "{\"model_type\": \"lla").unwrap());
    assert_mentions(&config, &["config.json"]);
}

#[test]
fn a_tensor_that_is_missing_misshaped_or_unknown_is_named() {
    let deeper = refusal("llama", |folder| edit_config(folder, |config| config["num_hidden_layers"] = json!(3)));
    assert_mentions(&deeper, &["model.safetensors", "`model.layers.2.input_layernorm.weight`"]);
    let wider = refusal("llama", |folder| edit_config(folder, |config| config["intermediate_size"] = json!(40)));
    assert_mentions(&wider, &["model.safetensors", "`model.layers.", "has shape", "48", "config.json calls for", "40"]);
    let untied = refusal("llama", |folder| edit_config(folder, |config| config["tie_word_embeddings"] = json!(false)));
    assert_mentions(&untied, &["`lm_head.weight`"]);
    let no_bias = refusal("llama-bias", |folder| edit_config(folder, |config| config["attention_bias"] = json!(false)));
    assert_mentions(&no_bias, &["_proj.bias` is not a weight"]);
    let other_family = refusal("qwen3", |folder| edit_config(folder, |config| config["model_type"] = json!("llama")));
    assert_mentions(&other_family, &["_norm.weight` is not a weight"]);
}

#[test]
fn an_index_that_names_a_missing_shard_is_refused() {
    let message = refusal("llama", |folder| {
        std::fs::remove_file(folder.join("model.safetensors")).unwrap();
        let index = json!({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}});
        std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    });
    assert_mentions(&message, &["model-00001-of-00002.safetensors", "missing"]);
}

#[test]
fn unsupported_features_are_refused_by_name() {
    let base: Value =
        serde_json::from_slice(&std::fs::read(fixture_folder("mistral").join("config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("model_type", json!("mixtral")),
        ("hidden_act", json!("gelu")),
        ("layer_types", json!(["full_attention", "sliding_attention"])),
        ("quantization_config", json!({"quant_method": "gptq"})),
        ("partial_rotary_factor", json!(0.5)),
        ("rope_parameters", json!({"rope_type": "longrope", "factor": 2.0})),
        ("num_key_value_heads", json!(3)),
        ("hidden_size", json!("wide")),
        ("vocab_size", json!(0)),
        ("rms_norm_eps", json!(-1.0)),
        ("head_dim", json!(7)),
    ] {
        let mut config = base.clone();
        config[key] = value;
        let message = ModelConfig::from_json(&config).unwrap_err();
        let expected = match key {
            "rope_parameters" => "longrope",
            "vocab_size" => "between 1",
            key => key,
        };
        assert_mentions(&message, &[expected]);
    }
}

/// A configuration of one layer with these settings.
fn config_with(extra: Value) -> Result<ModelConfig, String> {
    let mut config = json!({
        "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 32768,
    });
    config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    ModelConfig::from_json(&config)
}

#[test]
fn windows_are_those_of_transformers() {
    let windows = |extra| config_with(extra).unwrap().sliding_windows;
    let qwen = |extra: Value| {
        let mut config = json!({"model_type": "qwen3", "use_sliding_window": true});
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        windows(config)
    };
    assert_eq!(windows(json!({"model_type": "mistral"})), [Some(4096); 3], "Mistral's default is not none");
    assert_eq!(windows(json!({"model_type": "mistral", "sliding_window": null})), [None; 3]);
    assert_eq!(windows(json!({"model_type": "mistral", "max_position_embeddings": 4096})), [None; 3]);
    assert_eq!(windows(json!({"model_type": "llama", "sliding_window": 64, "use_sliding_window": true})), [None; 3]);
    assert_eq!(qwen(json!({})), [None; 3], "by default, windows begin at layer 28");
    assert_eq!(qwen(json!({"use_sliding_window": false, "max_window_layers": 0})), [None; 3]);
    assert_eq!(qwen(json!({"max_window_layers": 1})), [None, Some(4096), Some(4096)]);
    let types = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    let by_types = json!({"max_window_layers": 1, "layer_types": types, "sliding_window": 64});
    assert_eq!(qwen(by_types), [Some(64), None, Some(64)], "layer_types wins over max_window_layers");
}

#[test]
fn windows_that_cannot_be_are_refused_by_their_key() {
    for (extra, parts) in [
        (json!({"model_type": "mistral", "sliding_window": 0}), ["sliding_window must be at least 1", "found 0"]),
        (
            json!({"model_type": "qwen2", "layer_types": ["full_attention"]}),
            ["layer_types does not fit 3 layers", "qwen2"],
        ),
        (
            json!({"model_type": "qwen2", "layer_types": ["full_attention", "full_attention", "sliding_attention"]}),
            ["layer_types does not fit", "correct or remove it"],
        ),
        (
            json!({"model_type": "qwen3", "layer_types": ["full_attention", "full_attention", "chunked_attention"]}),
            ["layer_types with `chunked_attention`", "only full_attention and sliding_attention"],
        ),
    ] {
        assert_mentions(&config_with(extra).unwrap_err(), &parts);
    }
}

#[test]
fn the_context_is_the_extended_one_and_is_saved_as_it_was() {
    let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768});
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192});
    for (written, scaling, context) in [
        (32768, json!(null), 32768),
        // As Qwen's documentation switches YaRN on, for Qwen2.5 and for Qwen3.
        (32768, yarn.clone(), 131_072),
        (40960, yarn.clone(), 131_072),
        (32768, json!({"rope_type": "yarn", "factor": 4.0}), 131_072),
        // Contexts that are the extended ones already.
        (131_072, yarn, 131_072),
        (131_072, llama3, 131_072),
        (131_072, json!({"rope_type": "yarn", "factor": null, "original_max_position_embeddings": 32768}), 131_072),
        // Vicuna 16k.
        (4096, json!({"type": "linear", "factor": 4.0}), 16384),
    ] {
        let config =
            config_with(json!({"model_type": "qwen2", "max_position_embeddings": written, "rope_scaling": scaling}));
        let config = config.unwrap();
        assert_eq!(config.max_positions, context, "{written} {scaling}");
        let saved = config.to_json("float32");
        assert_eq!(saved["max_position_embeddings"], json!(written), "{scaling}");
        let again = ModelConfig::from_json(&saved).unwrap();
        assert_eq!((again.max_positions, again.rope_scaling), (context, config.rope_scaling), "{written} {scaling}");
    }
}

#[test]
fn both_spellings_of_the_rope_settings_mean_the_same() {
    let shape = json!({"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2});
    let with = |extra: Value| {
        let mut config = shape.clone();
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        ModelConfig::from_json(&config).unwrap()
    };
    let old =
        with(json!({"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}}));
    let new = with(json!({"rope_scaling": null, "dtype": "float32",
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}));
    assert_eq!((old.rope_theta, &old.rope_scaling), (new.rope_theta, &new.rope_scaling));
    assert_eq!(old.to_json("float32"), new.to_json("float32"));
}

#[test]
fn random_weights_depend_only_on_the_seed() {
    let config = checkpoint::load_config(&fixture_folder("qwen2")).unwrap();
    let draw = |seed, kind| Transformer::random(config.clone(), seed, Device::Cpu, kind).named_parameters();
    tch::manual_seed(1);
    let first = draw(5, Kind::Float);
    tch::manual_seed(2);
    for ((name, a), ((_, b), (_, narrow))) in first.iter().zip(draw(5, Kind::Float).iter().zip(draw(5, Kind::BFloat16)))
    {
        assert_eq!(a, b, "{name}");
        assert_eq!(a.to_kind(Kind::BFloat16), narrow, "{name}");
    }
    let find = |set: &[(String, tch::Tensor)], name: &str| {
        set.iter().find(|(other, _)| other == name).map(|(_, tensor)| tensor.shallow_clone()).unwrap()
    };
    let (embedding, head) = (find(&first, "model.embed_tokens.weight"), find(&first, "lm_head.weight"));
    assert_ne!(embedding, head);
    assert_ne!(embedding, find(&draw(6, Kind::Float), "model.embed_tokens.weight"));
    let deviation = embedding.std(true).double_value(&[]);
    assert!((deviation - 0.02).abs() < 0.002 && embedding.mean(Kind::Float).double_value(&[]).abs() < 0.002);
    assert_eq!(find(&first, "model.norm.weight").sum(Kind::Float).double_value(&[]), 32.0);
    assert_eq!(find(&first, "model.layers.0.self_attn.k_proj.bias").abs().sum(Kind::Float).double_value(&[]), 0.0);
}
