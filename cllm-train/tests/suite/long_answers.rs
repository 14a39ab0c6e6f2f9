//! One answer of 32,768 tokens passes through cleaning and training: nothing in between has a limit
//! that it meets, or needs memory or time that grows with the square of its length.

use std::path::{Path, PathBuf};

use cllm_core::checkpoint;
use cllm_core::fingerprint;
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Block, FinishReason, Provenance, Trajectory};
use cllm_data::clean;
use cllm_train::settings::{ConsistencySettings, Objective, Settings};
use cllm_train::trainer;
use rand::RngExt;
use serde_json::json;
use tch::{Device, Kind};

use crate::setup::{plain_consistency, prepare, read_trajectories, sft, summary, write_trajectories};

const N: usize = 16;
const NUM_TOKENS: usize = 32_768;

/// A random model whose context is long enough only by YaRN's factor.
fn save_model(folder: &Path) -> PathBuf {
    let tokenizer = folder.join("tokenizer");
    let vocab_size = Tokenizer::load(&tokenizer).unwrap().vocab_size();
    let config = json!({
        "model_type": "qwen3", "vocab_size": vocab_size, "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": 10_240,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8448},
    });
    let model = Transformer::random(ModelConfig::from_json(&config).unwrap(), 1, Device::Cpu, Kind::Float);
    checkpoint::save(&model, &tokenizer, Kind::Float).unwrap();
    tokenizer
}

/// A data set with one response, whose blocks converge token by token.
fn save_trajectory(folder: &Path, model: &Path) -> PathBuf {
    let tokenizer = Tokenizer::load(model).unwrap();
    let eos_ids = tokenizer.eos_ids().to_vec();
    let mut rng = fingerprint::derive_rng(1, "long", 0);
    let other_ids: Vec<i32> = (0..tokenizer.vocab_size() as i32).filter(|id| !eos_ids.contains(id)).collect();
    let mut draw = || other_ids[rng.random_range(0..other_ids.len())];
    let response_ids: Vec<i32> = (0..NUM_TOKENS).map(|_| draw()).collect();
    let blocks = response_ids.chunks(N).enumerate().map(|(number, fixed_point)| {
        let noise: Vec<i32> = (0..N).map(|_| draw()).collect();
        let states = (1..=N).step_by(3).map(|correct| [&fixed_point[..correct], &noise[correct..]].concat());
        Block { start: (number * N) as u32, states: states.collect() }
    });
    let row = Trajectory {
        sample_id: "long".to_owned(),
        source: "jsonl/train".to_owned(),
        prompt: "Think.".to_owned(),
        prompt_ids: tokenizer.encode("Think.").unwrap(),
        blocks: blocks.collect(),
        response_ids,
        reference: None,
        reference_ids: None,
        augmented: None,
        finish_reason: FinishReason::Length,
        meta: None,
    };
    let provenance = Provenance {
        teacher: "t".to_owned(),
        teacher_name: None,
        teacher_base: None,
        tokenizer: tokenizer.fingerprint().to_owned(),
        vocab_size: tokenizer.vocab_size(),
        n: N,
        max_new_tokens: NUM_TOKENS,
        thought_closing: None,
        eos_ids,
        seed: 1,
        prompts: "p".to_owned(),
        rendering: tokenizer.rendering_record(),
        toolkit: cllm_core::VERSION.to_owned(),
        steps: Vec::new(),
    };
    let data_set = folder.join("collected");
    write_trajectories(&data_set, provenance, &[row]);
    data_set
}

#[test]
fn an_answer_of_32768_tokens_is_cleaned_and_trained() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let model = save_model(dir.path());
    let collected = save_trajectory(dir.path(), &model);
    let cleaned = dir.path().join("cleaned");
    let rules = clean::Settings {
        input: collected,
        output: cleaned.clone(),
        model: model.display().to_string(),
        drop_unfinished: false,
        ..clean::Settings::default()
    };
    clean::clean(&rules).unwrap();
    let num_prompt_tokens = read_trajectories(&cleaned).1[0].prompt_ids.len();
    let settings = Settings {
        init: None,
        model: Some(model.display().to_string()),
        objective: Objective::Consistency,
        datasets: vec![cleaned],
        max_steps: Some(1),
        max_example_tokens: 34_000,
        max_batch_tokens: 34_000,
        consistency: ConsistencySettings { max_blocks: Some(48), ..plain_consistency() },
        ..sft(dir.path(), "run")
    };
    trainer::run(settings).unwrap();
    let run = summary(&dir.path().join("run"));
    assert_eq!((&run["tokens"], &run["blocks"]), (&json!(NUM_TOKENS + num_prompt_tokens + 48 * N), &json!(48)));
    assert!(run["final_losses"]["global_loss"].as_f64().unwrap() > 0.0);
}
