//! The command line: exit codes, messages and what each verb prints.

use std::path::Path;

use cllm_core::checkpoint;
use cllm_core::model::{ModelConfig, Transformer};
use cllm_core::pieces::PIECE_BYTES;
use cllm_train::settings::Settings;
use serde_json::{Value, json};
use tch::{Device, Kind};

use crate::setup::{TRAIN, prepare, settings_file, sft};
use cllm_testing::programs::path;

#[test]
fn a_misspelt_key_exits_with_code_2_and_names_the_nearest() {
    let dir = tempfile::tempdir().unwrap();
    let file = path(dir.path(), "run.yaml");
    std::fs::write(&file, "optimizer:\n  learning: 1\n").unwrap();
    TRAIN.fail(&["validate", "-c", &file], 2, &["run.yaml"]);
    TRAIN.fail(&["run", "optimizer.lrr=1"], 2, &["did you mean `optimizer.lr`"]);
    TRAIN.fail(&["validate", "optimizer.lr=7"], 2, &["optimizer.lr"]);
}

#[test]
fn bench_keeps_every_model_in_one_file_and_writes_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut training = json!(Settings { epochs: 50, ..sft(dir.path(), "unused") });
    for key in ["model", "datasets", "output", "device"] {
        training.as_object_mut().unwrap().remove(key);
    }
    let results = path(dir.path(), "bench.json");
    let settings = json!({ "datasets": [dir.path().join("prompts.jsonl")], "device": "cpu", "output": results, "train": training });
    let file = settings_file(dir.path(), &settings);
    TRAIN.fail(&["bench", "-c", &file, "num_steps=1000"], 2, &["1003 are needed"]);
    TRAIN.fail(&["bench", "-c", &file, "train.output=x"], 2, &["train.output is set by bench"]);
    TRAIN.fail(&["bench", "-c", &file, "train.optimizer.lr=7"], 2, &["train.optimizer.lr: greater than 1"]);
    for name in ["name=a", "name=b", "name=a"] {
        TRAIN.succeed(&["bench", "-c", &file, name, "num_steps=5"]);
    }
    let results: Value = serde_json::from_str(&std::fs::read_to_string(&results).unwrap()).unwrap();
    let models = results["models"].as_array().unwrap();
    assert_eq!(models.iter().map(|model| model["name"].as_str().unwrap()).collect::<Vec<_>>(), ["b", "a"]);
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/data-format.md")).unwrap();
    for (key, value) in models[0].as_object().unwrap() {
        assert!(key == "name" || page.contains(&format!("`{key}`")), "{key} is missing in docs/data-format.md");
        let is_measured = ["tokens_per_second", "examples_per_second", "step_seconds", "planned_memory_bytes"]
            .contains(&key.as_str());
        assert!(!is_measured || value.as_f64().unwrap() > 0.0, "{key}: {value}");
    }
    assert!(!dir.path().join("unused").exists());
}

#[test]
fn bench_needs_neither_a_model_nor_data() {
    let dir = tempfile::tempdir().unwrap();
    let output = format!("output={}", path(dir.path(), "bench.json"));
    let bench = [
        "bench",
        "shape=qwen3-tiny",
        "synthetic.num_responses=40",
        "train.max_batch_tokens=4096",
        "device=cpu",
        &output,
    ];
    let train = |more: &[&str]| TRAIN.succeed(&[&bench[..], &["num_steps=1", "--json"], more].concat()).stdout;
    let full: Value = serde_json::from_slice(&train(&[])).unwrap();
    let lora: Value = serde_json::from_slice(&train(&["name=lora", "train.lora.rank=4", "files=true"])).unwrap();
    let (without, with) = (&lora["models"][0], &lora["models"][1]);
    assert!(without["disk_bytes"].is_null() && without["host_peak_bytes"].as_u64() > Some(1_000_000));
    let (disk, planned) = (with["disk_bytes"].as_u64().unwrap(), with["planned_disk_bytes"].as_u64().unwrap());
    // In float32 on the CPU: the merged model, and the adapters of rank 4 of its two layers. Headers
    // and configurations are not planned.
    assert!((planned..planned + 20_000).contains(&disk), "{disk} bytes, {planned} planned");
    assert!(planned > 4 * 139_648, "{planned}");
    assert!(with["load_seconds"].as_f64() > Some(0.0) && with["save_host_bytes"].is_u64(), "{with}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "only the results stay");
    let of = |results: &Value, index: usize| {
        let model = &results["models"][index];
        (model["name"].as_str().unwrap().to_owned(), model["kind"].as_str().unwrap().to_owned())
    };
    assert_eq!(of(&full, 0), ("qwen3-tiny".to_owned(), "full".to_owned()));
    assert_eq!((of(&lora, 0), of(&lora, 1)), (of(&full, 0), ("lora".to_owned(), "lora".to_owned())));
    let fail = |more: &str, parts: &[&str]| TRAIN.fail(&[&bench[..], &[more]].concat(), 2, parts);
    fail("num_steps=1000", &["1003 are needed"]);
    fail("synthetic.prompt_tokens=[9, 3]", &["synthetic.prompt_tokens", "shortest"]);
    let on_int8 = [&bench[..], &["files=true", "train.lora.base_dtype=int8"]].concat();
    TRAIN.fail(&on_int8, 2, &["files=true", "train.lora.base_dtype=int8", "leave one of the two out"]);
    fail("train.objective=sft", &["synthetic examples are trajectories"]);
    fail("datasets=[x]", &["tokenizer", "set model"]);
}

#[test]
fn a_missing_model_and_a_missing_data_set_exit_with_code_2() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let output = format!("output={}", path(dir.path(), "run"));
    TRAIN.fail(&["run", "model=/nowhere/at/all", "datasets=[x]", &output], 2, &["/nowhere/at/all"]);
    let settings = Settings { datasets: vec![dir.path().join("none.jsonl")], ..sft(dir.path(), "run") };
    TRAIN.fail(&["run", "-c", &settings_file(dir.path(), &settings)], 2, &["none.jsonl"]);
}

#[test]
fn export_casts_the_weights_and_keeps_the_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    cllm_train::trainer::run(Settings { max_steps: Some(1), ..sft(dir.path(), "run") }).unwrap();
    let (from, to) = (dir.path().join("run/final"), dir.path().join("exported"));
    let arguments = ["export", &from.display().to_string(), "--output", &to.display().to_string()];
    TRAIN.succeed(&arguments);
    let num_bytes = |folder: &Path| std::fs::metadata(folder.join("model.safetensors")).unwrap().len() as f64;
    assert!((0.4..0.6).contains(&(num_bytes(&to) / num_bytes(&from))), "bfloat16 takes half the bytes");
    assert!(to.join("tokenizer.json").exists());
    TRAIN.fail(&arguments, 2, &["already exists"]);
    // The method for `transformers` is there on request.
    assert!(!from.join("custom_generate").exists() && !to.join("custom_generate").exists());
    let with_method = dir.path().join("with-method");
    TRAIN.succeed(&["export", arguments[1], "--custom-generate", "--output", &with_method.display().to_string()]);
    let text = |name: &str| std::fs::read_to_string(with_method.join(name)).unwrap();
    assert!(text("custom_generate/generate.py").contains("\ndef generate(\n"));
    assert!(text("README.md").contains("trust_remote_code=True"));
}

/// A model of 300 MB in float32, most of it one tensor, passes through the program beside a few
/// pieces of the files.
#[test]
fn a_large_model_is_loaded_and_saved_in_little_more_memory_than_its_own() {
    const NUM_BYTES: u64 = 300_000_000;
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let peak_memory = |num_bytes: u64, output: &str| {
        let config = json!({
            "model_type": "llama", "vocab_size": num_bytes / 4 / 64, "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": true,
        });
        let config = ModelConfig::from_json(&config).unwrap();
        let model = Transformer::random_on_device(config, Device::Cpu, Kind::BFloat16);
        let folder = dir.path().join("tokenizer");
        checkpoint::save(&model, &folder, Kind::BFloat16).unwrap();
        let (folder, output) = (folder.display().to_string(), path(dir.path(), output));
        TRAIN.peak_memory(&["export", &folder, "--dtype", "f32", "--output", &output])
    };
    let more = peak_memory(NUM_BYTES, "large").saturating_sub(peak_memory(1_000_000, "small"));
    assert!(more < NUM_BYTES + 12 * PIECE_BYTES as u64, "{more}");
}
