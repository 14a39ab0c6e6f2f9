//! The gradients of adapters for draft tokens are those that autograd has of two plain models: a frozen
//! one reads the clean tokens, and one with the adapters merged reads each noisy block, over the keys
//! and values that the frozen one has of the clean tokens before it.

use std::collections::BTreeMap;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::{AttentionRanges, DeviceBatch, PackedBatch, forward};
use crate::model::{
    AdaptedTokens, Attention, LoraConfig, ModelConfig, ParamBuffer, Transformer, attention_bias,
    scaled_dot_product_attention,
};

const CLEAN: [i32; 12] = [5, 11, 2, 40, 17, 23, 8, 31, 19, 4, 27, 13];
/// Two noisy blocks: the position of the first token, and the tokens.
const BLOCKS: [(i64, [i32; 4]); 2] = [(5, [23, 50, 1, 9]), (8, [19, 33, 33, 6])];
const RANK: i64 = 4;
const ALPHA: f64 = 6.0;

/// A random model with random adapters for draft tokens.
fn adapted_model(config: &Value, first_layer: usize) -> Transformer {
    let config = ModelConfig::from_json(config).unwrap();
    let mut model = Transformer::random(config, 7, Device::Cpu, Kind::Float);
    let lora = LoraConfig { rank: RANK, alpha: ALPHA, on: AdaptedTokens::Drafts, first_layer, ..LoraConfig::default() };
    model.add_adapters(&lora, 7);
    tch::no_grad(|| {
        for (name, mut weight) in model.named_parameters() {
            // Far from the small weights that training begins with, where much cancels out.
            if !name.ends_with("norm.weight") {
                weight *= 12.0;
            }
        }
        let numbers = Tensor::arange(model.trainable().buffer().numel() as i64, (Kind::Float, Device::Cpu));
        model.trainable().buffer().shallow_clone().copy_(&((numbers * 0.7).sin() * 0.2));
    });
    model
}

/// The clean tokens, and each noisy block after the clean tokens before it.
fn packed() -> PackedBatch {
    let mut tokens = CLEAN.to_vec();
    let mut positions: Vec<i32> = (0..CLEAN.len() as i32).collect();
    let mut ranges: Vec<AttentionRanges> = positions.iter().map(|&index| [(0, index + 1), (0, 0), (0, 0)]).collect();
    for (start, block) in BLOCKS {
        let (start, first) = (start as i32, tokens.len() as i32);
        for (offset, token) in (0..).zip(block) {
            tokens.push(token);
            positions.push(start + offset);
            ranges.push([(0, start), (first, first + offset + 1), (0, 0)]);
        }
    }
    let mut packed = PackedBatch::default();
    packed.push_causal(&[3, 1, 4]);
    packed.push(&tokens, &positions, &ranges, CLEAN.len());
    packed
}

/// Causal attention of the tokens from position `start` on, over the keys and values of those before.
struct PlainAttention<'k> {
    start: i64,
    /// Of every layer, from position 0 on; empty if no token is before.
    before: &'k [(Tensor, Tensor)],
    /// Keys and values of the tokens themselves, layer by layer.
    own: Vec<(Tensor, Tensor)>,
}

impl Attention for PlainAttention<'_> {
    fn attend(&mut self, layer: usize, window: Option<i32>, q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
        self.own.push((k.shallow_clone(), v.shallow_clone()));
        let after = |before: &Tensor, own: &Tensor| Tensor::cat(&[&before.narrow(2, 0, self.start), own], 2);
        let (k, v) = match self.before.get(layer) {
            Some((keys, values)) => (after(keys, k), after(values, v)),
            None => (k.shallow_clone(), v.shallow_clone()),
        };
        let num_keys = k.size()[2];
        let keys = Tensor::arange(num_keys, (Kind::Int64, Device::Cpu));
        let distances = keys.narrow(0, self.start, num_keys - self.start).unsqueeze(1) - keys;
        let is_seen = distances.ge(0).logical_and(&distances.lt(i64::from(window.unwrap_or(i32::MAX))));
        scaled_dot_product_attention(q, &k, &v, Some(&attention_bias(&is_seen, Kind::Float)))
    }
}

/// Final hidden states of tokens, and their keys and values.
fn read(
    model: &Transformer,
    tokens: &[i32],
    start: i64,
    before: &[(Tensor, Tensor)],
) -> (Tensor, Vec<(Tensor, Tensor)>) {
    let positions = Tensor::arange_start(start, start + tokens.len() as i64, (Kind::Int64, Device::Cpu)).unsqueeze(0);
    let rotation = model.rope.rotation(&positions, Kind::Float);
    let mut attention = PlainAttention { start, before, own: Vec::new() };
    let mut x = model.embed(&Tensor::from_slice(tokens).to_kind(Kind::Int64).unsqueeze(0));
    for layer in 0..model.layers.len() {
        x = model.layer_forward(layer, &x, &rotation, &mut attention, None);
    }
    (model.rms_norm(&x, &model.norm).flatten(0, 1), attention.own)
}

/// The model with W + alpha / rank · B A for every weight W that has adapters; gradients flow to those.
fn merged(frozen: &Transformer, adapters: &BTreeMap<String, Tensor>) -> Transformer {
    let weight = |module: String| {
        let weight = frozen.weights().get(&format!("{module}.weight")).unwrap();
        let [lora_a, lora_b] = ["A", "B"].map(|matrix| adapters.get(&format!("{module}.lora_{matrix}.weight")));
        match lora_a.zip(lora_b) {
            Some((lora_a, lora_b)) => weight + lora_b.matmul(lora_a) * (ALPHA / RANK as f64),
            None => weight,
        }
    };
    let mut merged = frozen.without_adapters();
    for (index, layer) in merged.layers.iter_mut().enumerate() {
        let joined = |projections: &[&str]| {
            let weights = projections.iter().map(|name| weight(format!("model.layers.{index}.{name}")));
            Tensor::cat(&weights.collect::<Vec<_>>(), 0)
        };
        layer.qkv_proj.weight = joined(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]);
        layer.o_proj.weight = joined(&["self_attn.o_proj"]);
        layer.gate_up_proj.weight = joined(&["mlp.gate_proj", "mlp.up_proj"]);
        layer.down_proj.weight = joined(&["mlp.down_proj"]);
    }
    merged
}

/// KL(frozen model || adapted model), summed over the noisy tokens, from the final hidden states of the
/// clean and of the noisy tokens.
fn loss(model: &Transformer, clean: &Tensor, noisy: &Tensor) -> Tensor {
    let log_probs = |hidden: &Tensor| model.logits_with_grad(hidden).log_softmax(-1, Kind::Float);
    let targets = BLOCKS.map(|(start, block)| clean.narrow(0, start, block.len() as i64));
    let targets = log_probs(&Tensor::cat(&targets, 0)).detach();
    (targets.exp() * (&targets - log_probs(noisy))).sum(Kind::Float)
}

/// The gradient of the loss, for each matrix of an adapter by its name.
fn expected_gradients(model: &Transformer) -> BTreeMap<String, Tensor> {
    let frozen = model.without_adapters();
    let leaves = model.trainable().tensors().into_iter();
    let leaves = leaves.map(|(name, matrix)| (name, matrix.copy().set_requires_grad(true))).collect();
    let adapted = merged(&frozen, &leaves);
    let (clean, before) = read(&frozen, &CLEAN, 0, &[]);
    let noisy = BLOCKS.map(|(start, block)| read(&adapted, &block, start, &before).0);
    loss(&frozen, &clean, &Tensor::cat(&noisy, 0)).backward();
    leaves.into_iter().map(|(name, leaf)| (name, leaf.grad())).collect()
}

/// The gradients of the same loss through a packed batch.
fn packed_gradients(model: &Transformer, checkpointed_layers: usize) -> ParamBuffer {
    let batch = DeviceBatch::new(&packed(), model).unwrap();
    let gradients = model.collect_gradients().unwrap();
    let pass = forward(model, &batch, checkpointed_layers).unwrap();
    let num_noisy = packed().draft_rows.len() as i64;
    let first_noisy = pass.hidden.size()[0] - num_noisy;
    let clean = pass.hidden.detach().narrow(0, first_noisy - CLEAN.len() as i64, CLEAN.len() as i64);
    let noisy = pass.hidden.detach().narrow(0, first_noisy, num_noisy).set_requires_grad(true);
    loss(model, &clean, &noisy).backward();
    let d_hidden = pass.hidden.detach().zeros_like();
    d_hidden.narrow(0, first_noisy, num_noisy).copy_(&noisy.grad());
    pass.backward(&d_hidden, &gradients).unwrap();
    gradients
}

#[test]
fn gradients_are_those_of_a_second_model_over_the_frozen_one_on_every_family() {
    for ((name, config), first_layer) in
        cllm_testing::families::shapes().into_iter().flat_map(|shape| [(shape.clone(), 0), (shape, 1)])
    {
        let model = adapted_model(&config, first_layer);
        let expected = expected_gradients(&model);
        // The last layer is checkpointed too if those before it have no adapters.
        for checkpointed_layers in [0, 1 + first_layer] {
            let actual = packed_gradients(&model, checkpointed_layers).tensors();
            assert_eq!(actual.len(), expected.len());
            for (adapter, actual) in actual {
                let max = |tensor: &Tensor| tensor.abs().max().double_value(&[]);
                let (difference, largest) = (max(&(actual - &expected[&adapter])), max(&expected[&adapter]));
                assert!(
                    largest > 1e-6 && difference < 1e-3 * largest,
                    "{name}, from layer {first_layer}, {checkpointed_layers} checkpointed: {adapter} is off by \
                     {difference} of {largest}"
                );
            }
        }
    }
}
