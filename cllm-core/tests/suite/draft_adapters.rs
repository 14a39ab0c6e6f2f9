//! Adapters that act on draft tokens alone: what they propose changes, and no answer does.

use std::path::{Path, PathBuf};

use cllm_core::checkpoint;
use cllm_core::decode::{Answer, DecodeOptions, Request, Sampling, StopConditions, Strategy, Width, decode};
use cllm_core::model::{AdaptedTokens, KvCache, LoraConfig, SlotMapping, Transformer};
use cllm_core::train::{self, AttentionRanges, DeviceBatch, PackedBatch};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::models::{random_model, shapes};

/// A random model with random adapters of rank 4 from a layer on, and the copy of it in which they are
/// merged.
struct Adapted {
    model: Transformer,
    merged: Transformer,
}

impl Adapted {
    fn new(config: &Value, first_layer: usize) -> Self {
        let with_adapters = |on| {
            let mut model = random_model(config);
            model.add_adapters(&LoraConfig { rank: 4, alpha: 4.0, on, first_layer, ..LoraConfig::default() }, 7);
            model
        };
        let (model, on_all) = (with_adapters(AdaptedTokens::Drafts), with_adapters(AdaptedTokens::All));
        let numbers = Tensor::arange(model.trainable().buffer().numel() as i64, (Kind::Float, Device::Cpu));
        let values = (numbers * 0.7).sin() * 0.2;
        for model in [&model, &on_all] {
            tch::no_grad(|| model.trainable().buffer().shallow_clone().copy_(&values));
        }
        assert!(model.to_merged().unwrap().is_none(), "adapters for drafts are never merged");
        Adapted { model, merged: on_all.to_merged().unwrap().unwrap() }
    }
}

fn requests() -> Vec<Request> {
    let prompt = |index: i32| (1..2 + index * 3).map(|i| i * 5 % 61).collect();
    (0..4).map(|index| Request { sample_id: format!("s{index}"), prompt_ids: prompt(index) }).collect()
}

fn answers(model: &Transformer, strategy: Strategy, sampling: Sampling) -> Vec<Answer> {
    let options = DecodeOptions { sampling, ..DecodeOptions::greedy(strategy, 5) };
    decode(model, &requests(), &StopConditions::new(40, vec![3, 9]), options).unwrap().0
}

fn response_ids(answers: &[Answer]) -> Vec<&[i32]> {
    answers.iter().map(|answer| answer.response_ids.as_slice()).collect()
}

fn num_new_tokens(answers: &[Answer]) -> Vec<&[u32]> {
    answers.iter().map(|answer| answer.num_new_tokens.as_slice()).collect()
}

#[test]
fn gated_answers_are_those_of_the_model_without_adapters_on_every_family() {
    let others = [Strategy::Ar, Strategy::rolling(6), Strategy::lookahead()];
    for (name, config) in shapes() {
        for sampling in [Sampling::Greedy, Sampling::Temperature(0.8), Sampling::Temperature(1.5).with_top_p(0.7)] {
            assert_answers_of_the_frozen_model(name, &config, 0, sampling, others.into_iter().chain(gated()));
        }
        assert_answers_of_the_frozen_model(name, &config, 1, Sampling::Greedy, gated());
    }
}

fn assert_answers_of_the_frozen_model(
    name: &str,
    config: &Value,
    first_layer: usize,
    sampling: Sampling,
    strategies: impl Iterator<Item = Strategy>,
) {
    let model = Adapted::new(config, first_layer).model;
    let expected = answers(&model.without_adapters(), Strategy::Ar, sampling);
    assert!(expected.iter().any(|answer| answer.response_ids.len() > 20), "{name}: all answers are short");
    for strategy in strategies {
        let answers = answers(&model, strategy, sampling);
        let case = format!("{name}, from layer {first_layer}, {strategy}, {sampling:?}");
        assert_eq!(response_ids(&answers), response_ids(&expected), "{case}");
    }
}

fn gated() -> impl Iterator<Item = Strategy> {
    let of_width = |n| [(n, 0), (n, 9), (n, 32)].map(|(n, tree)| Strategy::Gated { n, tree });
    let fixed = [2, 6, 16, 32].into_iter().map(Strategy::gated);
    fixed.chain(of_width(Width::Auto)).chain([9, 32].map(|tree| Strategy::Gated { n: Width::Fixed(6), tree }))
}

#[test]
fn the_adapters_propose_the_drafts() {
    let mut num_different = 0;
    for (name, config) in shapes() {
        let mut model = Adapted::new(&config, 0).model;
        let (strategy, rolling) = (Strategy::gated(8), Strategy::rolling(8));
        let adapted = answers(&model, strategy, Sampling::Greedy);
        // Fresh adapters change nothing.
        model.add_adapters(&LoraConfig { on: AdaptedTokens::Drafts, ..LoraConfig::default() }, 7);
        let fresh = answers(&model, strategy, Sampling::Greedy);
        let expected = answers(&model, rolling, Sampling::Greedy);
        assert_eq!(num_new_tokens(&fresh), num_new_tokens(&expected), "{name}");
        num_different += usize::from(num_new_tokens(&fresh) != num_new_tokens(&adapted));
    }
    assert!(num_different > 0, "adapters must change what is proposed");
    let model = random_model(&shapes().remove(0).1);
    let error =
        decode(&model, &requests(), &StopConditions::new(4, vec![]), DecodeOptions::greedy(Strategy::gated(8), 1));
    assert!(error.err().unwrap().to_string().contains("lora.on=drafts"));
}

const CLEAN: [i32; 12] = [5, 11, 2, 40, 17, 23, 8, 31, 19, 4, 27, 13];
/// Two noisy blocks: the position of the first token, and the tokens.
const BLOCKS: [(usize, [i32; 4]); 2] = [(5, [23, 50, 1, 9]), (8, [19, 33, 33, 6])];

/// Clean tokens and noisy blocks, each of which sees the clean tokens before it.
fn packed() -> PackedBatch {
    let mut tokens = CLEAN.to_vec();
    let mut positions: Vec<i32> = (0..CLEAN.len() as i32).collect();
    let mut ranges: Vec<AttentionRanges> = positions.iter().map(|&index| [(0, index + 1), (0, 0), (0, 0)]).collect();
    for (start, block) in BLOCKS {
        let first = tokens.len() as i32;
        for (offset, token) in (0..).zip(block) {
            tokens.push(token);
            positions.push(start as i32 + offset);
            ranges.push([(0, start as i32), (first, first + offset + 1), (0, 0)]);
        }
    }
    let mut packed = PackedBatch::default();
    packed.push_causal(&[3, 1, 4]);
    packed.push(&tokens, &positions, &ranges, CLEAN.len());
    packed
}

/// Final hidden states of the noisy blocks, read by one model with the keys and values that another
/// has of the clean tokens.
fn hidden_of_two_models(frozen: &Transformer, adapted: &Transformer) -> Tensor {
    let row = |ids: &[i32]| Tensor::from_slice(ids).to_kind(Kind::Int64).unsqueeze(0);
    let mapping = |start: usize, len: usize| {
        SlotMapping::sequential(
            Tensor::arange_start(start as i64, (start + len) as i64, (Kind::Int64, Device::Cpu)).unsqueeze(0),
        )
    };
    let hidden = BLOCKS.map(|(start, block)| {
        let mut cache = KvCache::new(frozen.config(), 1, 32, Device::Cpu, Kind::Float).unwrap();
        let _ = frozen.forward_cached(
            &row(&CLEAN),
            &mapping(0, CLEAN.len()),
            &[CLEAN.len()],
            &mut cache,
            CLEAN.len(),
            None,
        );
        let (len, end) = (block.len(), start + block.len());
        adapted.forward_cached(&row(&block), &mapping(start, len), &[len], &mut cache, end, None)
    });
    Tensor::cat(&hidden, 0)
}

#[test]
fn noisy_tokens_are_those_of_a_second_model_over_the_frozen_one_on_every_family() {
    for ((name, config), first_layer) in shapes().into_iter().flat_map(|shape| [(shape.clone(), 0), (shape, 1)]) {
        let Adapted { model, merged } = Adapted::new(&config, first_layer);
        let frozen = model.without_adapters();
        let packed = packed();
        let batch = DeviceBatch::new(&packed, &model).unwrap();
        let clean = train::hidden_states(&frozen, &DeviceBatch::new(&packed, &frozen).unwrap()).unwrap();
        for checkpointed_layers in [0, 1, 2] {
            let hidden = train::forward(&model, &batch, checkpointed_layers).unwrap().hidden;
            let num_noisy = packed.draft_rows.len() as i64;
            let first_noisy = hidden.size()[0] - num_noisy;
            let difference = |one: &Tensor, other: &Tensor| (one - other).abs().max().double_value(&[]);
            let noisy = hidden.narrow(0, first_noisy, num_noisy);
            assert!(difference(&noisy, &hidden_of_two_models(&frozen, &merged)) < 1e-4, "{name}: noisy tokens");
            let unchanged = (hidden.narrow(0, 0, first_noisy), clean.narrow(0, 0, first_noisy));
            assert_eq!(difference(&unchanged.0, &unchanged.1), 0.0, "{name}: clean tokens");
        }
    }
}

/// Saves a model and its adapters, each in a new folder.
fn save(model: &Transformer, folder: &Path) -> (PathBuf, PathBuf) {
    let (base, adapter) = (folder.join("base"), folder.join("adapter"));
    for folder in [&base, &adapter] {
        std::fs::create_dir(folder).unwrap();
    }
    checkpoint::save(&model.without_adapters(), &base, Kind::Float).unwrap();
    checkpoint::save_adapter(model, &adapter, base.to_str().unwrap()).unwrap();
    (base, adapter)
}

#[test]
fn a_folder_of_adapters_for_drafts_is_read_back_beside_its_model() {
    let (_, config) = shapes().remove(0);
    let Adapted { model, .. } = Adapted::new(&config, 1);
    let folder = tempfile::tempdir().unwrap();
    let (base, adapter) = save(&model, folder.path());
    let adapter_config = std::fs::read_to_string(adapter.join("adapter_config.json")).unwrap();
    let adapter_config: Value = serde_json::from_str(&adapter_config).unwrap();
    assert_eq!(adapter_config["layers_to_transform"], json!([1]));
    let loaded = checkpoint::load(&adapter, Device::Cpu, Kind::Float).unwrap();
    assert!(loaded.adapts_drafts());
    let strategy = Strategy::gated(8);
    let (expected, actual) =
        (answers(&model, strategy, Sampling::Greedy), answers(&loaded, strategy, Sampling::Greedy));
    assert_eq!(num_new_tokens(&actual), num_new_tokens(&expected));
    assert_eq!(response_ids(&actual), response_ids(&expected));
    let error = checkpoint::save(&loaded, &base, Kind::Float).unwrap_err().to_string();
    assert!(error.contains("not merged"), "{error}");
}

#[test]
fn adapters_for_drafts_that_leave_out_a_layer_are_refused() {
    let (_, config) = shapes().remove(0);
    let Adapted { model, .. } = Adapted::new(&config, 0);
    let folder = tempfile::tempdir().unwrap();
    let (_, adapter) = save(&model, folder.path());
    let file = adapter.join("adapter_model.safetensors");
    let mut tensors = Tensor::read_safetensors(&file).unwrap();
    tensors.retain(|(name, _)| !name.contains("layers.1.self_attn.q_proj"));
    Tensor::write_safetensors(&tensors, &file).unwrap();
    let error = checkpoint::load(&adapter, Device::Cpu, Kind::Float).err().unwrap().to_string();
    assert!(
        error.contains("adapter_model.safetensors")
            && error.contains("layer 1 has adapters for k_proj")
            && error.contains("layer 0 for q_proj, k_proj"),
        "{error}"
    );
}
