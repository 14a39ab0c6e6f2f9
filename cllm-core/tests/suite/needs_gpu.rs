//! Decoding with the kernels of a GPU in bfloat16, against the eager backend on the CPU in float32.

use std::time::Instant;

use cllm_core::checkpoint;
use cllm_core::decode::{Answer, DecodeOptions, Decoder, Request, StopConditions, Strategy, Width, required_slots};
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::process_memory::PeakGrowth;
use cllm_core::thought::{Thought, ThoughtClosing, ThoughtLimit, ThoughtTokens};
use cllm_testing::gpu;
use serde_json::{Value, json};
use tch::{Device, IndexOp, Kind, Tensor};

use crate::sampling::Draws;

/// Models that the kernels support: several families, widths of a head, numbers of query heads per
/// head of keys, and sliding windows.
fn shapes() -> Vec<(&'static str, Value)> {
    let base = json!({
        "vocab_size": 203, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "head_dim": 32,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    });
    let with = |extra: Value| {
        let mut config = base.clone();
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        config
    };
    vec![
        ("llama", with(json!({"model_type": "llama", "tie_word_embeddings": true, "head_dim": 64}))),
        ("mistral", with(json!({"model_type": "mistral", "num_key_value_heads": 6}))),
        // Other kernels multiply 33 to 64 tokens from this width on.
        (
            "qwen2",
            with(json!({"model_type": "qwen2", "hidden_size": 800, "num_attention_heads": 7,
            "num_key_value_heads": 1})),
        ),
        ("qwen3", with(json!({"model_type": "qwen3", "head_dim": 128, "num_attention_heads": 4}))),
        (
            "llama3",
            with(json!({"model_type": "llama", "attention_bias": true, "rope_scaling": {"rope_type": "llama3",
            "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}})),
        ),
        // Wide models have kernels of their own on Hopper.
        ("mistral-wide", with(json!({"model_type": "mistral", "hidden_size": 2080}))),
        ("qwen3-wide", with(json!({"model_type": "qwen3", "hidden_size": 2080, "head_dim": 64}))),
        // Windows that begin within the prompt, within the draft tokens, and within a tree.
        ("mistral-window", with(json!({"model_type": "mistral", "sliding_window": 40}))),
        (
            "qwen2-window",
            with(json!({"model_type": "qwen2", "head_dim": 64, "use_sliding_window": true, "sliding_window": 9,
            "max_window_layers": 1})),
        ),
        (
            "qwen3-window",
            with(json!({"model_type": "qwen3", "head_dim": 128, "use_sliding_window": true, "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]})),
        ),
    ]
}

/// How far an answer is from the float32 model's, in standard deviations of its logits.
#[derive(Debug, Default, Clone, Copy)]
struct Error {
    /// Largest gap between the logit of a chosen token and the largest logit; 0 if every chosen
    /// token is the likeliest.
    gap: f64,
    /// Largest change of a logit by libtorch's own bfloat16 operations, which is the effect of
    /// rounding alone.
    rounding: f64,
}

fn error(on_gpu: &Transformer, exact: &Transformer, request: &Request, answer: &Answer) -> Error {
    let _no_grad = tch::no_grad_guard();
    let ids: Vec<i64> = request.prompt_ids.iter().chain(&answer.response_ids).map(|&id| i64::from(id)).collect();
    let tokens = Tensor::from_slice(&ids).unsqueeze(0);
    let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu)).unsqueeze(0);
    let first = request.prompt_ids.len() as i64 - 1;
    let logits = |model: &Transformer| {
        let hidden = model.forward(&tokens.to_device(model.device()), &positions.to_device(model.device()));
        model.compute_logits(&hidden).unwrap().i((0, first..ids.len() as i64 - 1)).to_device(Device::Cpu)
    };
    let (rounded, logits) = (logits(on_gpu), logits(exact));
    let spread = logits.std_dim(1, true, true);
    let chosen = logits.gather(1, &tokens.i((0, first + 1..)).unsqueeze(1), false);
    let gaps = (logits.max_dim(1, true).0 - chosen) / &spread;
    let rounding = (rounded - &logits).abs() / &spread;
    Error { gap: gaps.max().double_value(&[]), rounding: rounding.max().double_value(&[]) }
}

fn worst<'e>(
    (on_gpu, exact): &(Transformer, Transformer),
    answers: impl Iterator<Item = (&'e Request, &'e Answer)>,
) -> Error {
    answers
        .map(|(request, answer)| error(on_gpu, exact, request, answer))
        .fold(Error::default(), |a, b| Error { gap: a.gap.max(b.gap), rounding: a.rounding.max(b.rounding) })
}

impl Error {
    /// Two logits that swap ranks may each be off by a rounding error. Our kernels round fewer
    /// times than libtorch.
    fn is_rounding(self) -> bool {
        self.gap < 2.0 * self.rounding
    }
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn every_token_is_the_likeliest_of_the_float32_model_up_to_rounding() {
    let lengths = [1, 2, 17, 40, 130, 300, 33, 64, 5, 90].into_iter().cycle().take(45);
    let requests: Vec<Request> = lengths
        .enumerate()
        .map(|(row, length)| Request {
            sample_id: format!("s{row}"),
            prompt_ids: (0..length).map(|i| (i * 37 + row as i32 * 11) % 203).collect(),
        })
        .collect();
    let stop = StopConditions::new(60, vec![3]);
    for (name, config) in shapes() {
        let models = gpu::on_gpu_and_cpu(&config, 7, 8.0);
        let tree = Strategy::Rolling { n: Width::Fixed(6), tree: 40, pool: 0 };
        // Its tree of 64 tokens is the widest window here. Even a single row of it goes through
        // cuBLAS, unlike the default.
        let wide = Strategy::Lookahead { window: 10, ngram: 5, candidates: 6 };
        let mut decoder = Decoder::new(&models.0, requests.len(), required_slots(300, &stop, wide)).unwrap();
        let mut plain: Vec<Answer> = Vec::new();
        for (strategy, rows) in [
            (Strategy::Ar, 1),
            (Strategy::Jacobi { n: 16 }, 1),
            (Strategy::Jacobi { n: 5 }, 6),
            (Strategy::rolling(40), 1),
            (Strategy::lookahead(), 1),
            (wide, 1),
            (tree, 1),
            (Strategy::auto(24), 1),
            (Strategy::Ar, 45),
            (Strategy::Jacobi { n: 16 }, 45),
            (Strategy::rolling(8), 45),
            (Strategy::lookahead(), 45),
            (tree, 45),
            (Strategy::auto(0), 45),
        ] {
            let answers: Vec<Answer> = requests
                .chunks(rows)
                .take(45usize.div_ceil(rows).min(12))
                .flat_map(|batch| decoder.answer(batch, &stop, DecodeOptions::greedy(strategy, 5), None).unwrap().0)
                .collect();
            let error = worst(&models, requests.iter().zip(&answers));
            if plain.is_empty() {
                plain = answers.clone();
            }
            let same = plain.iter().zip(&answers).filter(|(a, b)| a.response_ids == b.response_ids).count();
            println!("{name} {strategy:?} in {rows} rows: {error:.4?}, {same} of {} as AR", plain.len());
            assert!(error.is_rounding(), "{name}, {strategy:?} in {rows} rows: {error:?}");
        }
    }
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn long_contexts_are_split_between_multiprocessors_without_an_error() {
    // Several thread blocks share these slots, and the last of them has few or none of the window.
    let requests = [2050, 3007].map(|length| Request {
        sample_id: format!("s{length}"),
        prompt_ids: (0..length).map(|i| (i * 37 + i / 203) % 203).collect(),
    });
    let stop = StopConditions::new(40, vec![3]);
    let wide = Strategy::Lookahead { window: 10, ngram: 5, candidates: 6 };
    for (name, mut config) in shapes() {
        config["max_position_embeddings"] = json!(4096);
        let models = gpu::on_gpu_and_cpu(&config, 7, 8.0);
        let mut decoder = Decoder::new(&models.0, 1, required_slots(3007, &stop, wide)).unwrap();
        for (strategy, request) in [Strategy::Ar, Strategy::rolling(16), wide].into_iter().zip(requests.iter().cycle())
        {
            let request = std::slice::from_ref(request);
            let (answers, _) = decoder.answer(request, &stop, DecodeOptions::greedy(strategy, 5), None).unwrap();
            let error = worst(&models, request.iter().zip(&answers));
            assert!(error.is_rounding(), "{name}, {strategy:?}: {error:?}");
        }
    }
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn streamed_requests_get_the_answers_of_single_ones() {
    let requests: Vec<Request> = (0..60)
        .map(|row| Request {
            sample_id: format!("s{row}"),
            prompt_ids: (0..1 + row * 7 % 90).map(|i| (i * 37 + row * 11) % 203).collect(),
        })
        .collect();
    let stop = StopConditions::new(50, vec![3, 7]);
    let (_, config) = shapes().remove(0);
    let models = gpu::on_gpu_and_cpu(&config, 7, 8.0);
    for strategy in [Strategy::Jacobi { n: 8 }, Strategy::lookahead(), Strategy::auto(24)] {
        let mut decoder = Decoder::new(&models.0, 10, required_slots(90, &stop, strategy)).unwrap();
        let mut answered = 0;
        let mut check = |index: usize, answer: Answer| {
            answered += 1;
            let error = worst(&models, std::iter::once((&requests[index], &answer)));
            assert!(error.is_rounding(), "{strategy:?}, request {index}: {error:?}");
            Ok(())
        };
        let options = DecodeOptions { record_trajectory: true, ..DecodeOptions::greedy(strategy, 5) };
        decoder.stream(&mut requests.iter().cloned(), &stop, options, &mut check).unwrap();
        assert_eq!(answered, requests.len());
        let (answers, _) = decoder.answer(&requests, &stop, options, None).unwrap();
        let error = worst(&models, requests.iter().zip(&answers));
        assert!(error.is_rounding(), "{strategy:?}, prompts in forwards of their own: {error:?}");
    }
}

/// The parts of an answer that the model chose: before the tokens that closed its thought, and after
/// them as the answer to a longer prompt.
fn decoded_parts(request: &Request, answer: &Answer) -> Vec<(Request, Answer)> {
    let closed = answer.thought.as_ref().map_or(0..0, Thought::forced_tokens);
    let parts = [0..closed.start, closed.end..answer.response_ids.len()];
    let part = |range: std::ops::Range<usize>| {
        let prompt_ids = [&request.prompt_ids[..], &answer.response_ids[..range.start]].concat();
        let response_ids = answer.response_ids[range].to_vec();
        (Request { prompt_ids, ..request.clone() }, Answer { response_ids, ..answer.clone() })
    };
    parts.into_iter().filter(|range| !range.is_empty()).map(part).collect()
}

#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn a_thought_closed_at_its_limit_stands_between_the_likeliest_tokens() {
    let requests: Vec<Request> = (0..24)
        .map(|row| Request {
            sample_id: format!("s{row}"),
            prompt_ids: (0..1 + row * 13 % 70).map(|i| (i * 37 + row * 11) % 203).collect(),
        })
        .collect();
    // Every answer begins inside a thought, which token 11 ends.
    let closing = ThoughtClosing { max_thinking_tokens: 10, closing_ids: vec![7, 11, 8] };
    let thought_limit = Some(ThoughtLimit { tokens: ThoughtTokens::new(12, 11, vec![vec![]]), closing });
    let stop = StopConditions { thought_limit, ..StopConditions::new(40, vec![3]) };
    for (name, config) in shapes() {
        let models = gpu::on_gpu_and_cpu(&config, 7, 8.0);
        let mut decoder = Decoder::new(&models.0, 24, required_slots(70, &stop, Strategy::lookahead())).unwrap();
        let mut plain: Vec<Answer> = Vec::new();
        for (strategy, rows) in [
            (Strategy::Ar, 24),
            (Strategy::Jacobi { n: 5 }, 24),
            (Strategy::Jacobi { n: 16 }, 6),
            (Strategy::rolling(8), 24),
            (Strategy::lookahead(), 6),
        ] {
            let answers: Vec<Answer> = requests
                .chunks(rows)
                .flat_map(|batch| decoder.answer(batch, &stop, DecodeOptions::greedy(strategy, 5), None).unwrap().0)
                .collect();
            if plain.is_empty() {
                plain = answers.clone();
            }
            let closed = answers.iter().filter(|answer| answer.thought == Some(Thought::Forced(10..13)));
            let num_closed = closed.inspect(|answer| assert_eq!(answer.response_ids[10..13], [7, 11, 8])).count();
            let parts: Vec<_> =
                requests.iter().zip(&answers).flat_map(|(request, answer)| decoded_parts(request, answer)).collect();
            let error = worst(&models, parts.iter().map(|(request, answer)| (request, answer)));
            let same = plain.iter().zip(&answers).filter(|(a, b)| a.response_ids == b.response_ids).count();
            println!("{name} {strategy:?} in {rows} rows: {error:.4?}, {num_closed} closed, {same} of 24 as AR");
            assert!(num_closed > 12, "{name}, {strategy:?} in {rows} rows: only {num_closed} reached the limit");
            assert!(error.is_rounding(), "{name}, {strategy:?} in {rows} rows: {error:?}");
        }
    }
}

/// With few ids, draft tokens are often correct, so the second and third tokens are sampled after
/// drafts that were accepted and after ones that were corrected.
#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn samples_follow_the_softmax_of_the_float32_model() {
    for (name, mut config) in shapes() {
        config["vocab_size"] = 29.into();
        let (on_gpu, exact) = gpu::on_gpu_and_cpu(&config, 7, 8.0);
        // One row goes through the fused kernels, 64 rows through cuBLAS.
        for (rows, count) in [(1, 1000), (64, 6000)] {
            let prompt = (0..24).map(|i| i % 8 * 3).collect();
            let draws = Draws { prompt, num_tokens: 3, temperature: 0.8, num_answers: count, max_sequences: rows };
            for (strategy, seed) in
                [(Strategy::Ar, 21), (Strategy::rolling(8), 22), (Strategy::lookahead(), 23), (Strategy::auto(24), 24)]
            {
                let misfit = draws.misfit(&on_gpu, &exact, strategy, seed);
                println!("{name} {strategy:?} in {rows} rows: {misfit:.1?}");
                assert!(misfit.chi_squared < misfit.allowed, "{name}, {strategy:?} in {rows} rows: {misfit:?}");
            }
        }
    }
}

/// A model of 2.6 GB goes from the device to files and back beside a few pieces in host memory.
#[test]
#[ignore = "needs a GPU: scripts/test --gpu"]
fn a_model_is_saved_and_loaded_through_little_host_memory() {
    let config = json!({
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 8192,
        "num_hidden_layers": 8, "num_attention_heads": 32, "tie_word_embeddings": true,
    });
    let (device, kind) = (Device::Cuda(0), Kind::BFloat16);
    let model = Transformer::random_on_device(ModelConfig::from_json(&config).unwrap(), device, kind);
    let dir = tempfile::tempdir().unwrap();
    // The first copy loads what CUDA needs for it.
    let _ = model.weights().buffer().narrow(0, 0, 8).to_device(Device::Cpu);
    let growth = PeakGrowth::start().unwrap();
    let started = Instant::now();
    checkpoint::save(&model, dir.path(), kind).unwrap();
    let saved = started.elapsed();
    let loaded = checkpoint::load(dir.path(), device, kind).unwrap();
    let (all, more) = (started.elapsed(), growth.bytes().unwrap() / 1_000_000);
    let gigabytes = model.weights().buffer().numel() as f64 * 2e-9;
    eprintln!("{gigabytes:.1} GB: saved in {saved:.1?}, loaded in {:.1?}, with {more} MB of host memory", all - saved);
    assert_eq!(model.named_parameters(), loaded.named_parameters());
    assert!(more < 1000, "{more} MB");
}
