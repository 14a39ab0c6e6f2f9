//! Made-up records and models, and the program under test.

use std::path::Path;

use assert_cmd::Command;
use cllm_core::checkpoint;
use cllm_core::decode::Strategy;
use cllm_core::environment::{Hardware, Toolkit};
use cllm_core::model::{AdaptedTokens, LoraConfig, ModelConfig, Transformer};
use cllm_core::task::{Task, Verdict, synthetic};
use cllm_core::trajectory::FinishReason;
use cllm_eval::config::RunSettings;
use cllm_eval::records::{AnswerRecord, Header, ModelEntry, Records, SCHEMA_VERSION, SpeedRecord, ThroughputRecord};
use cllm_eval::role::Role;
use serde_json::json;
use tch::{Device, Kind};

pub fn program() -> Command {
    Command::cargo_bin("cllm-eval").unwrap()
}

pub const JACOBI: Strategy = Strategy::Jacobi { n: 4 };

/// Four examples. Teacher AR: 3 correct, the other unfinished. Student Jacobi: 2 correct, with a
/// quarter of the forwards.
pub fn records() -> Records {
    let model = |role, path: &str| ModelEntry {
        role,
        path: path.into(),
        fingerprint: format!("f{path}"),
        parameters: 1_234_567,
        chat_template: None,
        adapts_teacher: false,
    };
    let settings = RunSettings {
        teacher: Some("t".into()),
        student: Some("s".into()),
        strategies: vec![Strategy::Ar, JACOBI],
        num_speed_examples: 2,
        concurrency: vec![2, 1],
        ..RunSettings::default()
    };
    let header = Header {
        schema_version: SCHEMA_VERSION,
        identity: "i".into(),
        benchmark: Task::Jsonl,
        split: "test".into(),
        examples: 4,
        set_aside: 0,
        hardware: Hardware::detect(Device::Cpu),
        toolkit: Toolkit { version: "0".into(), libtorch: None },
        started_on: Some("2026-11-28".parse().unwrap()),
        commit: Some("0123abc".into()),
        sandbox: None,
        models: vec![model(Role::Teacher, "t"), model(Role::Student, "s")],
        settings,
    };
    let mut records = Records::new(header);
    for (role, strategy, correct, forwards) in [
        (Role::Teacher, Strategy::Ar, [true, true, true, false], 8),
        (Role::Teacher, JACOBI, [true, true, true, false], 4),
        (Role::Student, Strategy::Ar, [true, true, false, false], 8),
        (Role::Student, JACOBI, [true, false, false, true], 2),
    ] {
        for (index, correct) in correct.into_iter().enumerate() {
            records.answers.push(answer(role, strategy, index, correct, forwards));
        }
        for index in 0..2 {
            records.speeds.push(SpeedRecord {
                role,
                strategy,
                index,
                id: format!("e{index}"),
                tokens: 8,
                forwards,
                window_tokens: Some(3 * forwards as u64),
                probes: 1,
                finish_reason: FinishReason::Eos,
                prefill_seconds: 1.0,
                seconds: forwards as f64,
                forward_ends: None,
                peak_memory_bytes: None,
            });
        }
        for (repetition, slower) in [2.0, 1.0, 0.5].into_iter().enumerate() {
            records.throughputs.push(throughput(role, strategy, forwards, repetition, slower));
        }
    }
    records
}

/// A repetition at two rows, which decodes an answer in two seconds more than at batch 1 does; the
/// second of three has the median speed.
fn throughput(role: Role, strategy: Strategy, forwards: usize, repetition: usize, slower: f64) -> ThroughputRecord {
    let (prefill_seconds, seconds) = (2.0 * slower, (forwards as f64 + 2.0) * slower);
    ThroughputRecord {
        role,
        strategy,
        concurrency: 2,
        repetition,
        answers: 16,
        unfinished: 1,
        tokens: 16 * 8,
        forwards: 16 * forwards,
        prefill_seconds,
        seconds,
        answer_prefill_seconds: 1.75 * prefill_seconds,
        answer_seconds: 1.75 * seconds,
    }
}

fn answer(role: Role, strategy: Strategy, index: usize, correct: bool, forwards: usize) -> AnswerRecord {
    let mut response_ids: Vec<i32> = (0..8).collect();
    // One of the student's Jacobi answers differs from the autoregressive one.
    if role == Role::Student && strategy == JACOBI && index == 1 {
        response_ids[3] = 99;
    }
    let logit_gap_at_difference = (response_ids[3] == 99).then_some(0.25);
    let text = if correct { "4" } else { "<script>alert(1)</script>" };
    AnswerRecord {
        role,
        strategy,
        index,
        id: format!("e{index}"),
        source: "jsonl/test".into(),
        prompt: "2 & 2 <b>?".into(),
        prompt_tokens: 5,
        reference: Some("4".into()),
        meta: None,
        response_ids,
        text: text.into(),
        verdict: if correct { Verdict::Correct } else { Verdict::Incorrect },
        alternative: None,
        finish_reason: if !correct && index > 1 { FinishReason::Length } else { FinishReason::Eos },
        thought: None,
        forwards,
        accepted: vec![(8 / forwards) as u32; forwards],
        batch_prefill_seconds: 0.5,
        batch_seconds: 0.5,
        peak_memory_bytes: None,
        logit_gap_at_difference,
        forward_texts: (index < 2).then(|| text.chars().map(String::from).collect()),
    }
}

/// Writes a random model with a tokenizer of its own. It repeats the last token of a prompt.
pub fn model(folder: &Path, seed: u64) {
    random_model(folder, seed, true);
}

/// Writes a random model whose answers depend on the whole prompt.
pub fn eloquent_model(folder: &Path, seed: u64) {
    random_model(folder, seed, false);
}

/// Writes adapters for the draft tokens of a model, which change what it drafts.
pub fn draft_adapters(folder: &Path, base: &Path) {
    std::fs::create_dir(folder).unwrap();
    let mut adapted = checkpoint::load(base, Device::Cpu, Kind::Float).unwrap();
    adapted.add_adapters(&LoraConfig { on: AdaptedTokens::Drafts, ..LoraConfig::default() }, 1);
    for (_, mut tensor) in adapted.trainable().tensors() {
        let _ = tch::no_grad(|| tensor.fill_(0.1));
    }
    checkpoint::save_adapter(&adapted, folder, &base.display().to_string()).unwrap();
}

/// Writes a random model like [`eloquent_model`] whose tokenizer has the tokens of a thinking model.
pub fn thinking_model(folder: &Path, seed: u64) {
    eloquent_model(folder, seed);
    // This text leaves ids free.
    cllm_testing::train_tokenizer(["Tom has 3 apples."], 300, folder);
    cllm_testing::add_thought_tokens(folder);
}

fn random_model(folder: &Path, seed: u64, tied: bool) {
    std::fs::create_dir_all(folder).unwrap();
    let texts: Vec<String> =
        synthetic::generate(1, "train", 40).into_iter().filter_map(|sample| sample.reference).collect();
    cllm_testing::train_tokenizer(texts, 300, folder);
    let config = json!({
        "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": tied,
    });
    let config = ModelConfig::from_json(&config).unwrap();
    let model = Transformer::random(config, seed, Device::Cpu, Kind::Float);
    if !tied {
        let _no_grad = tch::no_grad_guard();
        // With the small initial weights, attention would hardly see more than the last token.
        for (_, mut weight) in model.named_parameters().into_iter().filter(|(name, _)| name.contains("_proj")) {
            let _ = weight.g_mul_scalar_(20.0);
        }
    }
    checkpoint::save(&model, folder, Kind::Float).unwrap();
}
