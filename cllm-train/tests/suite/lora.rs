//! Runs that train adapters alone: they learn, resume exactly, leave the model they began from as it was, and save little.

use cllm_core::checkpoint;
use std::fs;
use std::path::{Path, PathBuf};

use cllm_core::cuda::libtorch;
use cllm_core::model::{LoraConfig, LoraTarget};
use cllm_core::tokenizer::Tokenizer;
use cllm_train::settings::{Objective, Settings};
use cllm_train::trainer;
use safetensors::SafeTensors;
use serde_json::Value;
use tch::Kind;

use crate::runs::{collect, curve, cut_back, model_of, prepare, same_weights, sft, summary};
use cllm_testing::families::{random_model, shapes};
use cllm_testing::programs::{Program, path};

const TRAIN: Program = Program("cllm-train");

/// A folder with prompts and a random model of this shape, and the settings of a run that trains adapters on its trajectories.
fn student(folder: &Path, mut config: Value) -> Settings {
    prepare(folder);
    let model = folder.join("tokenizer");
    config["vocab_size"] = Tokenizer::load(&model).unwrap().vocab_size().into();
    checkpoint::save(&random_model(&config, 5), &model, Kind::Float).unwrap();
    Settings {
        init: None,
        lora: Some(LoraConfig { rank: 2, alpha: 8.0, targets: LoraTarget::ALL.into() }),
        objective: Objective::Consistency,
        datasets: vec![collect(&model, folder)],
        model: Some(model.display().to_string()),
        max_steps: Some(4),
        save_every: Some(2),
        ..sft(folder, "run")
    }
}

fn llama() -> Value {
    shapes().remove(0).1
}

/// What is there, in bytes.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        files.filter(|path| path.is_file()).map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    files.sort();
    files
}

/// The anchor's loss at each step.
fn anchor(run: &Path) -> Vec<f64> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter_map(|line| line["anchor_loss"].as_f64()).collect()
}

#[test]
fn a_run_of_every_family_resumes_exactly_and_probes_leave_no_trace() {
    tch::set_num_threads(1);
    for (name, config) in shapes() {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = student(dir.path(), config);
        settings.consistency.local_weight = 0.5;
        settings.consistency.anchor_weight = 0.5;
        let base = model_of(&settings).to_owned();
        let before = contents(&base);
        let (run, kept, unprobed) = (dir.path().join("run"), dir.path().join("kept"), dir.path().join("unprobed"));
        trainer::run(Settings { output: unprobed.clone(), ..settings.clone() }).unwrap();
        (settings.validation.prompts, settings.validation.every) = (Some(dir.path().join("prompts.jsonl")), 1);
        (settings.validation.n, settings.validation.max_new_tokens) = (4, 6);
        trainer::run(settings.clone()).unwrap();
        let whole = curve(&run);
        assert_eq!(whole, curve(&unprobed), "{name}: a probe changed the course");
        assert!(same_weights(&run.join("final"), &unprobed.join("final")), "{name}: a probe changed the weights");
        fs::rename(run.join("final"), &kept).unwrap();
        fs::create_dir(run.join("final")).unwrap();
        cut_back(&run, 2);
        trainer::run(settings.clone()).unwrap();
        assert_eq!(curve(&run), whole, "{name}");
        assert!(same_weights(&kept, &run.join("final")), "{name}");
        assert!(!same_weights(&kept, &base), "{name}: it learnt nothing");
        for (a, b) in contents(&kept.join("adapter")).iter().zip(contents(&run.join("final/adapter"))) {
            assert!(a.1 == b.1, "{name}: {}", b.0.display());
        }
        assert!(contents(&base) == before, "{name}: the model it began from is another");
        // At first the student is the frozen model below it, to which it is anchored, and then no longer.
        let anchor = anchor(&run);
        assert!(anchor[0].abs() < 1e-6 && anchor[anchor.len() - 1] > 1e-5, "{name}: {anchor:?}");
    }
}

#[test]
fn what_is_saved_is_the_merged_model_and_the_adapter_alone() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings { eos_ids: Some(vec![7]), ..student(dir.path(), llama()) };
    trainer::run(settings.clone()).unwrap();
    let run = dir.path().join("run");
    let (last, adapter) = (run.join("checkpoints/latest"), run.join("final/adapter"));
    for folder in [&last, &adapter] {
        assert!(same_weights(folder, &run.join("final")), "{}", folder.display());
        assert!(!folder.join("model.safetensors").exists() && !folder.join("config.json").exists());
        assert!(Tokenizer::load(folder).unwrap().eos_ids().contains(&7));
    }
    let config = checkpoint::load_config(&adapter).unwrap();
    let trained = settings.trained_parameters(&config);
    assert_eq!(summary(&run)["trained_parameters"], trained);
    assert!(trained < config.num_parameters() / 4, "{trained}");
    let map = libtorch::map_file(&last.join("optimizer.safetensors")).unwrap();
    let state = SafeTensors::deserialize(&map).unwrap();
    assert!(state.names().iter().all(|name| name.contains(".lora_")), "{:?}", state.names());
    let numbers: usize = state.tensors().iter().map(|(_, view)| view.shape().iter().product::<usize>()).sum();
    assert_eq!(numbers as i64, 3 * trained, "masters and two moments");
    // Merged by `export` too; and other adapters cannot belong to one.
    let exported = path(dir.path(), "exported");
    TRAIN.succeed(&["export", &adapter.display().to_string(), "--dtype", "f32", "--output", &exported]);
    assert!(same_weights(Path::new(&exported), &run.join("final")));
    assert!(Tokenizer::load(Path::new(&exported)).unwrap().eos_ids().contains(&7));
    let model = Some(adapter.display().to_string());
    let on_top = Settings { model, output: dir.path().join("top"), ..settings.clone() };
    let message = trainer::run(on_top.clone()).unwrap_err().to_string();
    assert!(message.contains("final/adapter: is an adapter") && message.contains("cllm-train export"), "{message}");
    // Training every weight may start from one.
    trainer::run(Settings { lora: None, ..on_top }).unwrap();
}

#[test]
fn adapters_alone_learn() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let mut settings = Settings { max_steps: Some(40), epochs: 40, ..student(dir.path(), llama()) };
    (settings.objective, settings.datasets) = (Objective::Sft, vec![dir.path().join("prompts.jsonl")]);
    settings.optimizer.lr = 2e-2;
    trainer::run(settings).unwrap();
    let losses: Vec<f64> = curve(&dir.path().join("run")).iter().map(|line| line.1.as_f64().unwrap()).collect();
    assert!(losses[losses.len() - 1] < losses[0] * 0.7, "{losses:?}");
}

#[test]
fn plan_counts_gradients_and_state_of_the_adapters_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = student(dir.path(), llama());
    settings.consistency.anchor_weight = 0.5;
    let file = path(dir.path(), "run.yaml");
    fs::write(&file, cllm_core::settings::to_yaml(&settings).unwrap()).unwrap();
    let plan = |more: &[&str]| {
        let found = TRAIN.succeed(&[&["plan", "-c", &file, "--json", "--no-timing"], more].concat());
        serde_json::from_slice::<Value>(&found.stdout).unwrap()
    };
    let (adapters, full) = (plan(&[]), plan(&["lora=null"]));
    let number = |plan: &Value, key: &str| plan[key].as_i64().unwrap();
    let memory = |plan: &Value, part: &str| number(&plan["memory_bytes"], part);
    let (all, trained) = (number(&adapters, "parameters"), number(&adapters, "trained_parameters"));
    assert_eq!(number(&full, "trained_parameters"), all);
    assert!(trained < all / 4, "{adapters}");
    // The anchor is the frozen model itself, where every weight that is trained needs a second one.
    assert_eq!((memory(&adapters, "weights"), memory(&full, "weights")), (4 * (all + trained), 8 * all));
    assert_eq!((memory(&adapters, "gradients"), memory(&full, "gradients")), (4 * trained, 4 * all));
    assert_eq!((memory(&adapters, "optimizer"), memory(&full, "optimizer")), (8 * trained, 8 * all));
    let (more, plain) = (memory(&adapters, "activations"), memory(&full, "activations"));
    assert!(plain < more && more < plain * 11 / 10, "{plain} {more}");
}

#[test]
fn bad_settings_are_named() {
    for (wrong, said) in [
        ("lora.rank=0", "lower than 1"),
        ("lora.alpha=0", "lower than 0.001"),
        ("lora.targets=[]", "lora.targets is not set"),
        ("lora.targets=[q_proj, lm_head]", "expected one of"),
        ("lora.ranks=4", "did you mean `lora.rank`"),
    ] {
        let key = wrong.split('=').next().unwrap();
        TRAIN.fail(&["validate", "model=x", "datasets=[x]", "output=x", wrong], 2, &[key, said]);
    }
    let random = ["validate", "datasets=[x]", "output=x", "lora.rank=4", "init.tokenizer=x"];
    TRAIN.fail(&random, 2, &["lora needs `model`"]);
    let found = TRAIN.succeed(&["validate", "model=x", "datasets=[x]", "output=x", "lora.targets=[v_proj, q_proj]"]);
    let text = String::from_utf8(found.stdout).unwrap();
    assert!(text.contains("lora:\n  rank: 16\n  alpha: 32.0\n  targets:\n"), "{text}");
}
