//! Low-rank adapters on every family: fresh ones change nothing, a forward with them equals a
//! forward of the merged weights, and PEFT loads the saved files.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cllm_core::checkpoint::{self, STREAMING_BYTES, TensorWriter};
use cllm_core::decode::{DecodeOptions, Request, StopConditions, Strategy, decode};
use cllm_core::model::{BaseDtype, LoraConfig, LoraTarget, ModelConfig, Transformer};
use cllm_core::tokenizer::{self, Tokenizer};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::models::{random_model, shapes};
use crate::parity::fixture_folder;

fn rank_3(targets: impl Into<BTreeSet<LoraTarget>>) -> LoraConfig {
    LoraConfig { rank: 3, alpha: 4.5, targets: targets.into(), ..LoraConfig::default() }
}

/// Fills every B with small numbers, the same on every machine, so that the adapters change
/// something.
fn fill_adapters(model: &Transformer) {
    let _no_grad = tch::no_grad_guard();
    for (name, mut tensor) in model.trainable().tensors() {
        if name.ends_with("lora_B.weight") {
            let count = Tensor::arange(tensor.numel() as i64, (Kind::Float, Device::Cpu));
            tensor.copy_(&((count.remainder(7) - 3.0) * 0.125).view_as(&tensor));
        }
    }
}

fn tokens() -> (Tensor, Tensor) {
    let positions = Tensor::arange(20, (Kind::Int64, Device::Cpu)).expand([2, 20], false);
    (Tensor::arange(40, (Kind::Int64, Device::Cpu)).view([2, 20]), positions)
}

/// Logits without a cache.
fn logits(model: &Transformer) -> Tensor {
    let (tokens, positions) = tokens();
    model.compute_logits(&model.forward(&tokens, &positions)).unwrap()
}

fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    (a - b).abs().max().double_value(&[])
}

/// Copies that share no storage.
fn copies(tensors: Vec<(String, Tensor)>) -> Vec<(String, Tensor)> {
    tensors.into_iter().map(|(name, tensor)| (name, tensor.copy())).collect()
}

fn load(folder: &Path) -> Transformer {
    checkpoint::load(folder, Device::Cpu, Kind::Float).unwrap()
}

#[test]
fn fresh_adapters_change_nothing_and_depend_only_on_the_seed() {
    for (name, config) in shapes() {
        let mut model = random_model(&config);
        let before = logits(&model);
        let lora = rank_3(LoraTarget::ALL);
        model.add_adapters(&lora, 4);
        assert_eq!(logits(&model), before, "{name}");
        let count: usize = model.trainable().tensors().iter().map(|(_, tensor)| tensor.numel()).sum();
        assert_eq!(count as i64, lora.num_parameters(model.config()), "{name}");
        let first = model.trainable().tensors();
        assert_eq!(first.len(), 2 * 7 * 2, "{name}");
        for (name, tensor) in first.iter().filter(|(name, _)| name.ends_with("lora_A.weight")) {
            // Kaiming's bound for a = sqrt(5). The largest of many draws comes close to it.
            let (bound, largest) = (1.0 / (tensor.size()[1] as f64).sqrt(), tensor.abs().max().double_value(&[]));
            assert!(largest <= bound && largest > 0.9 * bound, "{name}: {largest} of {bound}");
            assert!(tensor.mean(Kind::Float).double_value(&[]).abs() < 0.2 * bound, "{name}");
        }
        // The draw for a projection does not depend on the other targets.
        model.add_adapters(&rank_3([LoraTarget::VProj]), 4);
        let alone = model.trainable().tensors();
        assert_eq!(alone.len(), 4, "{name}");
        for (name, tensor) in &alone {
            assert_eq!(Some(tensor), first.iter().find(|(other, _)| other == name).map(|(_, tensor)| tensor), "{name}");
        }
        model.add_adapters(&rank_3([LoraTarget::VProj]), 5);
        assert_ne!(model.trainable().tensors()[0].1, alone[0].1, "{name}");
    }
}

#[test]
fn a_forward_with_adapters_equals_a_forward_of_the_merged_weights() {
    let requests: Vec<Request> = (0..3)
        .map(|row| Request { sample_id: format!("s{row}"), prompt_ids: (1..4 + row * 3).map(|i| i * 5 % 61).collect() })
        .collect();
    let stop = StopConditions::new(24, vec![3]);
    let answers = |model: &Transformer, strategy| -> Vec<Vec<i32>> {
        let (answers, _) = decode(model, &requests, &stop, DecodeOptions::greedy(strategy, 5)).unwrap();
        answers.into_iter().map(|answer| answer.response_ids).collect()
    };
    for (name, config) in shapes() {
        let mut model = random_model(&config);
        assert!(model.to_merged().unwrap().is_none(), "{name}");
        let (plain, plain_answers) = (logits(&model), answers(&model, Strategy::Ar));
        let weights = copies(model.named_parameters());
        for target in LoraTarget::ALL {
            model.add_adapters(&rank_3([target]), 4);
            fill_adapters(&model);
            let (adapted, merged) = (logits(&model), logits(&model.to_merged().unwrap().unwrap()));
            assert!(max_difference(&adapted, &plain) > 1e-2, "{name}: {target:?} changes nothing");
            assert!(
                max_difference(&adapted, &merged) < 1e-3,
                "{name}, {target:?}: {}",
                max_difference(&adapted, &merged)
            );
        }
        model.add_adapters(&rank_3(LoraTarget::ALL), 4);
        fill_adapters(&model);
        let merged = model.to_merged().unwrap().unwrap();
        assert!(max_difference(&logits(&model), &logits(&merged)) < 1e-3, "{name}");
        let expected_answers = answers(&model, Strategy::Ar);
        assert_ne!(expected_answers, plain_answers, "{name}: nothing to compare");
        for strategy in [Strategy::Ar, Strategy::Jacobi { n: 8 }] {
            assert_eq!(answers(&merged, strategy), expected_answers, "{name}, {strategy:?}, merged");
            assert_eq!(answers(&model, strategy), expected_answers, "{name}, {strategy:?}, adapters");
        }
        // The weights under the adapters have not changed by a bit, and are still available.
        assert_eq!(model.named_parameters(), weights, "{name}");
        assert_eq!(logits(&model.without_adapters()), plain, "{name}");
        assert_eq!(model.without_adapters().trainable().tensors(), weights, "{name}");
    }
}

#[test]
fn only_adapters_get_gradients() {
    for (name, config) in shapes() {
        let mut model = random_model(&config);
        let weight_gradients = model.collect_gradients().unwrap();
        model.add_adapters(&rank_3(LoraTarget::ALL), 4);
        fill_adapters(&model);
        let gradients = model.collect_gradients().unwrap();
        let (tokens, positions) = tokens();
        let logits = model.logits_with_grad(&model.forward(&tokens, &positions));
        logits.log_softmax(-1, Kind::Float).square().sum(Kind::Float).backward();
        for (parameter, gradient) in gradients.tensors() {
            assert!(gradient.abs().max().double_value(&[]) > 0.0, "{name}: no gradient of {parameter}");
        }
        assert_eq!(weight_gradients.buffer().abs().max().double_value(&[]), 0.0, "{name}: the weights are not frozen");
    }
}

/// Logits of a model, and the gradients that a loss of them gives its adapters.
fn logits_and_gradients(model: &Transformer) -> (Tensor, Tensor) {
    let gradients = model.collect_gradients().unwrap();
    let (tokens, positions) = tokens();
    let logits = model.logits_with_grad(&model.forward(&tokens, &positions));
    logits.log_softmax(-1, Kind::Float).square().sum(Kind::Float).backward();
    (logits.detach(), gradients.buffer().shallow_clone())
}

#[test]
fn a_quantized_base_computes_what_its_dequantized_weights_do() {
    for (name, config) in shapes() {
        let original = random_model(&config);
        let mut quantized = original.to_quantized().unwrap();
        quantized.add_adapters(&rank_3(LoraTarget::ALL), 4);
        // Fresh adapters add nothing.
        let mut dequantized = quantized.to_merged().unwrap().unwrap();
        let mut num_quantized = 0;
        for ((weight, exact), (_, rounded)) in original.named_parameters().iter().zip(dequantized.named_parameters()) {
            let error = (exact - &rounded).abs();
            if weight.ends_with("_proj.weight") {
                let half_steps = exact.abs().amax([1], true) / 127.0 / 2.0;
                assert!(bool::try_from(error.le_tensor(&(half_steps * 1.0001)).all()).unwrap(), "{name}: {weight}");
                num_quantized += i32::from(error.max().double_value(&[]) > 0.0);
            } else {
                assert_eq!(error.max().double_value(&[]), 0.0, "{name}: {weight}");
            }
        }
        assert_eq!(num_quantized as usize, 7 * original.config().num_layers as usize, "{name}");
        dequantized.add_adapters(&rank_3(LoraTarget::ALL), 4);
        fill_adapters(&quantized);
        fill_adapters(&dequantized);
        let (actual, expected) = (logits_and_gradients(&quantized), logits_and_gradients(&dequantized));
        assert!(max_difference(&actual.0, &expected.0) < 1e-5, "{name}");
        assert!(max_difference(&actual.1, &expected.1) < 1e-4 * expected.1.abs().max().double_value(&[]), "{name}");
        let merged = quantized.to_merged().unwrap().unwrap();
        assert!(max_difference(&logits(&merged), &expected.0) < 1e-3, "{name}");
    }
}

/// Of normally distributed weights. The steps of a row are those of its largest weight, which grows
/// with its length.
#[test]
fn products_with_a_quantized_base_are_off_by_less_than_a_hundredth() {
    for hidden in [64, 1024] {
        let config = json!({
            "model_type": "llama", "vocab_size": 64, "hidden_size": hidden, "intermediate_size": 2 * hidden,
            "num_hidden_layers": 1, "num_attention_heads": 4, "tie_word_embeddings": true,
        });
        let original = Transformer::random(ModelConfig::from_json(&config).unwrap(), 1, Device::Cpu, Kind::Float);
        let mut quantized = original.to_quantized().unwrap();
        quantized.add_adapters(&rank_3(LoraTarget::ALL), 4);
        let rounded = quantized.to_merged().unwrap().unwrap();
        tch::manual_seed(5);
        for ((name, exact), (_, rounded)) in original.named_parameters().into_iter().zip(rounded.named_parameters()) {
            if !name.ends_with("_proj.weight") {
                continue;
            }
            let x = Tensor::randn([32, exact.size()[1]], (Kind::Float, Device::Cpu));
            let relative_error = |weight: &Tensor| {
                let difference = x.matmul(&(weight - &exact).tr());
                (difference.norm() / x.matmul(&exact.tr()).norm()).double_value(&[])
            };
            let error = relative_error(&rounded);
            assert!((0.004..0.01).contains(&error), "{hidden}: {name}: {error}");
            let of_bf16 = relative_error(&exact.to_kind(Kind::BFloat16).to_kind(Kind::Float));
            assert!((3.0..6.0).contains(&(error / of_bf16)), "{hidden}: {name}: {error} and {of_bf16} of bfloat16");
        }
    }
}

#[test]
fn a_quantized_base_is_read_from_a_folder_and_its_adapters_are_merged_into_the_weights_there() {
    for (name, config) in shapes() {
        let dir = tempfile::tempdir().unwrap();
        let (base, merged) = (dir.path().join("base"), dir.path().join("merged"));
        [&base, &merged].into_iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
        let mut original = random_model(&config);
        checkpoint::save(&original, &base, Kind::Float).unwrap();
        let mut model = checkpoint::load_base(&base, Device::Cpu, Kind::Float, BaseDtype::Int8).unwrap();
        assert_eq!(logits(&model), logits(&original.to_quantized().unwrap()), "{name}");
        for model in [&mut model, &mut original] {
            model.add_adapters(&rank_3(LoraTarget::ALL), 4);
            fill_adapters(model);
        }
        let mut writer = TensorWriter::new(Device::Cpu, STREAMING_BYTES);
        checkpoint::save_on_base_with(&mut writer, &model, &base, &merged, Kind::Float).unwrap();
        writer.finish().unwrap();
        let expected = original.to_merged().unwrap().unwrap().named_parameters();
        assert_eq!(load(&merged).named_parameters(), expected, "{name}");
        assert!(checkpoint::save(&model, &merged, Kind::Float).is_err(), "{name}: int8 weights are not saved");
    }
}

/// Saves a model in `base` and adapters for it in `adapter`, and returns the model with its
/// adapters.
fn saved(folder: &Path, config: &Value) -> Transformer {
    let (base, adapter) = (folder.join("base"), folder.join("adapter"));
    [&base, &adapter].into_iter().for_each(|folder| std::fs::create_dir(folder).unwrap());
    let mut model = random_model(config);
    checkpoint::save(&model, &base, Kind::Float).unwrap();
    model.add_adapters(&rank_3(LoraTarget::ALL), 4);
    fill_adapters(&model);
    checkpoint::save_adapter(&model, &adapter, &base.display().to_string()).unwrap();
    model
}

#[test]
fn an_adapter_folder_is_the_merged_model() {
    for (name, config) in shapes() {
        let dir = tempfile::tempdir().unwrap();
        let model = saved(dir.path(), &config);
        let (base, adapter, merged) = (dir.path().join("base"), dir.path().join("adapter"), dir.path().join("merged"));
        assert_eq!(load(&adapter).named_parameters(), model.to_merged().unwrap().unwrap().named_parameters(), "{name}");
        std::fs::create_dir(&merged).unwrap();
        checkpoint::save(&model, &merged, Kind::Float).unwrap();
        assert_eq!(load(&merged).named_parameters(), load(&adapter).named_parameters(), "{name}");
        checkpoint::check(&adapter).unwrap();
        assert_eq!(checkpoint::load_config(&adapter).unwrap(), checkpoint::load_config(&base).unwrap());
        // In bf16 only the sum is rounded, not the weight before it.
        let rounded = checkpoint::load(&adapter, Device::Cpu, Kind::BFloat16).unwrap().named_parameters();
        for ((weight, tensor), (_, exact)) in rounded.iter().zip(load(&adapter).named_parameters()) {
            assert_eq!(*tensor, exact.to_kind(Kind::BFloat16), "{name}: {weight}");
        }
        let fingerprint = |folder: &Path| checkpoint::fingerprint(folder).unwrap();
        let before = fingerprint(&adapter);
        assert_ne!(before, fingerprint(&base));
        edit(&adapter, &|config| config["lora_alpha"] = 5.into());
        assert_ne!(before, fingerprint(&adapter), "{name}: alpha is part of it");
        assert!(checkpoint::save_adapter(&load(&base), &adapter, "x").is_err());
    }
}

#[test]
fn an_adapter_without_a_tokenizer_uses_that_of_its_base() {
    let dir = tempfile::tempdir().unwrap();
    let (base, adapter) = (dir.path().join("base"), dir.path().join("adapter"));
    let (_, mut config) = shapes().remove(0);
    config["vocab_size"] = 300.into();
    config["eos_token_id"] = 8.into();
    saved(dir.path(), &config);
    cllm_testing::train_tokenizer(["Tom has apples. ".repeat(20)], 300, &base);
    tokenizer::write_eos_ids(&base, &[7]).unwrap();
    let fingerprint = |folder: &Path| Tokenizer::load(folder).unwrap().fingerprint().to_owned();
    assert_eq!(fingerprint(&adapter), fingerprint(&base));
    assert_eq!(Tokenizer::load(&adapter).unwrap().eos_ids(), [7]);
    let copy = dir.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    tokenizer::copy_files(&adapter, &copy).unwrap();
    assert_eq!(fingerprint(&copy), fingerprint(&base));
    // A tokenizer of the adapter's own has precedence, and so do its ids.
    cllm_testing::train_tokenizer(["Other words make other ids."], 261, &adapter);
    assert_ne!(fingerprint(&adapter), fingerprint(&base));
    tokenizer::write_eos_ids(&adapter, &[9]).unwrap();
    assert_eq!(Tokenizer::load(&adapter).unwrap().eos_ids(), [9]);
}

fn edit(adapter: &Path, change: &dyn Fn(&mut Value)) {
    let path = adapter.join("adapter_config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    std::fs::write(&path, config.to_string()).unwrap();
}

/// Asserts that neither loading nor checking accepts the folder, with a message that has these
/// parts.
#[track_caller]
fn assert_refused(adapter: &Path, parts: &[&str]) {
    for error in [
        checkpoint::load(adapter, Device::Cpu, Kind::Float).err().expect("it must be refused"),
        checkpoint::check(adapter).unwrap_err(),
    ] {
        let message = error.to_string();
        assert!(error.exit_code() == 2 && parts.iter().all(|part| message.contains(part)), "{parts:?}: {message}");
    }
}

#[test]
fn an_error_names_the_bad_setting_of_an_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let (_, config) = shapes().remove(0);
    let adapter = dir.path().join("adapter");
    saved(dir.path(), &config);
    let settings = std::fs::read(adapter.join("adapter_config.json")).unwrap();
    for (key, value, expected) in [
        ("peft_type", json!("IA3"), "`IA3` is not supported"),
        ("r", json!(0), "r is 0"),
        ("lora_alpha", json!("much"), "lora_alpha"),
        ("lora_alpha", Value::Null, "is not a LoRA configuration"),
        ("use_dora", json!(true), "`use_dora` is true, which is not supported: merge"),
        ("rank_pattern", json!({"q_proj": 2}), "`rank_pattern`"),
        ("modules_to_save", json!(["lm_head"]), "`modules_to_save`"),
        ("bias", json!("all"), "`bias` is \"all\""),
        ("init_lora_weights", json!("pissa"), "`init_lora_weights`"),
        ("base_model_name_or_path", json!(""), "has no `base_model_name_or_path`"),
        (
            "base_model_name_or_path",
            json!("./no/where"),
            "base_model_name_or_path `./no/where`: ./no/where: there is no",
        ),
        ("base_model_name_or_path", json!(adapter.display().to_string()), "is an adapter too: merge it"),
    ] {
        edit(&adapter, &|config| config[key] = value.clone());
        assert_refused(&adapter, &["adapter_config.json", expected]);
        std::fs::write(adapter.join("adapter_config.json"), &settings).unwrap();
    }
    for (key, value, expected) in [
        ("r", json!(2), "has shape [3, 32], but the model and `r` call for [2, 32]"),
        ("base_model_name_or_path", json!(fixture_folder("mistral").display().to_string()), "call for"),
    ] {
        edit(&adapter, &|config| config[key] = value.clone());
        assert_refused(&adapter, &["adapter_model.safetensors", expected]);
        std::fs::write(adapter.join("adapter_config.json"), &settings).unwrap();
    }
}

#[test]
fn an_error_names_the_bad_weights_of_an_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let (_, config) = shapes().remove(0);
    let (base, adapter) = (dir.path().join("base"), dir.path().join("adapter"));
    saved(dir.path(), &config);
    let weights = adapter.join("adapter_model.safetensors");
    let good = std::fs::read(&weights).unwrap();
    let rename = |from: &str, to: &str| {
        let header = String::from_utf8_lossy(&good[..good.len() / 4]).into_owned();
        let offset = header.find(from).unwrap();
        let mut bytes = good.clone();
        bytes[offset..offset + to.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&weights, bytes).unwrap();
    };
    let assert_refused = |expected: &str| assert_refused(&adapter, &["adapter_model.safetensors", expected]);
    std::fs::write(&weights, &good[..good.len() / 2]).unwrap();
    assert_refused("not a complete safetensors file");
    rename("layers.1.mlp.up_proj.lora_B", "layers.1.mlp.up_proj.lora_X");
    assert_refused("lacks `base_model.model.model.layers.1.mlp.up_proj.lora_B.weight`");
    rename("layers.0.self_attn.q_proj.lora_A", "layers.7.self_attn.q_proj.lora_A");
    assert_refused("lacks `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`");
    std::fs::remove_file(&weights).unwrap();
    assert_refused("");
    std::fs::write(&weights, &good).unwrap();
    assert!(load(&adapter).named_parameters() != load(&base).named_parameters());
}

fn adapter_folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/adapters").join(name)
}

/// The adapters that PEFT must load. They name their model by its path from the crate's folder, in
/// which tests run.
fn save_ours(folder: &Path) {
    let base = "tests/fixtures/models/llama";
    let mut model = load(Path::new(base));
    model.add_adapters(&LoraConfig { rank: 2, alpha: 5.0, ..LoraConfig::default() }, 4);
    fill_adapters(&model);
    checkpoint::save_adapter(&model, folder, base).unwrap();
}

#[test]
fn peft_computes_the_same_from_its_adapters_and_from_ours() {
    for name in ["from-peft", "ours"] {
        let folder = adapter_folder(name);
        let expected: Value = serde_json::from_slice(&std::fs::read(folder.join("expected.json")).unwrap()).unwrap();
        let ids: Vec<i64> = serde_json::from_value(expected["input_ids"].clone()).unwrap();
        let expected_logits: Vec<Vec<f32>> = serde_json::from_value(expected["logits"].clone()).unwrap();
        let model = load(&folder);
        let tokens = Tensor::from_slice(&ids).unsqueeze(0);
        let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu)).unsqueeze(0);
        let logits = model.compute_logits(&model.forward(&tokens, &positions)).unwrap().squeeze_dim(0);
        let difference = max_difference(&logits, &Tensor::from_slice2(&expected_logits));
        assert!(difference < 1e-4, "{name}: logits differ by {difference}");
    }
    // The recorded logits are PEFT's for exactly these bytes: if they change, PEFT must read them
    // again.
    let again = tempfile::tempdir().unwrap();
    save_ours(again.path());
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        let read = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
        assert!(
            read(&adapter_folder("ours")) == read(again.path()),
            "{file} differs: run tests/fixtures/record-adapters"
        );
    }
}

#[test]
#[ignore = "writes the folder; tests/fixtures/record-adapters runs it and has PEFT read it"]
fn write_the_adapter() {
    std::fs::create_dir_all(adapter_folder("ours")).unwrap();
    save_ours(&adapter_folder("ours"));
}
