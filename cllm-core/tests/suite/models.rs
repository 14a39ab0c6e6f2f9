//! Every family: cached forwards equal uncached ones, and saved models equal loaded ones.

use cllm_core::checkpoint;
use cllm_core::model::{KvCache, ModelConfig, SlotMapping, Transformer, TreeMask};
use serde_json::{Value, json};
use tch::{Device, IndexOp, Kind, Tensor};

pub use cllm_testing::families::shapes;

/// A random model of this configuration.
pub fn random_model(config: &Value) -> Transformer {
    cllm_testing::families::random_model(config, 7)
}

fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn cached_forwards_equal_uncached_ones_with_each_row_at_its_own_position() {
    let _no_grad = tch::no_grad_guard();
    for (name, config) in shapes() {
        let model = random_model(&config);
        let tokens = Tensor::randint(61, [2, 20], (Kind::Int64, Device::Cpu));
        let positions = Tensor::arange(20, (Kind::Int64, Device::Cpu)).expand([2, 20], false);
        let uncached = model.compute_logits(&model.forward(&tokens, &positions)).unwrap();
        let mut cache = KvCache::new(model.config(), 2, 32, Device::Cpu, Kind::Float).unwrap();
        // Row 0 continues after 9 tokens and row 1 after 5, both with 6 tokens.
        let _ = model.forward_cached(
            &tokens.i((.., ..9)),
            &SlotMapping::sequential(positions.i((.., ..9))),
            &[9, 9],
            &mut cache,
            9,
            None,
        );
        let starts = [9, 5];
        let pick = |from: &Tensor| {
            Tensor::stack(&[from.i((0, starts[0]..starts[0] + 6)), from.i((1, starts[1]..starts[1] + 6))], 0)
        };
        let hidden = model.forward_cached(
            &pick(&tokens),
            &SlotMapping::sequential(pick(&positions)),
            &[6, 6],
            &mut cache,
            15,
            None,
        );
        let difference = max_difference(&model.compute_logits(&hidden.view([2, 6, -1])).unwrap(), &pick(&uncached));
        assert!(difference < 1e-3, "{name}: {difference}");
        // A row may be shorter than the others: its padding changes nothing.
        let hidden = model.forward_cached(
            &pick(&tokens),
            &SlotMapping::sequential(pick(&positions)),
            &[2, 6],
            &mut cache,
            15,
            None,
        );
        let expected =
            pick(&uncached).flatten(0, 1).index_select(0, &Tensor::from_slice(&[0i64, 1, 6, 7, 8, 9, 10, 11]));
        let difference = max_difference(&model.compute_logits(&hidden).unwrap(), &expected);
        assert!(difference < 1e-3, "{name}, ragged: {difference}");
    }
}

#[test]
fn a_branch_of_a_tree_sees_its_own_tokens_and_no_others() {
    let _no_grad = tch::no_grad_guard();
    let numbers = |values: &[i64]| Tensor::from_slice(values).unsqueeze(0);
    for (name, config) in shapes() {
        let model = random_model(&config);
        let mut cache = KvCache::new(model.config(), 1, 32, Device::Cpu, Kind::Float).unwrap();
        let prefix = [3i64, 8, 2, 9];
        let mapping = SlotMapping::sequential(numbers(&[0, 1, 2, 3]));
        let _ = model.forward_cached(&numbers(&prefix), &mapping, &[4], &mut cache, 4, None);
        // A tree: token 10 is followed by 11 and by 12, and 12 is followed by 13.
        let tree_mask = TreeMask { first_slot: numbers(&[4]), visible: numbers(&[0b1, 0b11, 0b101, 0b1101]) };
        let mapping = SlotMapping {
            positions: numbers(&[4, 5, 5, 6]),
            slots: numbers(&[4, 5, 6, 7]),
            tree_mask: Some(tree_mask),
        };
        let hidden = model.forward_cached(&numbers(&[10, 11, 12, 13]), &mapping, &[4], &mut cache, 8, None);
        let logits = model.compute_logits(&hidden).unwrap();
        for (row, path) in [(0, &[10][..]), (1, &[10, 11]), (2, &[10, 12]), (3, &[10, 12, 13])] {
            let ids = [&prefix[..], path].concat();
            let positions: Vec<i64> = (0..ids.len() as i64).collect();
            let alone = model.compute_logits(&model.forward(&numbers(&ids), &numbers(&positions))).unwrap();
            let difference = max_difference(&logits.get(row), &alone.i((0, -1)));
            assert!(difference < 1e-3, "{name}, {path:?}: {difference}");
        }
    }
}

#[test]
fn saved_models_equal_loaded_ones_and_a_truncated_file_is_refused() {
    let _no_grad = tch::no_grad_guard();
    for (name, config) in shapes() {
        let dir = tempfile::tempdir().unwrap();
        let model = random_model(&config);
        checkpoint::save(&model, dir.path(), Kind::Float).unwrap();
        let loaded = checkpoint::load(dir.path(), Device::Cpu, Kind::Float).unwrap();
        assert_eq!(loaded.named_parameters().len(), model.named_parameters().len(), "{name}");
        for ((name, a), (_, b)) in model.named_parameters().iter().zip(loaded.named_parameters()) {
            assert_eq!(max_difference(a, &b), 0.0, "{name}");
        }
        let weights = dir.path().join("model.safetensors");
        let bytes = std::fs::read(&weights).unwrap();
        std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
        let error = checkpoint::load(dir.path(), Device::Cpu, Kind::Float).err().unwrap().to_string();
        assert!(error.contains("model.safetensors"), "{error}");
    }
}

#[test]
fn unsupported_settings_are_refused_by_name() {
    let (_, base) = shapes().remove(0);
    for (key, value) in [
        ("model_type", json!("gemma")),
        ("hidden_act", json!("gelu")),
        ("rope_scaling", json!({"rope_type": "dynamic", "factor": 2.0})),
        ("quantization_config", json!({"bits": 4})),
        ("hidden_size", json!("wide")),
    ] {
        let mut config = base.clone();
        config[key] = value;
        let message = ModelConfig::from_json(&config).unwrap_err();
        assert!(message.contains(key), "{key}: {message}");
    }
}
