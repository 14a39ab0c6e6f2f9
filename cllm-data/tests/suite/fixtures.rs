//! Shared by the tests: a teacher with prompts, the program, and data sets written by hand.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use cllm_core::chat_template::RenderingRecord;
use cllm_core::checkpoint;
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Block, FinishReason, Provenance, Reader, Trajectory, Writer};
use cllm_testing::programs::{Program, path};
use serde_json::{Value, json};

pub const DATA: Program = Program("cllm-data");

/// Tokens per block of [`provenance`] and [`row`].
pub const N: usize = 4;

/// A folder with a teacher of random weights (`model`) and 24 prompts (`prompts.jsonl`), made once.
static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    let config = json!({
        "model_type": "llama", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 400, "tie_word_embeddings": true,
    });
    let config = ModelConfig::from_json(&config).unwrap();
    let transformer = Transformer::random(config, 3, tch::Device::Cpu, tch::Kind::Float);
    checkpoint::save(&transformer, &model, tch::Kind::Float).unwrap();
    cllm_testing::train_tokenizer(["Tom has 3 apples and buys 4 more."], 300, &model);
    run(&["prepare", "synthetic", "--num-problems", "24", "--output", &path(dir.path(), "prompts.jsonl")]).success();
    dir
});

/// Path of the teacher's folder.
pub fn teacher() -> String {
    path(FOLDER.path(), "model")
}

/// Path of the prompt set.
pub fn prompt_set() -> String {
    path(FOLDER.path(), "prompts.jsonl")
}

pub fn tokenizer() -> Tokenizer {
    Tokenizer::load(Path::new(&teacher())).unwrap()
}

pub fn run(arguments: &[&str]) -> Assert {
    Command::cargo_bin("cllm-data").unwrap().arg("--quiet").args(arguments).assert()
}

/// Runs a verb that succeeds; returns its stdout.
pub fn run_text(arguments: &[&str]) -> String {
    String::from_utf8(run(arguments).success().get_output().stdout.clone()).unwrap()
}

/// Runs a verb that succeeds and prints JSON.
pub fn run_json(arguments: &[&str]) -> Value {
    serde_json::from_str(&run_text(arguments)).unwrap()
}

/// Runs a verb that fails with an exit code; returns its stderr.
pub fn run_error(arguments: &[&str], code: i32) -> String {
    String::from_utf8(run(arguments).code(code).get_output().stderr.clone()).unwrap()
}

/// Collects responses of the teacher into `output`, in shards of 8; returns the summary.
pub fn collect(output: &str, more: &[&str]) -> Value {
    let paths = [format!("model={}", teacher()), format!("prompts={}", prompt_set()), format!("output={output}")];
    let mut arguments = vec!["collect", "--json"];
    arguments.extend(paths.iter().map(String::as_str));
    arguments.extend(["n=8", "max_new_tokens=20", "device=cpu", "rows_per_shard=8"]);
    arguments.extend(more);
    run_json(&arguments)
}

/// Path of a shard.
pub fn shard(folder: &str, index: usize) -> PathBuf {
    Path::new(folder).join(format!("data/part-{index:05}.parquet"))
}

/// The bytes of the first three shards.
pub fn shards(folder: &str) -> Vec<Vec<u8>> {
    (0..3).map(|index| fs::read(shard(folder, index)).unwrap()).collect()
}

pub fn rows(folder: &str) -> Vec<Trajectory> {
    Reader::open(Path::new(folder)).unwrap().rows().map(Result::unwrap).collect()
}

pub fn provenance() -> Provenance {
    Provenance {
        teacher: "t".into(),
        teacher_name: None,
        teacher_base: None,
        tokenizer: tokenizer().fingerprint().to_owned(),
        vocab_size: 300,
        n: N,
        max_new_tokens: 400,
        thought_closing: None,
        eos_ids: vec![0],
        seed: 1,
        prompts: "p".into(),
        rendering: RenderingRecord::default(),
        toolkit: "0".into(),
        steps: vec![],
    }
}

/// A row whose blocks converge in three states: a wrong draft, one whose second half is wrong, the
/// fixed point.
pub fn row(id: &str, response: &[i32]) -> Trajectory {
    let block = |(index, tokens): (usize, &[i32])| {
        let mut fixed_point = tokens.to_vec();
        fixed_point.resize(N, 9);
        let wrong_from =
            |start: usize| (0..N).map(|at| if at < start { fixed_point[at] } else { fixed_point[at] ^ 1 }).collect();
        Block { start: (index * N) as u32, states: vec![wrong_from(0), wrong_from(2), fixed_point.clone()] }
    };
    let prompt_ids = std::iter::once(4).chain(id.bytes().map(i32::from)).collect();
    Trajectory {
        sample_id: id.into(),
        source: "jsonl/train".into(),
        prompt: id.into(),
        prompt_ids,
        response_ids: response.to_vec(),
        reference: None,
        reference_ids: None,
        blocks: response.chunks(N).enumerate().map(block).collect(),
        augmented: None,
        finish_reason: if response.ends_with(&[0]) { FinishReason::Eos } else { FinishReason::Length },
        meta: None,
    }
}

/// Writes rows as a data set of one shard.
pub fn write_data_set(rows: &[Trajectory]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path(), provenance()).unwrap();
    writer.write_shard(rows).unwrap();
    writer.finish().unwrap();
    dir
}
