//! Models with random weights, and a rehearsal with one.

use std::path::Path;
use std::process::{Command, Output};

use cllm_core::checkpoint;
use cllm_core::model::ModelShape;
use cllm_core::prompt_set::Prompt;
use cllm_core::tokenizer::Tokenizer;
use serde_json::{Value, json};
use tch::{Device, IndexOp, Kind, Tensor};

use crate::setup::TRAIN;
use cllm_testing::programs::path;

fn init(folder: &Path, name: &str, more: &[&str]) -> String {
    let model = path(folder, name);
    TRAIN.succeed(&[&["init", "shape=qwen3-tiny", &format!("output={model}")], more].concat());
    model
}

#[test]
fn a_random_model_depends_on_its_seed_alone_and_no_folder_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let models = [init(dir.path(), "a", &[]), init(dir.path(), "b", &[]), init(dir.path(), "c", &["seed=1"])];
    let weights = models.each_ref().map(|model| std::fs::read(format!("{model}/model.safetensors")).unwrap());
    assert!(weights[0] == weights[1] && weights[0] != weights[2]);
    let folder = Path::new(&models[0]);
    let config: Value = serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    assert_eq!(config, ModelShape::Qwen3Tiny.json());
    let model = checkpoint::load(folder, Device::Cpu, Kind::Float).unwrap();
    for (name, weight) in model.named_parameters() {
        let (mean, deviation) = (weight.mean(Kind::Float).double_value(&[]), weight.std(true).double_value(&[]));
        let expected = if name.ends_with("norm.weight") { (1.0, 0.0) } else { (0.0, 0.02) };
        assert!(
            (mean - expected.0).abs() < 2e-3 && (deviation - expected.1).abs() < 2e-3,
            "{name}: {mean}, {deviation}"
        );
    }
    assert_eq!(Tokenizer::load(folder).unwrap().vocab_size(), 512);
    TRAIN.fail(&["init", "shape=qwen3-tiny", &format!("output={}", models[0])], 2, &["already exists"]);
    TRAIN.fail(&["init", "shape=qwen3-9b", "output=x"], 2, &["qwen3-8b"]);
    TRAIN.fail(&["init", "output=x"], 2, &["error: shape is not set: add `shape=...`"]);
    TRAIN.fail_on_full_disk(64, &["init", "shape=qwen3-tiny", &format!("output={}", path(dir.path(), "d"))], &["/d/"]);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3, "nothing else is left behind");
}

fn rehearse(shape: &str, folder: &str) -> Output {
    let program = TRAIN.command(&[]).get_program().to_owned();
    let programs = Path::new(&program).parent().unwrap();
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/rehearse"));
    command.args([shape, folder, "--programs"]).arg(programs).env("OMP_NUM_THREADS", "1");
    // A GPU would make it another rehearsal.
    command.env("CUDA_VISIBLE_DEVICES", "").output().unwrap()
}

#[test]
fn a_rehearsal_of_an_unknown_shape_or_of_one_too_large_for_a_cpu_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let folder = path(dir.path(), "rehearsal");
    for (shape, message) in [("qwen3-tiniest", "the stage init failed"), ("qwen3-8b", "no NVIDIA GPU found")] {
        let run = rehearse(shape, &folder);
        let text = String::from_utf8_lossy(&run.stderr);
        assert!(!run.status.success() && text.contains(message), "{text}");
        assert!(!Path::new(&folder).exists());
    }
}

#[test]
fn a_random_model_is_what_transformers_reads() {
    let recorded: Value = serde_json::from_str(include_str!("../fixtures/random-model.json")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let folder = init(dir.path(), "model", &[]);
    let tokenizer = Tokenizer::load(Path::new(&folder)).unwrap();
    let content = recorded["content"].as_str().unwrap();
    let (text, ids) = tokenizer.encode_prompt(&Prompt::question(content)).unwrap();
    assert_eq!((json!(text), json!(ids)), (recorded["text"].clone(), recorded["ids"].clone()));
    assert_eq!(json!(tokenizer.eos_ids()), recorded["eos"]);
    let model = checkpoint::load(Path::new(&folder), Device::Cpu, Kind::Float).unwrap();
    let positions = Tensor::arange(ids.len() as i64, (Kind::Int64, Device::Cpu));
    let ids = Tensor::from_slice(&ids).to_kind(Kind::Int64);
    let hidden = model.forward(&ids.view([1, -1]), &positions.view([1, -1]));
    let logits = model.compute_logits(&hidden).unwrap().i((0, -1));
    let expected: Vec<f32> = serde_json::from_value(recorded["logits"].clone()).unwrap();
    let difference = (logits - Tensor::from_slice(&expected)).abs().max().double_value(&[]);
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn a_rehearsal_runs_through_and_removes_its_models() {
    let dir = tempfile::tempdir().unwrap();
    let folder = path(dir.path(), "rehearsal");
    let run = rehearse("qwen3-tiny", &folder);
    let text = String::from_utf8_lossy(&run.stdout);
    assert!(run.status.success(), "{text}\n{}", String::from_utf8_lossy(&run.stderr));
    let rehearsal: Value = serde_json::from_slice(&std::fs::read(format!("{folder}/rehearsal.json")).unwrap()).unwrap();
    let stages = rehearsal["stages"].as_array().unwrap();
    let names: Vec<&str> = stages.iter().map(|stage| stage["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["init", "prepare train", "prepare test", "collect", "clean", "train", "eval", "report"]);
    for stage in stages {
        assert!(text.contains(stage["name"].as_str().unwrap()), "{text}");
        assert!(
            stage["seconds"].as_f64() > Some(0.0) && stage["host_peak_bytes"].as_u64() > Some(1_000_000),
            "{stage}"
        );
    }
    let of = |name: &str| stages.iter().find(|stage| stage["name"] == name).unwrap();
    let disk_bytes = of("init")["disk_peak_bytes"].as_u64().unwrap();
    assert!((2 * 139_648..400_000).contains(&disk_bytes), "two bytes for each weight: {disk_bytes}");
    assert!(of("collect")["tokens"].as_u64() > Some(300) && of("train")["tokens"].as_u64() > Some(1000), "{text}");
    // Configurations and logs are not planned; they weigh in a tiny model only. How much of
    // the libraries is in host memory depends on the system.
    let ratio = |key: &str| of("train")[key].as_f64().unwrap() / of("train")["planned"][key].as_f64().unwrap();
    let (disk, host) = (ratio("disk_peak_bytes"), ratio("host_peak_bytes"));
    assert!((1.0..1.1).contains(&disk) && (0.87..1.15).contains(&host), "disk {disk}, host {host}: {}", of("train"));
    assert!(!Path::new(&folder).join("model").exists() && !Path::new(&folder).join("student").exists());
    assert!(Path::new(&folder).join("eval/report.html").exists());
}
