//! Adapters in the files of PEFT: adapter_config.json, which names the model they belong to, and adapter_model.safetensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use super::safetensors as weights;
use crate::cuda::libtorch;
use crate::model::{Adapter, Adapters, LoraConfig, LoraTarget, ModelConfig, Transformer};
use crate::{Error, Result, atomic_file, text_file};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before the names of the model's own modules.
const PREFIX: &str = "base_model.model.";

/// Settings of PEFT that change what an adapter computes, and that this toolkit does not know: they must be off.
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

/// The part of adapter_config.json that is read.
#[derive(Deserialize)]
struct AdapterConfig {
    peft_type: String,
    base_model_name_or_path: Option<String>,
    r: i64,
    lora_alpha: f64,
}

/// Whether a folder holds an adapter; as in `transformers`, that counts before a model beside it.
pub fn is_adapter(folder: &Path) -> bool {
    folder.join(CONFIG).exists()
}

/// The folder of the model itself: `folder`, or for an adapter that of the model it belongs to.
///
/// # Errors
/// When adapter_config.json is broken, or names no model that can be found.
pub fn base_folder(folder: &Path) -> Result<PathBuf> {
    if !is_adapter(folder) {
        return Ok(folder.to_owned());
    }
    let (path, config) = read_config(folder)?;
    let name = config.base_model_name_or_path.filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| Error::file(&path, "has no `base_model_name_or_path`: name the model there"))?;
    let wrong = |why: &dyn std::fmt::Display| Error::file(&path, format!("base_model_name_or_path `{name}`: {why}"));
    let base = super::hub::locate(&name).map_err(|error| wrong(&error))?;
    if is_adapter(&base) {
        return Err(wrong(&"is an adapter too: merge it with `cllm-train export`, and name the result here"));
    }
    Ok(base)
}

/// The files of a folder's adapter, if it holds one.
pub(crate) fn files(folder: &Path) -> Vec<PathBuf> {
    if is_adapter(folder) { vec![folder.join(CONFIG), folder.join(WEIGHTS)] } else { Vec::new() }
}

/// The adapter of a folder, if it holds one, for a model of this shape; in float32 on `device`.
///
/// # Errors
/// Names a file that is missing, cut off or does not fit the model, and a setting that is not supported.
pub(crate) fn read(folder: &Path, config: &ModelConfig, device: Device) -> Result<Option<Adapters>> {
    if !is_adapter(folder) {
        return Ok(None);
    }
    let _no_grad = tch::no_grad_guard();
    let (_, settings) = read_config(folder)?;
    let file = folder.join(WEIGHTS);
    let map = libtorch::map_file(&file)?;
    let tensors = SafeTensors::deserialize(&map)
        .map_err(|error| Error::file(&file, format!("is no whole safetensors file ({error}); copy it again")))?;
    let mut found: BTreeMap<String, Tensor> = BTreeMap::new();
    for (name, view) in tensors.iter() {
        let tensor = weights::tensor(&file, name, &view)?.f_to_device(device)?.f_to_kind(Kind::Float)?;
        found.insert(name.to_owned(), tensor);
    }
    // Which projections have an adapter is told by the tensors: `target_modules` may be a pattern, and may leave layers out.
    let lora = LoraConfig { rank: settings.r, alpha: settings.lora_alpha, targets: LoraTarget::ALL.into() };
    let mut each = Vec::new();
    for place in lora.places(config) {
        let names = ["lora_A", "lora_B"].map(|part| format!("{PREFIX}{}.{part}.weight", place.module));
        let [down, up] = match names.each_ref().map(|name| found.remove(name)) {
            [None, None] => continue,
            [Some(down), Some(up)] => [down, up],
            [down, _] => {
                let lacking = &names[usize::from(down.is_some())];
                return Err(Error::file(&file, format!("lacks `{lacking}`, the other half of an adapter")));
            }
        };
        let shapes = [[lora.rank, place.inputs], [place.outputs, lora.rank]];
        for ((name, tensor), shape) in names.iter().zip([&down, &up]).zip(shapes) {
            if tensor.size() != shape {
                let message = format!("`{name}` has shape {:?}, the model and `r` call for {shape:?}", tensor.size());
                return Err(Error::file(&file, message));
            }
        }
        each.push((place, Adapter { down, up, scale: lora.alpha / lora.rank as f64, first: 0 }));
    }
    match found.keys().next() {
        Some(name) => Err(Error::file(&file, format!("`{name}` has no place in the model that it belongs to"))),
        None if each.is_empty() => Err(Error::file(&file, "holds no adapters")),
        None => Ok(Some(Adapters::new(lora, each, device, Kind::Float))),
    }
}

fn read_config(folder: &Path) -> Result<(PathBuf, AdapterConfig)> {
    let path = folder.join(CONFIG);
    let text = text_file::read(&path)?;
    let wrong = |error: &dyn std::fmt::Display| Error::file(&path, format!("is no LoRA configuration: {error}"));
    let whole: Value = serde_json::from_str(&text).map_err(|error| wrong(&error))?;
    let config: AdapterConfig = serde_path_to_error::deserialize(&whole).map_err(|error| wrong(&error))?;
    if config.peft_type != "LORA" {
        return Err(Error::file(&path, format!("peft_type `{}` is not supported: use LORA", config.peft_type)));
    }
    if config.r < 1 {
        return Err(Error::file(&path, format!("r is {}: expected at least 1", config.r)));
    }
    let is_off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(values) => values.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    };
    let get = |key: &str| &whole[key];
    // Some ways to begin take a part out of the model's own weights.
    let wrong =
        UNSUPPORTED.into_iter().find(|key| !is_off(get(key))).or(match (get("bias"), get("init_lora_weights")) {
            (Value::String(bias), _) if bias != "none" => Some("bias"),
            (_, Value::String(way)) if way != "gaussian" => Some("init_lora_weights"),
            _ => None,
        });
    match wrong {
        Some(key) => Err(Error::file(
            &path,
            format!("`{key}` is {}, which is not supported: merge the adapter with PEFT first", get(key)),
        )),
        None => Ok((path, config)),
    }
}

/// Writes the adapters alone, in the model's type, as PEFT does: into an existing folder, which names `base` as the model
/// that they belong to.
///
/// # Errors
/// [`Error::Usage`] for a model without adapters; file-system errors.
pub fn save_adapter(model: &Transformer, folder: &Path, base: &str) -> Result<()> {
    let adapters = model.adapters.as_ref().ok_or_else(|| Error::usage("the model has no adapters to save"))?;
    let tensors: Vec<_> =
        adapters.numbers.tensors().into_iter().map(|(name, tensor)| (format!("{PREFIX}{name}"), tensor)).collect();
    let shapes: Vec<_> = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.size())).collect();
    let (code, _) = weights::type_names(model.kind())?;
    weights::write_safetensors(&folder.join(WEIGHTS), code, model.kind().elt_size_in_bytes(), &shapes, |index| {
        libtorch::tensor_to_bytes(&tensors[index].1)
    })?;
    atomic_file::write_json(&folder.join(CONFIG), &adapter_config(&adapters.lora, base))
}
/// adapter_config.json; what is not there has PEFT's default.
fn adapter_config(lora: &LoraConfig, base: &str) -> Value {
    // PEFT writes whole numbers as such, and some readers expect no other.
    let alpha = if lora.alpha.fract() == 0.0 { json!(lora.alpha as i64) } else { json!(lora.alpha) };
    json!({
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
    })
}
