//! Adapters in the format of PEFT: adapter_config.json, which names the model that they belong to,
//! and adapter_model.safetensors.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::check_finite;
use super::hub::{self, ADAPTER_CONFIG_FILE, is_adapter};
use super::safetensors::DOWNLOAD_ADVICE;
use super::tensor_file::{TensorFile, TensorSpec, read_tensors};
use super::tensor_writer::{STREAMING_BYTES, TensorWriter};
use crate::model::{AdaptedTokens, LoraAdapter, LoraAdapters, LoraConfig, LoraTarget, ModelConfig, Transformer};
use crate::{Error, Result, atomic_file, text_file};

const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Prefix that PEFT puts before the model's own module names.
const NAME_PREFIX: &str = "base_model.model.";

/// PEFT settings that change what an adapter computes and that we do not support. They must be off.
const UNSUPPORTED: [&str; 16] = [
    "use_rslora",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "fan_in_fan_out",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
];

/// The fields of adapter_config.json that are read.
#[derive(Deserialize)]
struct AdapterConfig {
    peft_type: String,
    base_model_name_or_path: Option<String>,
    r: i64,
    lora_alpha: f64,
    /// Our own field, which PEFT ignores.
    #[serde(default)]
    adapted_tokens: AdaptedTokens,
}

/// The folder of the model itself: `folder`, or the folder of the base model if `folder` holds an
/// adapter.
///
/// # Errors
/// When adapter_config.json is invalid or names no model that can be located.
pub fn base_folder(folder: &Path) -> Result<PathBuf> {
    if !is_adapter(folder) {
        return Ok(folder.to_owned());
    }
    let path = folder.join(ADAPTER_CONFIG_FILE);
    let name = read_config(&path)?.base_model_name_or_path.filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| Error::file(&path, "has no `base_model_name_or_path`: name the model there"))?;
    let invalid = |why: &dyn Display| Error::file(&path, format!("base_model_name_or_path `{name}`: {why}"));
    let base = hub::locate(&name).map_err(|error| invalid(&error))?;
    if is_adapter(&base) {
        return Err(invalid(&"is an adapter too: merge it with `cllm-train export`, and name the result here"));
    }
    Ok(base)
}

/// Whether a folder holds adapters that act on draft tokens alone.
///
/// # Errors
/// When adapter_config.json is invalid.
pub fn adapts_drafts(folder: &Path) -> Result<bool> {
    Ok(is_adapter(folder) && read_config(&folder.join(ADAPTER_CONFIG_FILE))?.adapted_tokens == AdaptedTokens::Drafts)
}

/// Refuses adapters that act on draft tokens alone where only the model that they belong to can be
/// used, and names it. `why` continues "alone, which".
///
/// # Errors
/// [`Error::File`] for such adapters, and when adapter_config.json is invalid.
pub fn refuse_draft_adapters(folder: &Path, why: &str) -> Result<()> {
    if !adapts_drafts(folder)? {
        return Ok(());
    }
    let base = base_folder(folder)?;
    let message = format!(
        "holds adapters that act on draft tokens alone, which {why}: set model={}, the model that they belong to",
        base.display()
    );
    Err(Error::file(folder, message))
}

/// The files of a folder's adapter; none for a model without one.
pub(super) fn adapter_files(folder: &Path) -> Vec<PathBuf> {
    if is_adapter(folder) { vec![folder.join(ADAPTER_CONFIG_FILE), folder.join(WEIGHTS_FILE)] } else { Vec::new() }
}

/// The adapters of a folder on `device`, for products in type `kind`; `None` for a model without any.
/// Those of draft tokens are in that type, and others, which are to be merged, in float32.
///
/// # Errors
/// Names the file that is missing, incomplete or does not fit the model, or the setting that is not
/// supported.
pub(super) fn load_adapters(
    folder: &Path,
    model: &ModelConfig,
    device: Device,
    kind: Kind,
) -> Result<Option<LoraAdapters>> {
    if !is_adapter(folder) {
        return Ok(None);
    }
    let _no_grad = tch::no_grad_guard();
    let config = read_config(&folder.join(ADAPTER_CONFIG_FILE))?;
    let file = folder.join(WEIGHTS_FILE);
    let mut tensors = load_tensors(&file, device)?;
    // The tensors tell which projections have an adapter: `target_modules` may be a pattern, and
    // layers may be excluded.
    let targets = LoraTarget::ALL.into();
    let lora = LoraConfig {
        rank: config.r,
        alpha: config.lora_alpha,
        targets,
        on: config.adapted_tokens,
        ..LoraConfig::default()
    };
    let mut modules = Vec::new();
    for module in lora.target_modules(model) {
        let names = ["lora_A", "lora_B"].map(|matrix| format!("{NAME_PREFIX}{}.{matrix}.weight", module.name));
        let (lora_a, lora_b) = match names.each_ref().map(|name| tensors.remove(name)) {
            [None, None] => continue,
            [Some(lora_a), Some(lora_b)] => (lora_a, lora_b),
            [lora_a, _] => {
                let missing = &names[usize::from(lora_a.is_some())];
                return Err(Error::file(&file, format!("lacks `{missing}`, the other half of an adapter")));
            }
        };
        check_shape(&file, &names[0], &lora_a, [lora.rank, module.in_features])?;
        check_shape(&file, &names[1], &lora_b, [module.out_features, lora.rank])?;
        check_finite(&file, &names[0], &lora_a)?;
        check_finite(&file, &names[1], &lora_b)?;
        modules.push((module, LoraAdapter::new(lora_a, lora_b, &lora)));
    }
    match tensors.keys().next() {
        Some(name) => Err(Error::file(&file, format!("`{name}` belongs to no projection of the model"))),
        None if modules.is_empty() => Err(Error::file(&file, "holds no adapters")),
        None if lora.on == AdaptedTokens::All => Ok(Some(LoraAdapters::new(lora, modules, device, Kind::Float, kind))),
        None => match LoraAdapters::first_layer(&modules, model) {
            Ok(first_layer) => {
                let lora = LoraConfig { first_layer, ..lora };
                Ok(Some(LoraAdapters::new(lora, modules, device, kind, kind)))
            }
            Err(difference) => Err(Error::file(
                &file,
                format!(
                    "{difference}: adapters for draft tokens need the same projections in all layers from the first with \
                     adapters on"
                ),
            )),
        },
    }
}

/// Every tensor of a file, in float32 on `device`.
fn load_tensors(file: &Path, device: Device) -> Result<BTreeMap<String, Tensor>> {
    let stored: Vec<_> = TensorFile::open(file, DOWNLOAD_ADVICE)?.tensors().collect();
    let mut tensors = BTreeMap::new();
    let target = |index: usize| Ok(Tensor::f_zeros(stored[index].1.shape(), (Kind::Float, device))?);
    read_tensors(&stored, device, target, |index, tensor| {
        tensors.insert(stored[index].0.clone(), tensor);
        Ok(())
    })?;
    Ok(tensors)
}

fn check_shape(file: &Path, name: &str, tensor: &Tensor, expected: [i64; 2]) -> Result<()> {
    if tensor.size() == expected {
        return Ok(());
    }
    let actual = tensor.size();
    Err(Error::file(file, format!("`{name}` has shape {actual:?}, but the model and `r` call for {expected:?}")))
}

fn read_config(path: &Path) -> Result<AdapterConfig> {
    let text = text_file::read(path)?;
    let invalid = |error: &dyn Display| Error::file(path, format!("is not a LoRA configuration: {error}"));
    let json: Value = serde_json::from_str(&text).map_err(|error| invalid(&error))?;
    let config: AdapterConfig = serde_path_to_error::deserialize(&json).map_err(|error| invalid(&error))?;
    if config.peft_type != "LORA" {
        return Err(Error::file(path, format!("peft_type `{}` is not supported: use LORA", config.peft_type)));
    }
    if config.r < 1 {
        return Err(Error::file(path, format!("r is {}: expected at least 1", config.r)));
    }
    match unsupported_setting(&json) {
        None => Ok(config),
        Some(key) => {
            let message =
                format!("`{key}` is {}, which is not supported: merge the adapter with PEFT first", json[key]);
            Err(Error::file(path, message))
        }
    }
}

fn unsupported_setting(config: &Value) -> Option<&'static str> {
    let is_off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    };
    if let Some(key) = UNSUPPORTED.into_iter().find(|key| !is_off(&config[key])) {
        return Some(key);
    }
    match (&config["bias"], &config["init_lora_weights"]) {
        (Value::String(bias), _) if bias != "none" => Some("bias"),
        // Some initializations subtract the fresh adapter from the model's own weights.
        (_, Value::String(initialization)) if initialization != "gaussian" => Some("init_lora_weights"),
        _ => None,
    }
}

/// Writes only a model's adapters, in float32 and in PEFT's format, into an existing folder. `base`
/// is the name or path of the model that they belong to.
///
/// # Errors
/// [`Error::Internal`] for a model without adapters; file-system errors.
pub fn save_adapter(model: &Transformer, folder: &Path, base: &str) -> Result<()> {
    let mut writer = TensorWriter::new(model.device(), STREAMING_BYTES);
    save_adapter_with(&mut writer, model, folder, base)?;
    writer.finish().map(drop)
}

/// As [`save_adapter`], with the tensors written by `writer`.
///
/// # Errors
/// As [`TensorWriter::write`].
pub fn save_adapter_with(writer: &mut TensorWriter, model: &Transformer, folder: &Path, base: &str) -> Result<()> {
    let adapters = model.adapters().ok_or_else(|| Error::internal("the model has no adapters to save"))?;
    let tensors = adapters.named_tensors();
    let kind = adapters.params.kind();
    let spec = |(name, tensor): &(String, Tensor)| TensorSpec {
        name: format!("{NAME_PREFIX}{name}"),
        kind,
        shape: tensor.size(),
    };
    writer.begin_file(&folder.join(WEIGHTS_FILE), &[], &tensors.iter().map(spec).collect::<Vec<_>>())?;
    tensors.iter().try_for_each(|(_, tensor)| writer.write(tensor, kind))?;
    let num_layers = model.config().num_layers as usize;
    atomic_file::write_json(&folder.join(ADAPTER_CONFIG_FILE), &to_config_json(&adapters.config, num_layers, base))
}

/// The content of adapter_config.json. PEFT uses its defaults for the fields that are missing.
fn to_config_json(lora: &LoraConfig, num_layers: usize, base: &str) -> Value {
    // PEFT writes whole numbers as integers, and some readers expect an integer here.
    let alpha = if lora.alpha.fract() == 0.0 { json!(lora.alpha as i64) } else { json!(lora.alpha) };
    let mut config = json!({
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": lora.targets,
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": false,
    });
    if lora.first_layer > 0 {
        config["layers_to_transform"] = json!((lora.first_layer..num_layers).collect::<Vec<_>>());
        config["layers_pattern"] = json!("layers");
    }
    if lora.on == AdaptedTokens::Drafts {
        config["adapted_tokens"] = json!(lora.on);
    }
    config
}
