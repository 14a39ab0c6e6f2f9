//! The losses of packed sequences equal those of plain causal forwards, token by token and loss by
//! loss.

use std::collections::BTreeMap;
use std::path::Path;

use cllm_core::model::{AdaptedTokens, LoraConfig, Transformer};
use cllm_core::train::{self, DeviceBatch, PackedBatch};
use cllm_core::{checkpoint, fingerprint};
use cllm_train::data::batch::{Batch, BatchCounts};
use cllm_train::data::dataset::{Block, Example};
use cllm_train::data::packing::{NoisyBlock, PackedSequence};
use cllm_train::loss::{Backward, batch_losses, divergence};
use cllm_train::losses::Losses;
use cllm_train::settings::{BlockContext, ConsistencySettings, Divergence, PositionWeights};
use serde::Deserialize;
use tch::{Device, IndexOp, Kind, Tensor};

use crate::setup::plain_consistency;
use cllm_testing::families::{random_model, shapes};

const N: usize = 4;
const ALL_DIVERGENCES: [Divergence; 5] =
    [Divergence::Forward, Divergence::Reverse, Divergence::Jsd, Divergence::Nla, Divergence::LkHybrid];
/// Large enough for any batch here to be one chunk.
const MAX_CHUNK_ROWS: usize = 1 << 20;

/// Runs a test on a model of every family and an anchor of the same shape.
fn for_each_family(test: impl Fn(&str, Transformer, Transformer)) {
    let _no_grad = tch::no_grad_guard();
    for (name, config) in shapes() {
        test(name, random_model(&config, 3), random_model(&config, 4));
    }
}

/// Whether two numbers are equal up to rounding in float32.
fn is_close(actual: f64, expected: f64) -> bool {
    (actual - expected).abs() < 1e-3 * expected.abs().max(1.0)
}

fn token_ids(first: i32, count: usize) -> Vec<i32> {
    (0..count as i32).map(|index| (first + index * 7) % 37).collect()
}

/// A response of `response_len` tokens. Each of its blocks has two noisy states. The first token of
/// the second one is correct; only block 1 is correct from its first state.
pub fn example(id: &str, prompt_len: usize, response_len: usize) -> Example {
    let response_ids = token_ids(2, response_len);
    let mut padded = response_ids.clone();
    padded.resize(response_len.div_ceil(N) * N, 0);
    let blocks = padded.chunks(N).enumerate().map(|(index, fixed_point)| {
        let noisy = token_ids(11 + index as i32, N);
        let later = [&fixed_point[..1], &noisy[1..]].concat();
        let states = if index == 1 { vec![fixed_point.to_vec()] } else { vec![noisy, later, fixed_point.to_vec()] };
        Block { start: index * N, states, augmented: Vec::new() }
    });
    let blocks = blocks.collect();
    Example {
        id: id.to_owned(),
        prompt_ids: token_ids(5, prompt_len),
        labelled: vec![true; response_ids.len()],
        response_ids,
        blocks,
    }
}

fn pack(example: &Example, settings: &ConsistencySettings, epoch: u64) -> PackedSequence {
    PackedSequence::sample(example, settings, &mut fingerprint::derive_rng(1, &example.id, epoch))
}

/// Logits `[tokens, vocab]` of a plain causal forward.
fn causal_logits(model: &Transformer, token_ids: &[i32]) -> Tensor {
    let tokens = Tensor::from_slice(token_ids).to_kind(Kind::Int64).unsqueeze(0);
    let positions = Tensor::arange(tokens.size()[1], (Kind::Int64, Device::Cpu)).unsqueeze(0);
    model.logits_with_grad(&model.forward(&tokens, &positions)).squeeze_dim(0)
}

fn causal_log_probs(model: &Transformer, token_ids: &[i32]) -> Tensor {
    causal_logits(model, token_ids).log_softmax(-1, Kind::Float)
}

fn forward_kl(target: &Tensor, student: &Tensor) -> f64 {
    divergence(target, student, Divergence::Forward).sum(Kind::Double).double_value(&[])
}

/// Losses without gradients.
fn evaluate(
    model: &Transformer,
    anchor: &Transformer,
    sequences: &[PackedSequence],
    settings: &ConsistencySettings,
) -> (Losses<f64>, BatchCounts) {
    let batch = Batch::new(sequences, MAX_CHUNK_ROWS, Some(settings.anchor_prompt_fraction));
    let sums = batch_losses(model, Some(anchor), &batch, settings, None).unwrap();
    (sums.map(|sum| sum.double_value(&[])), batch.counts)
}

fn max_difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn every_token_attends_to_what_its_own_causal_forward_would() {
    for_each_family(|family, model, _| {
        let (prompt, response) = (token_ids(5, 6), token_ids(2, 18));
        // One window of two blocks after the first two blocks, then a block that is cut by the end
        // of the response.
        let blocks = [(8, 8), (12, 8), (16, 16)];
        let state = |start: usize| token_ids(13 + start as i32, N.min(response.len() - start));
        let next_state = |start: usize| token_ids(29 + start as i32, N.min(response.len() - start));
        let noisy_block = |&(start, window_start): &(usize, usize)| NoisyBlock {
            draw: 0,
            start,
            window_start,
            state: state(start),
            next_state: next_state(start),
        };
        let packed = PackedSequence::new(&prompt, &response, blocks.iter().map(noisy_block).collect());
        // Another sequence before it, and one after it.
        let other = || PackedSequence::new(&token_ids(9, 11), &[1], Vec::new());
        let batch = Batch::new(&[other(), packed, other()], MAX_CHUNK_ROWS, None);
        let device_batch = DeviceBatch::new(&batch.packed, &model).unwrap();
        let logits = model.logits_with_grad(&train::forward(&model, &device_batch, 0).unwrap().hidden).i(12..);

        let clean = causal_logits(&model, &[prompt.clone(), response.clone()].concat());
        let difference = max_difference(&logits.i(..24), &clean);
        assert!(difference < 1e-3, "{family}: {difference}");
        let contexts = [response[..8].to_vec(), [&response[..8], &state(8)].concat(), response[..16].to_vec()];
        let mut index = 24;
        for tokens_at in [&state as &dyn Fn(usize) -> Vec<i32>, &next_state] {
            for ((start, _), context) in blocks.iter().zip(&contexts) {
                let before = [prompt.as_slice(), context].concat();
                let own = tokens_at(*start);
                let expected = causal_logits(&model, &[before.as_slice(), &own].concat()).i(before.len() as i64..);
                let actual = logits.i(index..index + own.len() as i64);
                let difference = max_difference(&actual, &expected);
                assert!(difference < 1e-3, "{family}, block at {start}: {difference}");
                index += own.len() as i64;
            }
        }
    });
}

#[test]
fn states_of_a_block_in_one_sequence_are_those_of_a_sequence_each() {
    for_each_family(|family, model, anchor| {
        let whole = example("a", 5, 30);
        // The blocks have two states at most. A noisy window needs all its blocks each time.
        for (context, num_draws) in [(BlockContext::Clean, 2), (BlockContext::NoisyWindow, 3)] {
            let settings = ConsistencySettings {
                context,
                window_blocks: 2,
                local_weight: 1.0,
                states_per_block: 3,
                ..plain_consistency()
            };
            let packed = pack(&whole, &settings, 0);
            let of_draw = |draw: usize| {
                let blocks = packed.noisy_blocks().iter().filter(|block| block.draw == draw);
                let alone = blocks.map(|block| NoisyBlock { draw: 0, ..block.clone() }).collect();
                PackedSequence::new(&whole.prompt_ids, &whole.response_ids, alone)
            };
            assert_eq!(packed.noisy_blocks().last().unwrap().draw, num_draws - 1, "{family}, {context:?}");
            let alone: Vec<PackedSequence> = (0..num_draws).map(of_draw).collect();
            let (together, counts) = evaluate(&model, &anchor, std::slice::from_ref(&packed), &settings);
            let (apart, counts_apart) = evaluate(&model, &anchor, &alone, &settings);
            assert_eq!(counts.num_loss_tokens.global, counts_apart.num_loss_tokens.global, "{family}, {context:?}");
            let is_same = |actual: f64, expected: f64| (actual - expected).abs() < 1e-3 * expected && expected > 0.0;
            assert!(is_same(together.global, apart.global), "{family}, {context:?}: {together:?} {apart:?}");
            assert!(is_same(together.local, apart.local), "{family}, {context:?}: {together:?} {apart:?}");
            let max_tokens = whole.max_packed_tokens(&settings);
            assert!(packed.len() <= max_tokens, "{family}, {context:?}: {} > {max_tokens}", packed.len());
        }
    });
}

#[test]
fn an_example_without_labels_is_in_every_loss_but_the_autoregressive() {
    for_each_family(|family, model, anchor| {
        let settings = ConsistencySettings { local_weight: 1.0, ..plain_consistency() };
        let trajectory = example("a", 5, 14);
        let unlabelled = Example { labelled: vec![false; trajectory.response_ids.len()], ..trajectory.clone() };
        let reference = Example {
            response_ids: token_ids(3, 9),
            labelled: vec![true; 9],
            blocks: Vec::new(),
            ..trajectory.clone()
        };
        let evaluate = |examples: &[&Example]| {
            let sequences: Vec<_> = examples.iter().map(|example| pack(example, &settings, 0)).collect();
            evaluate(&model, &anchor, &sequences, &settings)
        };
        let is_same = |actual: f64, expected: f64| (actual - expected).abs() < 1e-3 * expected && expected > 0.0;
        let (with_labels, _) = evaluate(&[&trajectory]);
        let (without_labels, counts) = evaluate(&[&unlabelled]);
        assert_eq!(
            (without_labels.ar, counts.num_loss_tokens.ar, counts.num_response_tokens),
            (0.0, 0, 14),
            "{family}"
        );
        assert!(is_same(without_labels.global, with_labels.global), "{family}");
        assert!(is_same(without_labels.local, with_labels.local), "{family}");
        assert!(is_same(without_labels.anchor, with_labels.anchor), "{family}");
        let (alone, _) = evaluate(&[&reference]);
        let (together, counts) = evaluate(&[&unlabelled, &reference]);
        assert!(is_same(together.ar, alone.ar) && is_same(together.global, with_labels.global), "{family}");
        assert_eq!((counts.num_loss_tokens.ar, counts.num_response_tokens), (9, 23));
    });
}

#[test]
fn examples_packed_together_give_the_sums_of_each_alone() {
    for_each_family(|family, model, anchor| {
        for context in [BlockContext::Clean, BlockContext::NoisyWindow] {
            let settings = ConsistencySettings { context, window_blocks: 2, local_weight: 1.0, ..plain_consistency() };
            let sequences = [("a", 3, 9), ("b", 12, 14), ("c", 7, 30)]
                .map(|(id, prompt_len, response_len)| pack(&example(id, prompt_len, response_len), &settings, 0));
            let (together, counts) = evaluate(&model, &anchor, &sequences, &settings);
            let alone = sequences.each_ref().map(|one| evaluate(&model, &anchor, std::slice::from_ref(one), &settings));
            let mut expected = Losses::<f64>::default();
            for (losses, _) in alone {
                expected = expected.zip(losses).map(|(total, loss)| total + loss);
            }
            for (actual, expected) in together.zip(expected).into_array() {
                assert!(expected > 0.0, "{family}, {context:?}: {together:?}");
                assert!((actual - expected).abs() < 1e-3 * expected, "{family}: {actual} {expected}");
            }
            assert_eq!(counts.num_response_tokens, 9 + 14 + 30);
            let num_global: usize = alone.iter().map(|(_, counts)| counts.num_loss_tokens.global).sum();
            assert_eq!(counts.num_loss_tokens.global, num_global);
        }
    });
}

#[test]
fn without_labels_and_anchor_the_targets_are_the_frozen_models() {
    for_each_family(|family, model, frozen| {
        let settings = ConsistencySettings { ar_weight: 0.0, anchor_weight: 0.0, ..ConsistencySettings::default() };
        let batch = Batch::new(&[pack(&example("a", 6, 14), &settings, 0)], MAX_CHUNK_ROWS, Some(0.0));
        let log_probs = |model: &Transformer, packed: &PackedBatch, rows: &[i64]| {
            let hidden = train::hidden_states(model, &DeviceBatch::new(packed, model).unwrap()).unwrap();
            model.logits_with_grad(&hidden.index_select(0, &Tensor::from_slice(rows))).log_softmax(-1, Kind::Float)
        };
        let [chunk] = &batch.chunks[..] else { panic!("{family}: {} chunks", batch.chunks.len()) };
        let targets = log_probs(&frozen, &batch.clean, &chunk.clean_rows);
        let targets = targets.index_select(0, &Tensor::from_slice(&chunk.noisy_targets));
        let expected = forward_kl(&targets, &log_probs(&model, &batch.packed, &chunk.noisy_rows));

        let losses = batch_losses(&model, Some(&frozen), &batch, &settings, None).unwrap();
        let actual = losses.global.double_value(&[]);
        assert!(is_close(actual, expected) && expected > 0.1, "{family}: {actual} {expected}");
        assert_eq!(losses.anchor.double_value(&[]), 0.0, "{family}");
    });
}

#[test]
fn chunks_change_neither_losses_nor_gradients() {
    for (family, config) in shapes() {
        let (model, anchor) = (random_model(&config, 3), random_model(&config, 4));
        let gradients = model.collect_gradients().unwrap();
        for divergence in ALL_DIVERGENCES {
            let (position_weights, after_miss_weight) = match divergence {
                Divergence::Forward => (PositionWeights::Uniform, 1.0),
                _ => (PositionWeights::Acceptance, 0.25),
            };
            let settings = ConsistencySettings {
                divergence,
                position_weights,
                after_miss_weight,
                local_weight: 1.0,
                ..plain_consistency()
            };
            let sequences = [("a", 3, 9), ("b", 12, 14)]
                .map(|(id, prompt_len, response_len)| pack(&example(id, prompt_len, response_len), &settings, 0));
            let run = |max_chunk_rows: usize, checkpointed_layers: usize| {
                let batch = Batch::new(&sequences, max_chunk_rows, Some(0.0));
                let scale = Losses { ar: 0.3, global: 0.5, local: 0.7, anchor: 0.9 };
                let backward = Some(Backward { gradients: &gradients, scale, checkpointed_layers });
                let sums = batch_losses(&model, Some(&anchor), &batch, &settings, backward).unwrap();
                let gradient = gradients.buffer().copy();
                let _ = gradients.buffer().shallow_clone().zero_();
                let num_chunks = batch.chunks.len() + batch.local_chunks.len();
                (num_chunks, sums.map(|sum| sum.double_value(&[])), gradient)
            };
            let (whole_chunks, whole_losses, whole_gradient) = run(MAX_CHUNK_ROWS, 0);
            let (num_chunks, losses, gradient) = run(5, 1);
            assert!(whole_chunks == 2 && num_chunks > 8, "{whole_chunks} {num_chunks}");
            for (a, b) in whole_losses.zip(losses).into_array() {
                assert!((a - b).abs() < 1e-4 * a, "{family}: {a} {b}");
            }
            let difference = max_difference(&whole_gradient, &gradient);
            let max_gradient = whole_gradient.abs().max().double_value(&[]);
            assert!(difference < 1e-4 * max_gradient, "{family}: {difference} of {max_gradient}");
        }
    }
}

#[test]
fn the_gradient_predicts_how_a_loss_changes() {
    let (family, config) = shapes().remove(0);
    let model = random_model(&config, 3);
    let gradients = model.collect_gradients().unwrap();
    let settings = ConsistencySettings { local_weight: 1.0, ..plain_consistency() };
    let batch = Batch::new(&[pack(&example("a", 3, 9), &settings, 0)], MAX_CHUNK_ROWS, None);
    let ar_loss = |backward: Option<Backward>| {
        batch_losses(&model, None, &batch, &settings, backward).unwrap().ar.double_value(&[])
    };
    let scale = Losses { ar: 1.0, ..Losses::default() };
    let before = ar_loss(Some(Backward { gradients: &gradients, scale, checkpointed_layers: 0 }));
    // To first order, a small step against the gradient lowers the loss by the gradient's squared
    // norm.
    let step_size = 1e-4;
    let squared_norm = gradients.buffer().square().sum(Kind::Double).double_value(&[]);
    tch::no_grad(|| {
        let _ = model.weights().buffer().shallow_clone().subtract_(&(gradients.buffer() * step_size));
    });
    let ratio = (before - ar_loss(None)) / (step_size * squared_norm);
    assert!((0.9..1.1).contains(&ratio), "{family}: {ratio}");
}

/// The gradient of each adapter against differences of the training loss, in a direction that does not
/// depend on the gradient.
#[test]
fn the_gradient_of_adapters_for_drafts_predicts_how_the_loss_changes_on_every_family() {
    const STEP: f64 = 5e-3;
    for (family, config) in shapes() {
        let mut model = random_model(&config, 3);
        model.add_adapters(&LoraConfig { rank: 2, alpha: 2.0, on: AdaptedTokens::Drafts, ..LoraConfig::default() }, 7);
        let waves = |tensor: &Tensor, frequency: f64| {
            let numbers = Tensor::arange(tensor.numel() as i64, (Kind::Float, Device::Cpu));
            (numbers * frequency).sin().view_as(tensor)
        };
        for (_, mut adapter) in model.trainable().tensors() {
            tch::no_grad(|| adapter.copy_(&(waves(&adapter, 0.7) * 0.2)));
        }
        let gradients = model.collect_gradients().unwrap();
        let settings = ConsistencySettings { ar_weight: 0.0, anchor_weight: 0.0, ..ConsistencySettings::default() };
        let batch = Batch::new(&[pack(&example("a", 3, 9), &settings, 0)], MAX_CHUNK_ROWS, None);
        let loss = |backward: Option<Backward>| {
            batch_losses(&model, None, &batch, &settings, backward).unwrap().global.double_value(&[])
        };
        let scale = Losses { global: 1.0, ..Losses::default() };
        loss(Some(Backward { gradients: &gradients, scale, checkpointed_layers: 1 }));
        for ((name, mut adapter), (_, gradient)) in model.trainable().tensors().into_iter().zip(gradients.tensors()) {
            let direction = waves(&adapter, 1.9);
            let direction = &direction / direction.norm();
            let trained = adapter.copy();
            let mut loss_at = |step: f64| {
                tch::no_grad(|| adapter.copy_(&(&trained + &direction * step)));
                loss(None)
            };
            let slope = (loss_at(STEP) - loss_at(-STEP)) / (2.0 * STEP);
            tch::no_grad(|| adapter.copy_(&trained));
            let expected = (&gradient * &direction).sum(Kind::Double).double_value(&[]);
            let length = gradient.norm().double_value(&[]);
            assert!(
                length > 0.0 && (slope - expected).abs() < 0.01 * length,
                "{family}: {name} has a gradient {length} long, and the loss changes by {slope} instead of {expected}"
            );
        }
    }
}

#[test]
fn a_window_does_not_reach_back_over_the_tokens_that_closed_a_thought() {
    let mut example = example("a", 3, 40);
    // Three tokens close the thought after two blocks.
    let forced = 2 * N..2 * N + 3;
    for block in example.blocks.iter_mut().filter(|block| block.start >= forced.start) {
        block.start += forced.len();
    }
    example.blocks.pop();
    let settings = ConsistencySettings { context: BlockContext::NoisyWindow, window_blocks: 3, ..plain_consistency() };
    let packed = pack(&example, &settings, 0);
    let windows: Vec<(usize, usize)> =
        packed.noisy_blocks().iter().map(|block| (block.start, block.window_start)).collect();
    let expected = [(0, 0), (4, 0), (11, 11), (15, 11), (19, 11), (23, 23), (27, 23), (31, 23), (35, 35)];
    assert_eq!(windows, expected);
    assert!(packed.noisy_blocks().iter().all(|block| block.state.len() == N), "a state reaches over the closing");
}

#[test]
fn an_augmented_state_is_in_no_local_loss() {
    let settings = ConsistencySettings { local_weight: 1.0, ..plain_consistency() };
    // Blocks 0 and 2 have the states 0, 1 and the fixed point. Which of 0 and 1 is drawn depends on
    // the epoch.
    for (augmented, state_0_has_next, state_1_has_next) in
        [(None, true, true), (Some(0), false, true), (Some(1), false, false)]
    {
        let mut example = example("a", 3, 12);
        for block in &mut example.blocks {
            block.augmented = (0..block.states.len()).map(|state| Some(state) == augmented).collect();
        }
        let noisy_blocks: Vec<NoisyBlock> =
            (0..20).flat_map(|epoch| pack(&example, &settings, epoch).noisy_blocks().to_vec()).collect();
        for (state, expected) in [(0, state_0_has_next), (1, state_1_has_next)] {
            let is_state = |noisy: &&NoisyBlock| noisy.state == example.blocks[noisy.start / N].states[state];
            let mut drawn = noisy_blocks.iter().filter(is_state).peekable();
            assert!(drawn.peek().is_some(), "state {state} is never drawn");
            assert!(drawn.all(|noisy| noisy.next_state.is_empty() != expected), "{augmented:?}, state {state}");
        }
    }
}

#[test]
fn the_losses_are_those_of_a_naive_loop() {
    for_each_family(|family, model, anchor| {
        let (prompt, response) = (token_ids(5, 6), token_ids(2, 10));
        let whole = [prompt.clone(), response.clone()].concat();
        // The first block is correct in its first two tokens. The last block is cut by the end of
        // the response, whose last token predicts nothing.
        let first = vec![response[4], response[5], 0, 1];
        let next_of_first = vec![response[4], response[5], 0, 9];
        let last = vec![3, response[9]];
        let block = |start: usize, state: &[i32], next_state: &[i32]| NoisyBlock {
            draw: 0,
            start,
            window_start: start,
            state: state.to_vec(),
            next_state: next_state.to_vec(),
        };
        let noisy_blocks = vec![block(4, &first, &next_of_first), block(8, &last, &response[8..])];
        let packed = [PackedSequence::new(&prompt, &response, noisy_blocks)];
        let settings = ConsistencySettings { local_weight: 1.0, ..plain_consistency() };
        let (actual, counts) = evaluate(&model, &anchor, &packed, &settings);

        let clean = causal_log_probs(&model, &whole);
        let ar: f64 = (0..response.len())
            .map(|offset| -clean.double_value(&[(prompt.len() + offset) as i64 - 1, i64::from(response[offset])]))
            .sum();
        assert!(is_close(actual.ar, ar), "{family}: {actual:?} {ar}");

        // The global loss starts at the first incorrect token of a block.
        let mut global = 0.0;
        for (start, state, offsets) in [(4, &first, 2..4), (8, &last, 0..1)] {
            let noisy = causal_log_probs(&model, &[prompt.as_slice(), &response[..start], state].concat());
            for offset in offsets {
                let row = (prompt.len() + start + offset) as i64;
                global += forward_kl(&clean.i(row..=row), &noisy.i(row..=row));
            }
        }
        assert_eq!((counts.num_loss_tokens.global, counts.num_response_tokens), (3, 10));
        assert!(is_close(actual.global, global), "{family}: {actual:?} {global}");

        // The local loss starts where a state and the next one differ: at the last token of the
        // first block.
        let last_row = |state: &[i32]| {
            let context = [prompt.as_slice(), &response[..4], state].concat();
            causal_log_probs(&model, &context).i(context.len() as i64 - 1..)
        };
        let local_of_first = forward_kl(&last_row(&next_of_first), &last_row(&first));
        let row = (prompt.len() + 8) as i64;
        let noisy = causal_log_probs(&model, &[prompt.as_slice(), &response[..8], &last].concat());
        let local_of_last = forward_kl(&clean.i(row..=row), &noisy.i(row..=row));
        assert_eq!(counts.num_loss_tokens.local, 2);
        assert!(is_close(actual.local, local_of_first + local_of_last), "{family}: {actual:?}");

        let frozen = causal_log_probs(&anchor, &whole);
        let response_rows = (prompt.len() - 1) as i64..(whole.len() - 1) as i64;
        let anchor_of_response = forward_kl(&frozen.i(response_rows.clone()), &clean.i(response_rows));
        assert!(is_close(actual.anchor, anchor_of_response), "{family}: {actual:?} {anchor_of_response}");

        // With half of the prompt tokens in the anchor loss, the others stay the same.
        let settings = ConsistencySettings { anchor_prompt_fraction: 0.5, ..settings };
        let (with_prompt, counts_with_prompt) = evaluate(&model, &anchor, &packed, &settings);
        let anchor_of_prompt: f64 = (1..prompt.len() as i64 - 1)
            .step_by(2)
            .map(|row| forward_kl(&frozen.i(row..=row), &clean.i(row..=row)))
            .sum();
        assert!(is_close(with_prompt.anchor, anchor_of_response + anchor_of_prompt), "{family}: {with_prompt:?}");
        let num_prompt_tokens = counts_with_prompt.num_loss_tokens.anchor - counts.num_loss_tokens.anchor;
        assert_eq!(num_prompt_tokens, (prompt.len() - 1) / 2);
        for (loss, expected) in
            [(with_prompt.ar, actual.ar), (with_prompt.global, actual.global), (with_prompt.local, actual.local)]
        {
            assert!(is_close(loss, expected), "{family}: {loss} {expected}");
        }
    });
}

#[test]
fn a_block_without_noise_is_still_in_the_window_of_later_blocks() {
    let example = example("a", 3, 12);
    let settings = ConsistencySettings { context: BlockContext::NoisyWindow, window_blocks: 3, ..plain_consistency() };
    assert_eq!(pack(&example, &settings, 0).len(), 3 + 12 + 12, "all three blocks are packed");
    // With clean context, only the blocks that have something to learn are packed.
    let settings = ConsistencySettings { context: BlockContext::Clean, ..settings };
    assert_eq!(pack(&example, &settings, 0).len(), 3 + 12 + 8);
}

#[test]
fn a_cut_block_has_the_losses_of_its_first_tokens() {
    for_each_family(|family, model, anchor| {
        let settings = ConsistencySettings { min_block_tokens: Some(1), local_weight: 1.0, ..plain_consistency() };
        let packed = pack(&example("a", 5, 30), &settings, 0);
        let lengths: Vec<usize> = packed.noisy_blocks().iter().map(|block| block.state.len()).collect();
        assert!(lengths.iter().any(|&length| length < 3) && lengths.contains(&N), "{lengths:?}");
        let (actual, counts) = evaluate(&model, &anchor, std::slice::from_ref(&packed), &settings);
        let whole = [token_ids(5, 5), token_ids(2, 30)].concat();
        let clean = causal_log_probs(&model, &whole);
        let (mut global, mut num_tokens) = (0.0, 0);
        for block in packed.noisy_blocks() {
            let start = 5 + block.start;
            assert_eq!(block.next_state.len(), block.state.len());
            let noisy = causal_log_probs(&model, &[&whole[..start], &block.state].concat());
            let first = block.state.iter().zip(&whole[start..]).position(|(noisy, clean)| noisy != clean).unwrap();
            for row in start + first..(start + block.state.len()).min(whole.len() - 1) {
                global += forward_kl(&clean.i(row as i64..=row as i64), &noisy.i(row as i64..=row as i64));
                num_tokens += 1;
            }
        }
        assert_eq!(counts.num_loss_tokens.global, num_tokens, "{family}");
        assert!(is_close(actual.global, global), "{family}: {actual:?} {global}");
    });
}

#[test]
fn each_epoch_draws_new_states_and_never_the_fixed_point() {
    let example = example("a", 3, 4);
    let draw = |epoch| pack(&example, &plain_consistency(), epoch);
    assert!((1..20).any(|epoch| draw(epoch) != draw(0)));
    assert_eq!(draw(3), draw(3));
    for epoch in 0..20 {
        let counts = Batch::new(&[draw(epoch)], MAX_CHUNK_ROWS, None).counts;
        assert!(counts.num_loss_tokens.global > 0, "there is nothing to learn from a fixed point");
    }
}

#[test]
fn divergences_vanish_for_equal_distributions_and_jsd_is_symmetric() {
    let log_probs = |logits: [f32; 3]| Tensor::from_slice(&logits).view([1, 3]).log_softmax(-1, Kind::Float);
    let (p, q) = (log_probs([0.0, 1.0, 3.0]), log_probs([2.0, 0.5, 0.0]));
    let value = |a, b, kind| divergence(a, b, kind).double_value(&[0]);
    for kind in ALL_DIVERGENCES {
        assert!(value(&p, &p, kind).abs() < 1e-6);
        assert!(value(&p, &q, kind) > 0.1);
    }
    assert!((value(&p, &q, Divergence::Jsd) - value(&q, &p, Divergence::Jsd)).abs() < 1e-6);
    assert!((value(&p, &q, Divergence::Reverse) - value(&q, &p, Divergence::Forward)).abs() < 1e-6);
}

#[test]
fn divergences_by_acceptance_have_the_values_and_gradients_of_their_formulas() {
    let log_probs = |probs: [f32; 3]| Tensor::from_slice(&probs).view([1, 3]).log();
    // Of each token, the smaller probability is accepted: 0.2 + 0.3 + 0.1.
    let (target, probs, acceptance) = (log_probs([0.2, 0.3, 0.5]), [0.6, 0.3, 0.1], 0.6f64);
    let kl = 0.2 * (0.2f64 / 0.6).ln() + 0.5 * (0.5f64 / 0.1).ln();
    let kl_weight = (-3.0 * acceptance).exp();
    // With respect to the logits. Only the last probability is smaller than its target; equal ones
    // count as half smaller.
    let smaller: [f64; 3] = [0.0, 0.5, 1.0];
    let smaller_sum: f64 = probs.iter().zip(smaller).map(|(&p, is_smaller)| f64::from(p) * is_smaller).sum();
    let of_acceptance = |index: usize| f64::from(probs[index]) * (smaller[index] - smaller_sum);
    let of_kl = |index: usize| f64::from(probs[index]) - [0.2, 0.3, 0.5][index];
    let hybrid = kl_weight * kl + (1.0 - kl_weight) * (1.0 - acceptance);
    for (kind, expected, gradient) in [
        (Divergence::Nla, -acceptance.ln(), [0, 1, 2].map(|index| -of_acceptance(index) / acceptance)),
        (
            Divergence::LkHybrid,
            hybrid,
            [0, 1, 2].map(|index| kl_weight * of_kl(index) - (1.0 - kl_weight) * of_acceptance(index)),
        ),
    ] {
        let logits = log_probs(probs).set_requires_grad(true);
        let value = divergence(&target, &logits.log_softmax(-1, Kind::Float), kind);
        assert!((value.double_value(&[0]) - expected).abs() < 1e-5, "{kind:?}: {value}");
        value.sum(Kind::Float).backward();
        for (index, expected) in (0..).zip(gradient) {
            assert!((logits.grad().double_value(&[0, index]) - expected).abs() < 1e-5, "{kind:?}: {}", logits.grad());
        }
    }
}

#[test]
fn weights_of_positions_are_those_of_a_naive_loop() {
    for_each_family(|family, model, anchor| {
        let packed = pack(&example("a", 5, 30), &plain_consistency(), 0);
        let whole = [token_ids(5, 5), token_ids(2, 30)].concat();
        let clean = causal_log_probs(&model, &whole);
        let (mut after_miss, mut by_acceptance) = (0.0, 0.0);
        for block in packed.noisy_blocks() {
            let start = 5 + block.start;
            let noisy = causal_log_probs(&model, &[&whole[..start], &block.state].concat());
            let first = block.state.iter().zip(&whole[start..]).position(|(noisy, clean)| noisy != clean).unwrap();
            let rows: Vec<usize> = (start + first..(start + N).min(whole.len() - 1)).collect();
            let label = |row: usize| i64::from(whole[row + 1]);
            let kl = |row: usize| forward_kl(&clean.i(row as i64..=row as i64), &noisy.i(row as i64..=row as i64));
            let mut all_hit = true;
            for (number, &row) in rows.iter().enumerate() {
                after_miss += kl(row) * if all_hit { 1.0 } else { 0.25 };
                all_hit &= noisy.get(row as i64).argmax(0, false).int64_value(&[]) == label(row);
                let accepted = |last: usize| -> f64 {
                    let confidence = |&row: &usize| noisy.double_value(&[row as i64, label(row)]).exp();
                    rows[..=last].iter().map(|row| 0.5 + 0.5 * confidence(row)).product()
                };
                let weight = (number..rows.len()).map(accepted).sum::<f64>() * 2.0 / (rows.len() + 1) as f64;
                by_acceptance += kl(row) * weight;
            }
        }
        for (after_miss_weight, position_weights, expected) in
            [(0.25, PositionWeights::Uniform, after_miss), (1.0, PositionWeights::Acceptance, by_acceptance)]
        {
            let settings = ConsistencySettings { after_miss_weight, position_weights, ..plain_consistency() };
            let (losses, _) = evaluate(&model, &anchor, std::slice::from_ref(&packed), &settings);
            assert!(is_close(losses.global, expected), "{family}, {position_weights:?}: {losses:?} {expected}");
        }
    });
}

/// An example with noisy blocks that `transformers` computed gradients of
/// (cllm-core/tests/fixtures/record-packed).
#[derive(Deserialize)]
struct Recorded {
    example: RecordedExample,
    /// For each model and weight.
    gradients: BTreeMap<String, BTreeMap<String, RecordedGradient>>,
}

#[derive(Deserialize)]
struct RecordedExample {
    prompt: Vec<i32>,
    response: Vec<i32>,
    blocks: Vec<RecordedBlock>,
    /// The token that each packed token should predict.
    labels: Vec<i64>,
}

#[derive(Deserialize)]
struct RecordedBlock {
    start: usize,
    window_start: usize,
    state: Vec<i32>,
    next_state: Vec<i32>,
}

#[derive(Deserialize)]
struct RecordedGradient {
    norm: f64,
    /// Evenly spread elements.
    kept: Vec<f32>,
}

#[test]
fn gradients_of_a_packed_example_agree_with_transformers() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../cllm-core/tests/fixtures");
    let recorded: Recorded =
        serde_json::from_slice(&std::fs::read(fixtures.join("packed-gradients.json")).unwrap()).unwrap();
    let RecordedExample { prompt, response, blocks, labels } = recorded.example;
    let noisy_block = |block: RecordedBlock| NoisyBlock {
        draw: 0,
        start: block.start,
        window_start: block.window_start,
        state: block.state,
        next_state: block.next_state,
    };
    let packed = PackedSequence::new(&prompt, &response, blocks.into_iter().map(noisy_block).collect());
    // Another sequence before it, which is in no loss.
    let other = PackedSequence::new(&token_ids(9, 11), &[1], Vec::new());
    let batch = Batch::new(&[other, packed], MAX_CHUNK_ROWS, None);
    let labels = Tensor::from_slice(&labels);
    for (name, expected) in recorded.gradients {
        let model = checkpoint::load(&fixtures.join("models").join(&name), Device::Cpu, Kind::Float).unwrap();
        let gradients = model.collect_gradients().unwrap();
        let device_batch = DeviceBatch::new(&batch.packed, &model).unwrap();
        let pass = train::forward(&model, &device_batch, 1).unwrap();
        let hidden = pass.hidden.detach().set_requires_grad(true);
        model.logits_with_grad(&hidden.i(12..)).cross_entropy_for_logits(&labels).backward();
        pass.backward(&hidden.grad(), &gradients).unwrap();
        assert_eq!(gradients.tensors().len(), expected.len(), "{name}");
        for (weight, gradient) in gradients.tensors() {
            let RecordedGradient { norm, kept } = &expected[&weight];
            let step = gradient.numel().div_ceil(16) as i64;
            let actual = gradient.flatten(0, -1).slice(0, 0, None, step);
            let difference = max_difference(&actual, &Tensor::from_slice(kept));
            assert!(difference < 1e-4 && (gradient.norm().double_value(&[]) - norm).abs() < 1e-4, "{name}, {weight}");
        }
    }
}
