//! One packed pass gives what plain causal passes give, token by token and loss by loss.

use cllm_core::fingerprint;
use cllm_core::model::Transformer;
use cllm_core::train::{self, DeviceBatch};
use cllm_train::data::dataset::{Block, Example};
use cllm_train::data::packing::{Batch, NoisyBlock, Packed};
use cllm_train::loss::{Backward, divergence, losses};
use cllm_train::settings::{BlockContext, ConsistencySettings, Divergence};
use tch::{Device, IndexOp, Kind, Tensor};

use cllm_testing::families::{random_model, shapes};

const N: usize = 4;
/// Most logits at once: all there are.
const ROWS: usize = 1 << 20;

/// Runs a test on a model and a teacher of every family.
fn each_family(test: impl Fn(&str, Transformer, Transformer)) {
    let _no_grad = tch::no_grad_guard();
    for (name, config) in shapes() {
        test(name, random_model(&config, 3), random_model(&config, 4));
    }
}

/// Whether two numbers are the same but for float32.
fn close(found: &Tensor, expected: f64) -> bool {
    (found.double_value(&[]) - expected).abs() < 1e-3 * expected.abs().max(1.0)
}

fn ids(from: i32, count: usize) -> Vec<i32> {
    (0..count as i32).map(|index| (from + index * 7) % 37).collect()
}

/// A response of `length` tokens, each of whose blocks has two noisy states (the later one right at its first token), but
/// for block 1, which was right at once.
pub fn example(name: &str, prompt: usize, length: usize) -> Example {
    let response = ids(2, length);
    let mut whole = response.clone();
    whole.resize(length.div_ceil(N) * N, 0);
    let blocks = whole.chunks(N).enumerate().map(|(index, fixed)| {
        let noisy = ids(11 + index as i32, N);
        let later = [&fixed[..1], &noisy[1..]].concat();
        let states = if index == 1 { vec![fixed.to_vec()] } else { vec![noisy, later, fixed.to_vec()] };
        Block { start: index * N, states, augmented: Vec::new() }
    });
    let blocks = blocks.collect();
    Example { id: name.to_owned(), prompt: ids(5, prompt), response: response.clone(), blocks, labels: true }
}

/// Logits of a plain causal pass.
fn plain(model: &Transformer, tokens: &[i32]) -> Tensor {
    let tokens = Tensor::from_slice(tokens).to_kind(Kind::Int64).unsqueeze(0);
    let positions = Tensor::arange(tokens.size()[1], (Kind::Int64, Device::Cpu)).unsqueeze(0);
    model.logits_with_grad(&model.forward(&tokens, &positions)).squeeze_dim(0)
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).abs().max().double_value(&[])
}

#[test]
fn every_token_sees_what_its_own_causal_pass_would_show_it() {
    each_family(|family, model, _| {
        let (prompt, response) = (ids(5, 6), ids(2, 18));
        // One window of three blocks after the first two blocks, then a block cut by the end of the response.
        let starts = [(8, 8), (12, 8), (16, 16)];
        let state = |start: usize| ids(13 + start as i32, N.min(response.len() - start));
        let next = |start: usize| ids(29 + start as i32, N.min(response.len() - start));
        let noisy =
            |&(start, window): &(usize, usize)| NoisyBlock { start, window, tokens: state(start), next: next(start) };
        let packed = Packed::new(&prompt, &response, starts.iter().map(noisy).collect());
        // Another one before it, and one behind.
        let other = || Packed::new(&ids(9, 11), &[1], Vec::new());
        let batch = Batch::new(&[other(), packed, other()], ROWS, None);
        let stream = DeviceBatch::new(&batch.stream, &model).unwrap();
        let logits = model.logits_with_grad(&train::forward(&model, &stream, 0).unwrap().hidden).i(12..);

        let clean = plain(&model, &[prompt.clone(), response.clone()].concat());
        let apart = difference(&logits.i(..24), &clean);
        assert!(apart < 1e-3, "{family}: {apart}");
        let contexts = [response[..8].to_vec(), [&response[..8], &state(8)].concat(), response[..16].to_vec()];
        let mut place = 24;
        for stream in [&state as &dyn Fn(usize) -> Vec<i32>, &next] {
            for ((start, _), context) in starts.iter().zip(&contexts) {
                let before = [prompt.as_slice(), context].concat();
                let own = stream(*start);
                let expected = plain(&model, &[before.as_slice(), &own].concat()).i(before.len() as i64..);
                let found = logits.i(place..place + own.len() as i64);
                let apart = difference(&found, &expected);
                assert!(apart < 1e-3, "{family}, block at {start}: {apart}");
                place += own.len() as i64;
            }
        }
    });
}

#[test]
fn a_response_without_labels_is_in_every_loss_but_the_autoregressive() {
    each_family(|family, model, teacher| {
        let settings = ConsistencySettings { local_weight: 1.0, ..ConsistencySettings::default() };
        let pack = |example: &Example| example.pack(&settings, &mut fingerprint::derive_rng(1, "a", 0));
        let trajectory = example("a", 5, 14);
        let bare = Example { labels: false, ..trajectory.clone() };
        let reference = Example { response: ids(3, 9), blocks: Vec::new(), ..trajectory.clone() };
        let sums = |examples: &[&Example]| {
            let packed: Vec<Packed> = examples.iter().map(|example| pack(example)).collect();
            let batch = Batch::new(&packed, ROWS, Some(0.0));
            let sums = losses(&model, Some(&teacher), &batch, &settings, None).unwrap();
            (sums.map(|sum| sum.double_value(&[])), batch.counts)
        };
        let near = |found: f64, expected: f64| (found - expected).abs() < 1e-3 * expected && expected > 0.0;
        let (with, _) = sums(&[&trajectory]);
        let (without, counts) = sums(&[&bare]);
        assert_eq!((without[0], counts.labels, counts.clean), (0.0, 0, 14), "{family}");
        assert!((1..4).all(|loss| near(without[loss], with[loss])), "{family}");
        let (alone, _) = sums(&[&reference]);
        let (together, counts) = sums(&[&bare, &reference]);
        assert!(near(together[0], alone[0]) && near(together[1], with[1]), "{family}");
        assert_eq!((counts.labels, counts.clean), (9, 23));
    });
}

#[test]
fn responses_packed_together_give_the_sums_of_each_alone() {
    each_family(|family, model, teacher| {
        for context in [BlockContext::Clean, BlockContext::NoisyWindow] {
            let settings =
                ConsistencySettings { context, window_blocks: 2, local_weight: 1.0, ..ConsistencySettings::default() };
            let rows: Vec<Packed> = [("a", 3, 9), ("b", 12, 14), ("c", 7, 30)]
                .map(|(name, prompt, length)| {
                    example(name, prompt, length).pack(&settings, &mut fingerprint::derive_rng(1, name, 0))
                })
                .into();
            let sums = |rows: &[Packed]| {
                let batch = Batch::new(rows, ROWS, Some(0.0));
                let sums = losses(&model, Some(&teacher), &batch, &settings, None).unwrap();
                (sums.map(|sum| sum.double_value(&[])), batch.counts)
            };
            let together = sums(&rows);
            let alone: Vec<_> = rows.iter().map(|row| sums(std::slice::from_ref(row))).collect();
            for index in 0..4 {
                let expected: f64 = alone.iter().map(|sum| sum.0[index]).sum();
                assert!(expected > 0.0, "{family}, {context:?}: loss {index} is empty");
                assert!(
                    (together.0[index] - expected).abs() < 1e-3 * expected,
                    "{family}: {} {expected}",
                    together.0[index]
                );
            }
            assert_eq!(together.1.clean, 9 + 14 + 30);
            assert_eq!(together.1.noisy, alone.iter().map(|sum| sum.1.noisy).sum::<usize>());
        }
    });
}

#[test]
fn chunks_of_the_vocabulary_change_neither_losses_nor_gradients() {
    for (family, config) in shapes() {
        let (model, teacher) = (random_model(&config, 3), random_model(&config, 4));
        let gradients = model.collect_gradients().unwrap();
        for divergence in [Divergence::Forward, Divergence::Reverse, Divergence::Jsd] {
            let settings = ConsistencySettings { divergence, local_weight: 1.0, ..ConsistencySettings::default() };
            let packed = [("a", 3, 9), ("b", 12, 14)].map(|(name, prompt, length)| {
                example(name, prompt, length).pack(&settings, &mut fingerprint::derive_rng(1, name, 0))
            });
            let run = |rows: usize, recomputed: usize| {
                let batch = Batch::new(&packed, rows, Some(0.0));
                let backward = Backward { scale: [0.3, 0.5, 0.7, 0.9], recomputed };
                let sums = losses(&model, Some(&teacher), &batch, &settings, Some(backward)).unwrap();
                let gradient = gradients.buffer().copy();
                let _ = gradients.buffer().shallow_clone().zero_();
                (batch.chunks.len() + batch.local.len(), sums.map(|sum| sum.double_value(&[])), gradient)
            };
            let (whole, chunked) = (run(ROWS, 0), run(5, 1));
            assert!(whole.0 == 2 && chunked.0 > 8, "{} {}", whole.0, chunked.0);
            for (a, b) in whole.1.iter().zip(chunked.1) {
                assert!((a - b).abs() < 1e-4 * a, "{family}: {a} {b}");
            }
            let (apart, size) = (difference(&whole.2, &chunked.2), whole.2.abs().max().double_value(&[]));
            assert!(apart < 1e-4 * size, "{family}: {apart} of {size}");
        }
    }
}

#[test]
fn the_gradient_is_that_of_the_sums() {
    let (family, config) = shapes().remove(0);
    let model = random_model(&config, 3);
    let gradients = model.collect_gradients().unwrap();
    let settings = ConsistencySettings { local_weight: 1.0, ..ConsistencySettings::default() };
    let packed = example("a", 3, 9).pack(&settings, &mut fingerprint::derive_rng(1, "a", 0));
    let batch = Batch::new(&[packed], ROWS, None);
    let scale = [1.0, 0.0, 0.0, 0.0];
    let sum =
        |backward: Option<Backward>| losses(&model, None, &batch, &settings, backward).unwrap()[0].double_value(&[]);
    let before = sum(Some(Backward { scale, recomputed: 0 }));
    // A small step against the gradient takes away its squared length, to first order.
    let rate = 1e-4;
    let slope = gradients.buffer().square().sum(Kind::Double).double_value(&[]);
    tch::no_grad(|| {
        let _ = model.weights().buffer().shallow_clone().subtract_(&(gradients.buffer() * rate));
    });
    let fallen = (before - sum(None)) / (rate * slope);
    assert!((0.9..1.1).contains(&fallen), "{family}: {fallen}");
}

#[test]
fn a_state_that_augment_changed_is_in_no_adjacent_pair() {
    let settings = ConsistencySettings { local_weight: 1.0, ..ConsistencySettings::default() };
    // Blocks 0 and 2 have the states 0, 1 and the fixed point; which of 0 and 1 is drawn depends on the round.
    for (changed, pairs_from_0, pairs_from_1) in [(None, true, true), (Some(0), false, true), (Some(1), false, false)] {
        let mut example = example("a", 3, 12);
        for block in &mut example.blocks {
            block.augmented = (0..block.states.len()).map(|state| Some(state) == changed).collect();
        }
        let rounds = (0..20).map(|round| example.pack(&settings, &mut fingerprint::derive_rng(1, "a", round)));
        let found: Vec<(bool, bool)> = rounds
            .flat_map(|packed| packed.noisy().to_vec())
            .map(|noisy| {
                let states = &example.blocks[noisy.start / N].states;
                (noisy.tokens == states[0], !noisy.next.is_empty())
            })
            .collect();
        for (first, expected) in [(true, pairs_from_0), (false, pairs_from_1)] {
            let mut drawn = found.iter().filter(|(from_first, _)| *from_first == first).peekable();
            assert!(drawn.peek().is_some() && drawn.all(|(_, pair)| *pair == expected), "{changed:?}, {first}");
        }
    }
}

#[test]
fn the_losses_are_those_of_a_naive_loop() {
    each_family(|family, model, teacher| {
        let (prompt, response) = (ids(5, 6), ids(2, 10));
        let clean = plain(&model, &[prompt.clone(), response.clone()].concat()).log_softmax(-1, Kind::Float);
        // Right at its first two tokens; the last block is cut by the end of the response, whose last token predicts nothing.
        let first = vec![response[4], response[5], 0, 1];
        let last = vec![3, response[9]];
        let next = vec![response[4], response[5], 0, 9];
        let block = |start: usize, tokens: &[i32], next: &[i32]| NoisyBlock {
            start,
            window: start,
            tokens: tokens.to_vec(),
            next: next.to_vec(),
        };
        let packed = Packed::new(&prompt, &response, vec![block(4, &first, &next), block(8, &last, &response[8..])]);
        let settings = ConsistencySettings { local_weight: 1.0, ..ConsistencySettings::default() };
        let batch = Batch::new(std::slice::from_ref(&packed), ROWS, Some(0.0));
        let [found_ar, found_global, found_local, found_anchor] =
            losses(&model, Some(&teacher), &batch, &settings, None).unwrap();
        // With half of the prompt's tokens, of which the last stands before the response.
        let half = Batch::new(&[packed], ROWS, Some(0.5));
        let others = losses(&model, Some(&teacher), &half, &settings, None).unwrap();
        for (loss, found) in [&found_ar, &found_global, &found_local].into_iter().enumerate() {
            assert!(close(&others[loss], found.double_value(&[])), "{family}: loss {loss}");
        }

        let frozen = plain(&teacher, &[prompt.clone(), response.clone()].concat()).log_softmax(-1, Kind::Float);
        let answers = (prompt.len() - 1) as i64..(prompt.len() + response.len() - 1) as i64;
        let anchor = divergence(&frozen.i(answers.clone()), &clean.i(answers), Divergence::Forward).double_value(&[]);
        assert!(close(&found_anchor, anchor), "{family}: {anchor}");
        let of_prompt: f64 = (1..prompt.len() as i64 - 1)
            .step_by(2)
            .map(|at| divergence(&frozen.i(at..=at), &clean.i(at..=at), Divergence::Forward).double_value(&[]))
            .sum();
        assert!(close(&others[3], anchor + of_prompt), "{family}: {anchor} {of_prompt}");
        assert_eq!(half.counts.anchored, batch.counts.anchored + (prompt.len() - 1) / 2);
        let mut consistency = 0.0;
        for (start, tokens, kept) in [(4, &first, 2..4), (8, &last, 0..1)] {
            let noisy = plain(&model, &[prompt.as_slice(), &response[..start], tokens].concat());
            for offset in kept {
                let place = (prompt.len() + start + offset) as i64;
                let rows = (clean.i(place..=place), noisy.i(place..=place).log_softmax(-1, Kind::Float));
                consistency += divergence(&rows.0, &rows.1, Divergence::Forward).double_value(&[]);
            }
        }
        assert_eq!((batch.counts.noisy, batch.counts.clean), (3, 10));
        assert!(close(&found_global, consistency), "{family}: {consistency}");
        // The local loss starts where a state and the next differ: the last offset of the first block.
        let log = |tokens: &[i32]| {
            let whole = [prompt.as_slice(), &response[..4], tokens].concat();
            plain(&model, &whole).i(whole.len() as i64 - 1..).log_softmax(-1, Kind::Float)
        };
        let last_offset = divergence(&log(&next), &log(&first), Divergence::Forward).double_value(&[]);
        let at = (prompt.len() + 8) as i64;
        let noisy = plain(&model, &[prompt.as_slice(), &response[..8], &last].concat()).log_softmax(-1, Kind::Float);
        let cut = divergence(&clean.i(at..=at), &noisy.i(at..=at), Divergence::Forward).double_value(&[]);
        assert_eq!(batch.counts.local, 2);
        assert!(close(&found_local, last_offset + cut), "{family}: {last_offset} {cut}");
        let ar: f64 = (0..10)
            .map(|offset| -clean.double_value(&[(prompt.len() + offset) as i64 - 1, i64::from(response[offset])]))
            .sum();
        assert!(close(&found_ar, ar), "{family}: {ar}");
    });
}

#[test]
fn a_block_that_was_right_at_once_still_stands_in_the_window_of_the_next() {
    let example = example("a", 3, 12);
    let settings =
        ConsistencySettings { context: BlockContext::NoisyWindow, window_blocks: 3, ..ConsistencySettings::default() };
    let packed = example.pack(&settings, &mut fingerprint::derive_rng(1, "a", 0));
    assert_eq!(packed.len(), 3 + 12 + 12, "all three blocks are there");
    // The other context needs only the blocks that can learn something.
    let settings = ConsistencySettings { context: BlockContext::Clean, ..settings };
    assert_eq!(example.pack(&settings, &mut fingerprint::derive_rng(1, "a", 0)).len(), 3 + 12 + 8);
}

#[test]
fn states_are_drawn_anew_each_epoch_and_never_the_fixed_point() {
    let example = example("a", 3, 4);
    let settings = ConsistencySettings::default();
    let draw = |epoch| example.pack(&settings, &mut fingerprint::derive_rng(1, &example.id, epoch));
    assert!((1..20).any(|epoch| draw(epoch) != draw(0)));
    assert_eq!(draw(3), draw(3));
    for epoch in 0..20 {
        assert!(Batch::new(&[draw(epoch)], ROWS, None).counts.noisy > 0, "a fixed point teaches nothing");
    }
}

#[test]
fn divergences_vanish_for_equal_distributions_and_jsd_is_symmetric() {
    let log = |values: [f32; 3]| Tensor::from_slice(&values).view([1, 3]).log_softmax(-1, Kind::Float);
    let (p, q) = (log([0.0, 1.0, 3.0]), log([2.0, 0.5, 0.0]));
    for kind in [Divergence::Forward, Divergence::Reverse, Divergence::Jsd] {
        assert!(divergence(&p, &p, kind).double_value(&[]).abs() < 1e-6);
        assert!(divergence(&p, &q, kind).double_value(&[]) > 0.1);
    }
    let value = |a, b, kind| divergence(a, b, kind).double_value(&[]);
    assert!((value(&p, &q, Divergence::Jsd) - value(&q, &p, Divergence::Jsd)).abs() < 1e-6);
    assert!((value(&p, &q, Divergence::Reverse) - value(&q, &p, Divergence::Forward)).abs() < 1e-6);
}
