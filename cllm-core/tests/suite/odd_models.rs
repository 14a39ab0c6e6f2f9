//! Folders whose config.json or files are unusual: each loads to the logits that `transformers`
//! computed (tests/fixtures/record-odd-models), or is refused by what is wrong.

use std::collections::BTreeMap;
use std::path::Path;

use cllm_core::checkpoint;
use cllm_core::cuda::libtorch;
use cllm_core::model::Transformer;
use safetensors::{Dtype, tensor::TensorView};
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Device, IndexOp, Kind, Tensor};

const TOLERANCE: f64 = 1e-4;

/// Models that `transformers` loads and that are refused here, with a part of the message.
const REFUSED: [(&str, &str); 17] = [
    ("rope-nested", "settings of its own for `full_attention`"),
    ("rope-nested-two", "settings of its own for"),
    ("rope-dynamic", "set it to null"),
    ("rope-longrope", "`longrope` is not supported"),
    ("llama3-equal-bounds", "must be below high_freq_factor"),
    ("partial-rotary-outside", "partial_rotary_factor 0.5"),
    ("partial-rotary-inside", "partial_rotary_factor 0.5"),
    ("llama-layer-types", "layer_types does not fit"),
    ("mlp-bias", "mlp_bias"),
    ("gelu", "hidden_act `gelu`"),
    ("type-other", "model_type `gpt_oss`"),
    ("tied-different", "set tie_word_embeddings to false"),
    ("shards-tied-different", "set tie_word_embeddings to false"),
    ("extra-layer", "`model.layers.1.input_layernorm.weight` is not a weight"),
    ("extra-bias", "q_proj.bias` is not a weight"),
    ("stored-F8_E4M3", "F8_E4M3"),
    ("bin-only", "save_pretrained"),
];

#[derive(Deserialize)]
struct Fixture {
    ids: Vec<i64>,
    file_sets: Vec<BTreeMap<String, Value>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    config: Value,
    files: usize,
    logits: Option<Vec<Vec<f32>>>,
}

fn read<T: for<'de> Deserialize<'de>>(name: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The weights that follow from a name, as in record-odd-models.
fn weights(name: &str, shape: &[i64]) -> Tensor {
    let seed = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    let offset = if name.ends_with("norm.weight") { 1.0 } else { 0.0 };
    let draw = |index: u64| {
        let mut x = seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        ((x >> 40) as f64 / 2f64.powi(24) * 0.8 - 0.4 + offset) as f32
    };
    let count = shape.iter().product::<i64>() as u64;
    Tensor::from_slice(&(0..count).map(draw).collect::<Vec<f32>>()).view(shape)
}

/// Writes a safetensors file of the tensors of a file set.
fn write_weights(path: &Path, dtype: &str, tensors: &Value) {
    let (kind, dtype) = match dtype {
        "F64" => (Kind::Double, Dtype::F64),
        "F32" => (Kind::Float, Dtype::F32),
        "F16" => (Kind::Half, Dtype::F16),
        "BF16" => (Kind::BFloat16, Dtype::BF16),
        other => (Kind::Uint8, serde_json::from_value(json!(other)).unwrap()),
    };
    let shape_of = |value: &Value| serde_json::from_value::<Vec<i64>>(value[0].clone()).unwrap();
    let bytes = tensors.as_object().unwrap().iter().map(|(name, value)| {
        let weights = weights(value[1].as_str().unwrap_or(name), &shape_of(value)).to_kind(kind);
        (name, shape_of(value), libtorch::tensor_to_bytes(&weights).unwrap())
    });
    let bytes: Vec<_> = bytes.collect();
    let views = bytes.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(dtype, shape.iter().map(|&size| size as usize).collect(), bytes).unwrap())
    });
    safetensors::serialize_to_file(views, None, path).unwrap();
}

fn write_folder(folder: &Path, config: &Value, files: &BTreeMap<String, Value>) {
    std::fs::write(folder.join("config.json"), config.to_string()).unwrap();
    for (name, content) in files {
        if name.ends_with(".json") {
            std::fs::write(folder.join(name), json!({ "weight_map": content }).to_string()).unwrap();
        } else {
            write_weights(&folder.join(name), content[0].as_str().unwrap(), &content[1]);
        }
    }
}

fn load(case: &Case, fixture: &Fixture) -> cllm_core::Result<Transformer> {
    let dir = tempfile::tempdir().unwrap();
    write_folder(dir.path(), &case.config, &fixture.file_sets[case.files]);
    checkpoint::load(dir.path(), Device::Cpu, Kind::Float)
}

/// Logits of the recorded positions.
fn logits(model: &Transformer, ids: &[i64]) -> Tensor {
    let tokens = Tensor::from_slice(ids).unsqueeze(0);
    let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu)).unsqueeze(0);
    let hidden = model.forward(&tokens, &positions).i((0, &[19_i64, 39][..], ..));
    model.compute_logits(&hidden).unwrap()
}

/// What is wrong with the way in which a case is loaded.
fn complaint(case: &Case, fixture: &Fixture) -> Option<String> {
    let refusal = REFUSED.iter().find(|(name, _)| *name == case.name).map(|(_, part)| *part);
    match (load(case, fixture), &case.logits) {
        (Ok(model), Some(expected)) => {
            let difference =
                (logits(&model, &fixture.ids) - Tensor::from_slice2(expected)).abs().max().double_value(&[]);
            (difference.is_nan() || difference > TOLERANCE || refusal.is_some())
                .then(|| format!("differs by {difference}"))
        }
        (Ok(_), None) => Some("is loaded, unlike in transformers".to_owned()),
        (Err(_), None) => None,
        (Err(error), Some(_)) => {
            let message = error.to_string();
            (!refusal.is_some_and(|part| message.contains(part))).then(|| format!("is refused: {message}"))
        }
    }
}

#[test]
fn an_odd_folder_loads_to_the_logits_of_transformers_or_is_refused_by_what_is_wrong() {
    let fixture: Fixture = read("odd-models.json");
    assert!(fixture.cases.len() > 140);
    let complaints: Vec<String> =
        fixture.cases.iter().filter_map(|case| Some(format!("{} {}", case.name, complaint(case, &fixture)?))).collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// The config.json that a loaded case is saved with. The saved weights give the same logits.
fn saved_config(case: &Case, fixture: &Fixture) -> Option<Value> {
    let model = load(case, fixture).ok()?;
    let dir = tempfile::tempdir().unwrap();
    checkpoint::save(&model, dir.path(), Kind::Float).unwrap();
    let reloaded = checkpoint::load(dir.path(), Device::Cpu, Kind::Float).unwrap();
    assert_eq!(logits(&model, &fixture.ids), logits(&reloaded, &fixture.ids), "{}", case.name);
    Some(serde_json::from_slice(&std::fs::read(dir.path().join("config.json")).unwrap()).unwrap())
}

fn saved_configs() -> BTreeMap<String, Value> {
    let fixture: Fixture = read("odd-models.json");
    fixture.cases.iter().filter_map(|case| Some((case.name.clone(), saved_config(case, &fixture)?))).collect()
}

#[test]
fn what_is_saved_of_an_odd_folder_has_the_same_logits_here_and_in_transformers() {
    // `transformers` computed the logits of each case from its weights and this config.json.
    let recorded: BTreeMap<String, Value> = read("odd-models-saved.json");
    assert!(saved_configs() == recorded, "run tests/fixtures/record-odd-models");
}

#[test]
#[ignore = "writes the configurations; tests/fixtures/record-odd-models runs it and has transformers read them"]
fn write_the_saved_configs_of_odd_models() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/odd-models-saved.json");
    let lines: Vec<String> = saved_configs().iter().map(|(name, config)| format!("{}:{config}", json!(name))).collect();
    std::fs::write(path, format!("{{\n{}\n}}\n", lines.join(",\n"))).unwrap();
}
