//! Adapters for draft tokens in the kernels of a GPU: forwards of doubled windows in bfloat16, against
//! the eager backend in float32 and against forwards without adapters.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tch::{Device, Kind};

use super::cuda_graph::CudaGraphBackend;
use super::eager::EagerBackend;
use super::gated::DoubledWindow;
use super::{Backend, Outputs, PromptChunk, Window};
use crate::decode::sampling::{Candidates, Sampling};
use crate::decode::tree::TokenTree;
use crate::model::{AdaptedTokens, LoraConfig, LoraTarget, ModelConfig, Transformer};

const PROMPT_TOKENS: usize = 20;

/// A random model in bfloat16 on the GPU and in float32 on the CPU, with equal adapters, which change
/// a product about as much as the weight does.
fn on_gpu_and_cpu(config: &Value, adapters: &Adapters) -> (Transformer, Transformer) {
    let &Adapters { rank, targets, first_layer, .. } = adapters;
    let _no_grad = tch::no_grad_guard();
    let config = ModelConfig::from_json(config).unwrap();
    // Logits are as far apart as those of a trained model.
    let scale = 180.0 / (config.hidden_size as f64).sqrt();
    let mut on_gpu = Transformer::random(config.clone(), 7, Device::Cuda(0), Kind::BFloat16);
    let mut on_cpu = Transformer::random(config, 7, Device::Cpu, Kind::Float);
    for ((_, mut rounded), (_, mut exact)) in on_gpu.named_parameters().into_iter().zip(on_cpu.named_parameters()) {
        if rounded.dim() == 2 {
            rounded *= scale;
        }
        exact.copy_(&rounded.to_device(Device::Cpu));
    }
    let lora = LoraConfig {
        rank,
        // Few adapters have to change as much as all.
        alpha: if targets.len() == LoraTarget::ALL.len() { 0.5 } else { 2.0 } * rank as f64,
        targets: targets.iter().copied().collect::<BTreeSet<_>>(),
        first_layer,
        on: AdaptedTokens::Drafts,
        ..LoraConfig::default()
    };
    for model in [&mut on_gpu, &mut on_cpu] {
        model.add_adapters(&lora, 5);
    }
    let adapters = |model: &Transformer| model.adapters().unwrap().named_tensors();
    for (number, ((name, mut on_gpu), (_, mut on_cpu))) in
        adapters(&on_gpu).into_iter().zip(adapters(&on_cpu)).enumerate()
    {
        if name.contains("lora_B") {
            let indices = tch::Tensor::arange(on_cpu.numel() as i64, (Kind::Double, Device::Cpu));
            let values = (indices * 0.7391 + number as f64).sin() * 3.0 / (rank as f64).sqrt();
            on_cpu.copy_(&values.view_as(&on_cpu));
        }
        on_cpu.copy_(&on_cpu.to_kind(Kind::BFloat16));
        on_gpu.copy_(&on_cpu);
    }
    (on_gpu, on_cpu)
}

/// By how much the probabilities of the likeliest tokens differ at most. Of a token that one lacks,
/// only a bound is known.
fn distance(one: &Candidates, other: &Candidates) -> f32 {
    let missing = |from: &Candidates, to: &Candidates| {
        let smallest = to.iter().map(|candidate| candidate.probability).fold(1.0, f32::min);
        let difference = |token: i32, probability: f32| {
            let same = to.iter().find(|candidate| candidate.token == token);
            same.map_or(probability - smallest, |same| (probability - same.probability).abs())
        };
        from.iter().map(|candidate| difference(candidate.token, candidate.probability)).fold(0.0, f32::max)
    };
    missing(one, other).max(missing(other, one))
}

#[derive(Debug)]
struct Adapters {
    rank: i64,
    targets: &'static [LoraTarget],
    first_layer: usize,
    num_layers: usize,
}

const fn from_first_layer(rank: i64, targets: &'static [LoraTarget]) -> Adapters {
    Adapters { rank, targets, first_layer: 0, num_layers: 2 }
}

/// With fewer targets, four layers would round off as much as the adapters change.
const fn from_second_layer(rank: i64, targets: &'static [LoraTarget]) -> Adapters {
    Adapters { rank, targets, first_layer: 1, num_layers: 2 }
}

const fn from_third_layer(rank: i64, targets: &'static [LoraTarget]) -> Adapters {
    Adapters { rank, targets, first_layer: 2, num_layers: 4 }
}

struct Case {
    num_rows: usize,
    /// Tokens of each row's window, which a forward has twice.
    n: usize,
}

/// Of the steps of a case, the mean and the largest distance between both devices for tokens that are
/// not drafts and for drafts, the mean distance for tokens that are not drafts in forwards without
/// adapters, and the mean distance between drafts with and without adapters.
#[derive(Debug)]
struct Errors {
    frozen: f32,
    plain: f32,
    adapted: f32,
    largest: f32,
    change: f32,
}

fn candidates(backend: &mut dyn Backend, chunks: &[PromptChunk<'_>], windows: &[Window<'_>]) -> Vec<Vec<Candidates>> {
    let outputs = Outputs { candidates: true };
    backend.launch(chunks, windows, outputs).unwrap();
    backend.collect(windows).unwrap().into_iter().map(|predictions| predictions.candidates).collect()
}

fn errors((on_gpu, on_cpu): &(Transformer, Transformer), &Case { num_rows, n }: &Case, keeps_bits: bool) -> Errors {
    let _no_grad = tch::no_grad_guard();
    let capacity = PROMPT_TOKENS + 2 * n;
    let mut gpu = CudaGraphBackend::new(on_gpu, num_rows + 1, capacity, true).unwrap().unwrap();
    let mut cpu = EagerBackend::new(on_cpu, num_rows, capacity).unwrap();
    let tokens = |row: usize, salt: usize, len: usize| -> Vec<i32> {
        (0..len).map(|i| ((i * 37 + row * 11 + salt) % 203) as i32).collect()
    };
    let prompts: Vec<Vec<i32>> = (0..num_rows).map(|row| tokens(row, 1, PROMPT_TOKENS)).collect();
    let chunks: Vec<PromptChunk<'_>> =
        prompts.iter().enumerate().map(|(row, tokens)| PromptChunk { row, start: 0, tokens }).collect();
    let outputs = Outputs { candidates: true };
    for backend in [&mut gpu as &mut dyn Backend, &mut cpu] {
        backend.launch(&chunks, &[], outputs).unwrap();
        backend.collect(&[]).unwrap();
    }
    // Windows differ in length, some branch, and some have no drafts.
    let num_drafts = |row: usize| if row % 5 == 4 { 0 } else { (n - 1) - row % 2 * (n - 1) / 3 };
    let drafts: Vec<Vec<i32>> = (0..num_rows).map(|row| tokens(row, 5, num_drafts(row))).collect();
    let window = |(row, draft): (usize, &Vec<i32>)| {
        let (last_token, sequence_key) = ((row * 29 % 203) as i32, row as u64);
        let tree = (row % 3 == 2).then(|| TokenTree::new((0..draft.len()).map(|index| index / 2)));
        DoubledWindow::new(&Window {
            start: PROMPT_TOKENS,
            last_token,
            draft,
            tree: tree.as_ref(),
            num_adapted: 0,
            is_closing: false,
            sampling: Sampling::Greedy,
            sequence_key,
        })
    };
    let doubled: Vec<DoubledWindow> = drafts.iter().enumerate().map(window).collect();
    let windows: Vec<Window<'_>> = doubled.iter().map(DoubledWindow::window).collect();
    let frozen: Vec<Window<'_>> = doubled.iter().map(|doubled| Window { num_adapted: 0, ..doubled.window() }).collect();
    // Some forwards also cache a prompt.
    let prompt = tokens(num_rows, 7, 5);
    let chunk = PromptChunk { row: num_rows, start: 0, tokens: &prompt };
    let chunks: &[PromptChunk<'_>] = if num_rows == 3 { &[chunk] } else { &[] };
    let exact = candidates(&mut cpu, &[], &windows);
    let exact_frozen = candidates(&mut cpu, &[], &frozen);
    let mut errors = Errors { frozen: 0.0, plain: 0.0, adapted: 0.0, largest: 0.0, change: 0.0 };
    // The first of a size runs without a graph, the second is captured.
    for round in 0..3 {
        let plain = candidates(&mut gpu, chunks, &frozen);
        let given = candidates(&mut gpu, chunks, &windows);
        let mut num_tokens = 0.0;
        for (row, window) in windows.iter().enumerate().filter(|(_, window)| window.num_adapted > 0) {
            for offset in 0..window.first_adapted() {
                let bits = |of: &[Vec<Candidates>]| {
                    of[row][offset].map(|candidate| (candidate.token, candidate.probability.to_bits()))
                };
                let place = format!("{num_rows} x {n}, row {row}, token {offset}, round {round}");
                assert!(!keeps_bits || bits(&given) == bits(&plain), "{place}");
                let error = distance(&given[row][offset], &exact[row][offset]);
                errors.plain += distance(&plain[row][offset], &exact[row][offset]);
                let twin = offset + window.first_adapted();
                let adapted_error = distance(&given[row][twin], &exact[row][twin]);
                errors.frozen += error;
                errors.adapted += adapted_error;
                errors.largest = errors.largest.max(error).max(adapted_error);
                errors.change += distance(&exact[row][twin], &exact_frozen[row][twin]);
                num_tokens += 1.0;
            }
        }
        if round == 2 {
            // Sums over three rounds, all of which are the same.
            for sum in [&mut errors.frozen, &mut errors.plain, &mut errors.adapted, &mut errors.change] {
                *sum /= 3.0 * num_tokens;
            }
        }
    }
    errors
}

/// Fused kernels, those for all products between two attentions, cuBLAS, and the products of large
/// batches: 4 to 64 tokens of a row, in 1 to 64 rows.
const CASES: [Case; 10] = [
    Case { num_rows: 1, n: 2 },
    Case { num_rows: 1, n: 4 },
    Case { num_rows: 1, n: 7 },
    Case { num_rows: 1, n: 16 },
    Case { num_rows: 1, n: 32 },
    Case { num_rows: 3, n: 3 },
    Case { num_rows: 4, n: 4 },
    Case { num_rows: 3, n: 10 },
    Case { num_rows: 7, n: 12 },
    Case { num_rows: 64, n: 16 },
];

/// Draft tokens are read with the adapters up to rounding. All others keep their bits, or with shared
/// layers that have fewer tokens than a forward without adapters, their rounding errors.
fn assert_adapted(config: Value, adapters: &[Adapters]) {
    let base = json!({
        "vocab_size": 203, "hidden_size": 96, "intermediate_size": 160, "head_dim": 32,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    });
    let mut with_base = base.as_object().unwrap().clone();
    with_base.extend(config.as_object().unwrap().clone());
    for adapters in adapters {
        with_base.insert("num_hidden_layers".to_owned(), json!(adapters.num_layers));
        let models = on_gpu_and_cpu(&Value::Object(with_base.clone()), adapters);
        for case in &CASES {
            let errors = errors(&models, case, adapters.first_layer == 0);
            println!("{config} {adapters:?}, {} x {}: {errors:.4?}", case.num_rows, case.n);
            assert!(errors.frozen < 2.0 * errors.plain + 0.02 * errors.change, "{errors:?}");
            // Without its adapters, a draft would be off by the whole change.
            assert!(errors.adapted < 0.35 * errors.change, "{errors:?}");
        }
    }
}

use LoraTarget::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn adapters_act_on_drafts_alone_llama() {
    assert_adapted(
        json!({"model_type": "llama", "head_dim": 64}),
        &[
            from_first_layer(32, &LoraTarget::ALL),
            from_first_layer(16, &[DownProj]),
            from_third_layer(32, &LoraTarget::ALL),
        ],
    );
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn adapters_act_on_drafts_alone_mistral() {
    let config = json!({"model_type": "mistral", "num_key_value_heads": 6, "sliding_window": 24});
    assert_adapted(
        config,
        &[
            from_first_layer(16, &[QProj, VProj]),
            from_first_layer(256, &[OProj]),
            from_second_layer(16, &[QProj, VProj]),
        ],
    );
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn adapters_act_on_drafts_alone_qwen2() {
    let config = json!({"model_type": "qwen2", "hidden_size": 800, "num_attention_heads": 7, "num_key_value_heads": 1});
    assert_adapted(
        config,
        &[
            from_first_layer(5, &LoraTarget::ALL),
            from_first_layer(128, &[GateProj]),
            from_third_layer(5, &LoraTarget::ALL),
        ],
    );
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn adapters_act_on_drafts_alone_qwen3() {
    let config = json!({"model_type": "qwen3", "head_dim": 128, "num_attention_heads": 4});
    assert_adapted(
        config,
        &[
            from_first_layer(128, &LoraTarget::ALL),
            from_first_layer(32, &[UpProj, KProj, OProj]),
            from_third_layer(128, &LoraTarget::ALL),
        ],
    );
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn adapters_act_on_drafts_alone_wide_mistral() {
    let config = json!({"model_type": "mistral", "hidden_size": 2080});
    assert_adapted(
        config,
        &[
            from_first_layer(32, &LoraTarget::ALL),
            from_first_layer(256, &[QProj, KProj, VProj]),
            from_first_layer(16, &[GateProj]),
            from_third_layer(32, &LoraTarget::ALL),
        ],
    );
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn adapters_act_on_drafts_alone_wide_qwen3() {
    let config = json!({"model_type": "qwen3", "hidden_size": 2080, "head_dim": 64, "intermediate_size": 1504});
    assert_adapted(
        config,
        &[
            from_first_layer(256, &LoraTarget::ALL),
            from_first_layer(32, &[DownProj, UpProj]),
            from_third_layer(256, &LoraTarget::ALL),
        ],
    );
}
