//! Agreement with `transformers` on recorded tiny models: one for each family, RoPE scaling and form
//! of sliding windows (tests/fixtures/record-models).

use std::path::{Path, PathBuf};

use cllm_core::checkpoint;
use cllm_core::decode::{DecodeOptions, Request, StopConditions, Strategy, decode};
use cllm_core::model::{KvCache, SlotMapping, Transformer};
use cllm_core::train::{self, DeviceBatch, PackedBatch};
use serde_json::Value;
use tch::{Device, IndexOp, Kind, Tensor};

const TOLERANCE: f64 = 1e-4;

struct Fixture {
    folder: PathBuf,
    model: Transformer,
    tokens: Tensor,
    positions: Tensor,
    /// The positions whose logits were recorded.
    recorded: Tensor,
    logits: Tensor,
    loss: f64,
    /// The greedy answer to the first 8 tokens.
    greedy: Vec<i32>,
}

fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(values) => values.iter().flat_map(numbers).collect(),
        value => vec![value.as_f64().unwrap()],
    }
}

pub fn fixture_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

fn fixtures() -> Vec<(String, Fixture)> {
    let mut names: Vec<String> = std::fs::read_dir(fixture_folder(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert!(names.len() >= 19, "fixtures are missing: {names:?}");
    names.into_iter().map(|name| (name.clone(), fixture(&name))).collect()
}

fn fixture(name: &str) -> Fixture {
    let folder = fixture_folder(name);
    let expected: Value = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
    let model = checkpoint::load(&folder, Device::Cpu, Kind::Float).unwrap();
    let tensor = |key: &str| Tensor::from_slice(&numbers(&expected[key]));
    let recorded = tensor("positions").to_kind(Kind::Int64);
    let tokens = tensor("input_ids").to_kind(Kind::Int64).view([2, -1]);
    let positions = Tensor::arange(tokens.size()[1], (Kind::Int64, Device::Cpu)).expand_as(&tokens);
    let logits = tensor("logits").to_kind(Kind::Float).view([2, recorded.size()[0], -1]);
    let loss = expected["loss"].as_f64().unwrap();
    let greedy = serde_json::from_value(expected["greedy"].clone()).unwrap();
    Fixture { folder, model, tokens, positions, recorded, logits, loss, greedy }
}

fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

impl Fixture {
    fn check(&self, case: &str, logits: &Tensor) {
        let difference = max_difference(&logits.index_select(1, &self.recorded), &self.logits);
        assert!(difference < TOLERANCE, "{case}: logits differ by {difference}");
    }
}

#[test]
fn logits_and_loss_agree_with_transformers() {
    for (name, fixture) in fixtures() {
        let Fixture { model, tokens, positions, .. } = &fixture;
        let hidden = model.forward(tokens, positions);
        fixture.check(&name, &model.compute_logits(&hidden).unwrap());
        let logits = model.logits_with_grad(&hidden);
        fixture.check(&format!("{name}, for losses"), &logits);
        let length = tokens.size()[1];
        let loss = logits
            .i((.., ..length - 1))
            .flatten(0, 1)
            .cross_entropy_for_logits(&tokens.i((.., 1..)).flatten(0, 1))
            .double_value(&[]);
        assert!((loss - fixture.loss).abs() < TOLERANCE, "{name}: loss {loss}, expected {}", fixture.loss);
    }
}

#[test]
fn packed_sequences_agree_with_transformers() {
    for (name, fixture) in fixtures() {
        let Fixture { model, tokens, .. } = &fixture;
        let mut packed = PackedBatch::default();
        packed.push_causal(&[3, 1, 4, 1, 5]);
        for row in 0..2 {
            packed.push_causal(&Vec::<i32>::try_from(tokens.get(row).to_kind(Kind::Int)).unwrap());
        }
        let batch = DeviceBatch::new(&packed, model).unwrap();
        for checkpointed_layers in [0, 1] {
            let hidden = train::forward(model, &batch, checkpointed_layers).unwrap().hidden;
            let hidden = hidden.i(5..).view([2, tokens.size()[1], -1]);
            fixture.check(&name, &model.compute_logits(&hidden).unwrap());
        }
    }
}

/// The backward of training, for every layer at once and layer by layer, against autograd of
/// `transformers` (tests/fixtures/record-gradients).
#[test]
fn gradients_of_packed_sequences_agree_with_transformers() {
    for (name, fixture) in fixtures() {
        let Fixture { folder, model, tokens, .. } = &fixture;
        let expected: Value = serde_json::from_slice(&std::fs::read(folder.join("gradients.json")).unwrap()).unwrap();
        let expected = expected["gradients"].as_object().unwrap();
        let gradients = model.collect_gradients().unwrap();
        let mut packed = PackedBatch::default();
        for row in 0..2 {
            packed.push_causal(&Vec::<i32>::try_from(tokens.get(row).to_kind(Kind::Int)).unwrap());
        }
        let batch = DeviceBatch::new(&packed, model).unwrap();
        for checkpointed_layers in [0, 1] {
            let _ = gradients.buffer().shallow_clone().zero_();
            let pass = train::forward(model, &batch, checkpointed_layers).unwrap();
            let hidden = pass.hidden.detach().set_requires_grad(true);
            let length = tokens.size()[1];
            let logits = model.logits_with_grad(&hidden).view([2, length, -1]).i((.., ..length - 1)).flatten(0, 1);
            logits.cross_entropy_for_logits(&tokens.i((.., 1..)).flatten(0, 1)).backward();
            pass.backward(&hidden.grad(), &gradients).unwrap();
            assert_eq!(gradients.tensors().len(), expected.len(), "{name}");
            for (weight, gradient) in gradients.tensors() {
                let (norm, elements) =
                    (numbers(&expected[&weight]["norm"])[0], numbers(&expected[&weight]["elements"]));
                let stride = (gradient.numel() / elements.len()).max(1);
                let gradient = Vec::<f32>::try_from(gradient.flatten(0, -1)).unwrap();
                let own_norm = gradient.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
                let own_elements = gradient.iter().step_by(stride).map(|x| f64::from(*x));
                let difference =
                    own_elements.zip(&elements).map(|(own, expected)| (own - expected).abs()).fold(0.0, f64::max);
                assert!(
                    difference.max((own_norm - norm).abs()) < TOLERANCE * norm,
                    "{name}: the gradient of {weight} differs by {difference}, its norm is {own_norm}, expected {norm}"
                );
            }
        }
    }
}

#[test]
fn cached_forwards_of_uneven_chunks_agree_with_transformers() {
    for (name, fixture) in fixtures() {
        let Fixture { model, tokens, positions, .. } = &fixture;
        let mut cache = KvCache::new(model.config(), 2, 96, Device::Cpu, Kind::Float).unwrap();
        let mut chunks = Vec::new();
        let mut start = 0;
        for width in [30, 1, 16, 1, 32] {
            // Wrong draft tokens are written first, as in Jacobi decoding; the next forward
            // overwrites them.
            let wrong = (tokens.narrow(1, start, width) + 7).remainder(60);
            let (mapping, end) = (SlotMapping::sequential(positions.narrow(1, start, width)), (start + width) as usize);
            let lengths = [width as usize; 2];
            let _ = model.forward_cached(&wrong, &mapping, &lengths, &mut cache, end, None);
            let chunk =
                model.forward_cached(&tokens.narrow(1, start, width), &mapping, &lengths, &mut cache, end, None);
            chunks.push(chunk.view([2, width, -1]));
            start += width;
        }
        fixture.check(&name, &model.compute_logits(&Tensor::cat(&chunks, 1)).unwrap());
    }
}

#[test]
fn every_strategy_gives_the_greedy_answer_of_transformers() {
    for (name, fixture) in fixtures() {
        let ids = Vec::<i32>::try_from(fixture.tokens.get(0).to_kind(Kind::Int)).unwrap();
        let request = Request { sample_id: name.clone(), prompt_ids: ids[..8].to_vec() };
        let stop = StopConditions::new(48, vec![2]);
        for strategy in [Strategy::Ar, Strategy::Jacobi { n: 16 }, Strategy::rolling(8), Strategy::lookahead()] {
            let options = DecodeOptions::greedy(strategy, 5);
            let answers = decode(&fixture.model, std::slice::from_ref(&request), &stop, options).unwrap().0;
            assert_eq!(answers[0].response_ids, fixture.greedy, "{name}, {strategy:?}");
        }
    }
}

#[test]
fn a_saved_model_reloads_to_the_same_logits() {
    for (name, fixture) in fixtures() {
        let dir = tempfile::tempdir().unwrap();
        checkpoint::save(&fixture.model, dir.path(), Kind::Float).unwrap();
        let reloaded = checkpoint::load(dir.path(), Device::Cpu, Kind::Float).unwrap();
        fixture.check(&name, &reloaded.compute_logits(&reloaded.forward(&fixture.tokens, &fixture.positions)).unwrap());
        // Saving it again writes the same files: nothing of the configuration is lost or added.
        let resaved = tempfile::tempdir().unwrap();
        checkpoint::save(&reloaded, resaved.path(), Kind::Float).unwrap();
        for file in ["config.json", "model.safetensors"] {
            let read = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
            assert_eq!(read(dir.path()), read(resaved.path()), "{name}: {file}");
        }
    }
}

#[test]
fn gradients_reach_every_weight_and_updates_are_seen_by_the_model() {
    for (name, fixture) in fixtures() {
        let Fixture { model, tokens, positions, .. } = &fixture;
        let gradients = model.collect_gradients().unwrap();
        let length = tokens.size()[1];
        let loss = || {
            let logits = model.logits_with_grad(&model.forward(tokens, positions));
            logits.i((.., ..length - 1)).flatten(0, 1).cross_entropy_for_logits(&tokens.i((.., 1..)).flatten(0, 1))
        };
        let before = loss();
        before.backward();
        for (weight, gradient) in gradients.tensors() {
            assert!(gradient.abs().max().double_value(&[]) > 0.0, "{name}: no gradient of {weight}");
        }
        tch::no_grad(|| {
            let _ = model.weights().buffer().shallow_clone().subtract_(&(gradients.buffer() * 0.001));
        });
        let after = loss().double_value(&[]);
        assert!(after < before.double_value(&[]), "{name}: {after} after {before}");
    }
}

#[test]
fn checkpointed_layers_give_the_same_gradients() {
    for (name, fixture) in fixtures() {
        let Fixture { model, tokens, .. } = &fixture;
        let gradients = model.collect_gradients().unwrap();
        let mut packed = PackedBatch::default();
        for row in 0..2 {
            packed.push_causal(&Vec::<i32>::try_from(tokens.get(row).to_kind(Kind::Int)).unwrap());
        }
        let batch = DeviceBatch::new(&packed, model).unwrap();
        let mut all_gradients: Vec<Tensor> = Vec::new();
        for checkpointed_layers in [0, 1, 99] {
            let pass = train::forward(model, &batch, checkpointed_layers).unwrap();
            let direction = tch::no_grad(|| pass.hidden.cos());
            pass.backward(&direction, &gradients).unwrap();
            all_gradients.push(gradients.buffer().copy());
            let _ = gradients.buffer().shallow_clone().zero_();
        }
        assert!(all_gradients[0].abs().max().double_value(&[]) > 0.1, "{name}");
        assert!(all_gradients.iter().all(|gradient| *gradient == all_gradients[0]), "{name}");
    }
}

#[test]
fn fingerprints_follow_the_files() {
    let folder = |name: &str| checkpoint::fingerprint(&fixture_folder(name)).unwrap();
    assert_eq!(folder("llama"), folder("llama"));
    assert_ne!(folder("llama"), folder("llama-linear"));
    let fixture = fixture("qwen2");
    let weights: usize = fixture.model.named_parameters().iter().map(|(_, tensor)| tensor.numel()).sum();
    assert_eq!(fixture.model.config().num_parameters(), weights as i64, "{}", fixture.folder.display());
}
