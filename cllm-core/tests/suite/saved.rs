//! `transformers` loads what `checkpoint::save` writes: folders that it wrote for every family and
//! RoPE scaling, with the logits that `transformers` computed from them
//! (tests/fixtures/record-saved).

use std::path::{Path, PathBuf};

use cllm_core::checkpoint;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::models::{random_model, shapes};

/// Smaller configurations than in the other tests, because their weights are files of the
/// repository.
fn small_shapes() -> Vec<(&'static str, Value)> {
    let mut shapes = shapes();
    for (_, config) in &mut shapes {
        for (key, size) in [("vocab_size", 40), ("hidden_size", 16), ("intermediate_size", 24), ("head_dim", 8)] {
            // A `head_dim` that follows from the other sizes is not set.
            if key != "head_dim" || config[key].is_number() {
                config[key] = json!(size);
            }
        }
    }
    shapes
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/saved").join(name)
}

#[test]
fn transformers_loads_what_was_saved_to_the_same_logits() {
    for (name, _) in small_shapes() {
        let folder = folder(name);
        let expected: Value = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
        let ids: Vec<i64> = serde_json::from_value(expected["input_ids"].clone()).unwrap();
        let expected_logits: Vec<Vec<f32>> = serde_json::from_value(expected["logits"].clone()).unwrap();
        let model = checkpoint::load(&folder, Device::Cpu, Kind::Float).unwrap();
        let tokens = Tensor::from_slice(&ids).unsqueeze(0);
        let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu)).unsqueeze(0);
        let logits = model.compute_logits(&model.forward(&tokens, &positions)).unwrap().squeeze_dim(0);
        let expected_logits = Tensor::from_slice2(&expected_logits);
        assert_eq!(logits.size(), expected_logits.size(), "{name}");
        let difference = (logits - expected_logits).abs().max().double_value(&[]);
        assert!(difference < 1e-4, "{name}: logits differ by {difference}");
        // The recorded logits are for exactly these bytes: if they change, `transformers` must read
        // them again.
        let again = tempfile::tempdir().unwrap();
        checkpoint::save(&model, again.path(), Kind::Float).unwrap();
        for file in ["config.json", "model.safetensors"] {
            let read = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
            assert!(read(&folder) == read(again.path()), "{name}: {file} differs: run tests/fixtures/record-saved");
        }
    }
}

#[test]
#[ignore = "writes the folders; tests/fixtures/record-saved runs it and has transformers read them"]
fn write_the_folders() {
    for (name, config) in small_shapes() {
        std::fs::create_dir_all(folder(name)).unwrap();
        checkpoint::save(&random_model(&config), &folder(name), Kind::Float).unwrap();
    }
}
