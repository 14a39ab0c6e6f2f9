//! Runs that train adapters only: they learn, resume exactly, leave the model below them unchanged,
//! and save little.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cllm_core::checkpoint::{self, TensorFile};
use cllm_core::model::{AdaptedTokens, BaseDtype, LoraConfig};
use cllm_core::tokenizer::Tokenizer;
use cllm_train::settings::{Objective, Settings};
use cllm_train::trainer;
use serde_json::Value;
use tch::Kind;

use crate::setup::{
    TRAIN, assert_resumes_exactly, consistency, have_same_weights, initial_model, loss_curve, prepare,
    reproducible_metrics, settings_file, summary,
};
use cllm_testing::families::{random_model, shapes};
use cllm_testing::programs::path;

/// Settings of a run that trains adapters on the trajectories of a random model with this
/// configuration.
fn student(folder: &Path, mut config: Value) -> Settings {
    prepare(folder);
    let model = folder.join("tokenizer");
    config["vocab_size"] = Tokenizer::load(&model).unwrap().vocab_size().into();
    checkpoint::save(&random_model(&config, 5), &model, Kind::Float).unwrap();
    Settings {
        lora: Some(LoraConfig { rank: 2, alpha: 8.0, ..LoraConfig::default() }),
        max_steps: Some(4),
        save_every: Some(2),
        ..consistency(folder, &model, "run")
    }
}

fn llama() -> Value {
    shapes().remove(0).1
}

/// The files of a folder with their contents.
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file());
    let mut contents: Vec<_> = files.map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    contents.sort();
    contents
}

#[test]
fn a_run_of_every_family_resumes_exactly_and_validation_changes_nothing() {
    tch::set_num_threads(1);
    for (name, config) in shapes() {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = student(dir.path(), config);
        settings.consistency.local_weight = 0.5;
        settings.consistency.anchor_weight = 0.5;
        let base = initial_model(&settings).to_owned();
        let base_contents = contents(&base);
        let unvalidated = dir.path().join("unvalidated");
        trainer::run(Settings { output: unvalidated.clone(), ..settings.clone() }).unwrap();
        settings.validation.prompts = Some(dir.path().join("prompts.jsonl"));
        settings.validation.every = 1;
        settings.validation.n = 4;
        settings.validation.max_new_tokens = 6;
        trainer::run(settings.clone()).unwrap();
        let run = &settings.output;
        let losses = loss_curve(run);
        assert_eq!(losses, loss_curve(&unvalidated), "{name}: validation changed the course");
        assert!(have_same_weights(&run.join("final"), &unvalidated.join("final")), "{name}");
        let adapter = contents(&run.join("final/adapter"));
        assert_resumes_exactly(&settings, 2);
        assert!(contents(&run.join("final/adapter")) == adapter, "{name}: the adapter of the resumed run differs");
        assert!(!have_same_weights(&run.join("final"), &base), "{name}: it learnt nothing");
        assert!(contents(&base) == base_contents, "{name}: the model below the adapters has changed");
        // The anchor is the frozen model below the adapters, from which the student differs only
        // after the first step.
        assert!(losses[0].anchor.abs() < 1e-6 && losses[losses.len() - 1].anchor > 1e-5, "{name}: {losses:?}");
    }
}

#[test]
fn a_run_saves_the_merged_model_and_the_adapter() {
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings { eos_ids: Some(vec![7]), ..student(dir.path(), llama()) };
    trainer::run(settings.clone()).unwrap();
    let run = &settings.output;
    let (latest, adapter) = (run.join("checkpoints/latest"), run.join("final/adapter"));
    for folder in [&latest, &adapter] {
        assert!(have_same_weights(folder, &run.join("final")), "{}", folder.display());
        assert!(!folder.join("model.safetensors").exists() && !folder.join("config.json").exists());
        assert!(!folder.join("custom_generate").exists(), "{}", folder.display());
        assert_eq!(Tokenizer::load(folder).unwrap().eos_ids(), [7]);
    }
    assert!(run.join("final/custom_generate/generate.py").exists() && run.join("final/README.md").exists());
    let config = checkpoint::load_config(&adapter).unwrap();
    let trained = settings.trained_parameters(&config);
    assert_eq!(summary(run)["trained_parameters"], trained);
    assert!(trained < config.num_parameters() / 4, "{trained}");
    let state = TensorFile::open(&latest.join("optimizer-00001-of-00001.safetensors"), "").unwrap();
    let sizes: BTreeMap<_, _> = state.tensors().map(|(name, tensor)| (name, tensor.num_elements())).collect();
    let expected = ["exp_avg", "exp_avg_sq", "master_weights"].map(|name| (name.to_owned(), trained));
    assert_eq!(sizes, BTreeMap::from(expected));
    // `export` merges the adapter too.
    let exported = path(dir.path(), "exported");
    TRAIN.succeed(&["export", &adapter.display().to_string(), "--dtype", "f32", "--output", &exported]);
    assert!(have_same_weights(Path::new(&exported), &run.join("final")));
    assert_eq!(Tokenizer::load(Path::new(&exported)).unwrap().eos_ids(), [7]);
    // Adapters cannot be trained on top of an adapter, but all weights can.
    let model = Some(adapter.display().to_string());
    let on_adapter = Settings { model, output: dir.path().join("on-adapter"), ..settings.clone() };
    let message = trainer::run(on_adapter.clone()).unwrap_err().to_string();
    assert!(message.contains("final/adapter: is an adapter") && message.contains("cllm-train export"), "{message}");
    trainer::run(Settings { lora: None, ..on_adapter }).unwrap();
}

#[test]
fn a_run_on_a_quantized_base_resumes_exactly_and_is_merged_into_the_initial_model() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let mut settings = student(dir.path(), llama());
    settings.consistency.anchor_weight = 0.5;
    settings.consistency.anchor = settings.model.clone();
    settings.lora.as_mut().unwrap().base_dtype = BaseDtype::Int8;
    trainer::run(settings.clone()).unwrap();
    let run = &settings.output;
    // Before the first update, the anchor loss is what quantization changes.
    let losses = loss_curve(run);
    assert!(losses[0].anchor > 1e-9 && losses[0].anchor < 1e-2, "{losses:?}");
    // Loading an adapter merges it into the initial model.
    assert!(have_same_weights(&run.join("final/adapter"), &run.join("final")));
    assert!(!have_same_weights(initial_model(&settings), &run.join("final")), "it learnt nothing");
    assert_resumes_exactly(&settings, 2);
}

#[test]
fn adapters_alone_learn() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let mut settings = Settings { max_steps: Some(40), epochs: 40, ..student(dir.path(), llama()) };
    settings.objective = Objective::Sft;
    settings.datasets = vec![dir.path().join("prompts.jsonl")];
    settings.optimizer.lr = 2e-2;
    trainer::run(settings.clone()).unwrap();
    let losses = loss_curve(&settings.output);
    assert!(losses[losses.len() - 1].ar < losses[0].ar * 0.7, "{losses:?}");
    assert_eq!(reproducible_metrics(&settings.output).len(), 40);
}

#[test]
fn adapters_for_drafts_learn_beside_a_model_that_stays_as_it_is() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let mut settings =
        Settings { max_steps: Some(40), save_every: Some(20), epochs: 40, ..student(dir.path(), llama()) };
    settings.lora.as_mut().unwrap().on = AdaptedTokens::Drafts;
    settings.consistency.ar_weight = 0.0;
    settings.optimizer.lr = 2e-2;
    settings.validation.prompts = Some(dir.path().join("prompts.jsonl"));
    settings.validation.every = 20;
    settings.validation.n = 4;
    settings.validation.max_new_tokens = 6;
    trainer::run(settings.clone()).unwrap();
    let run = &settings.output;
    let losses = loss_curve(run);
    assert!(losses[losses.len() - 1].global < losses[0].global * 0.7, "{losses:?}");
    // Without drafts, the final model is the one that the run began with.
    let adapter = run.join("final");
    assert!(!adapter.join("model.safetensors").exists() && !adapter.join("custom_generate").exists());
    assert!(have_same_weights(&adapter, initial_model(&settings)));
    let before = contents(&adapter);
    assert_resumes_exactly(&settings, 20);
    assert!(contents(&adapter) == before, "the adapter of the resumed run differs");
    let (adapter, exported) = (adapter.display().to_string(), path(dir.path(), "exported"));
    let parts = ["final", "act on draft tokens alone", "strategy `gated`"];
    TRAIN.fail(&["export", &adapter, "--output", &exported], 2, &parts);
}

#[test]
fn plan_counts_gradients_and_state_of_the_adapters_only() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = student(dir.path(), llama());
    settings.consistency.anchor_weight = 0.5;
    let file = settings_file(dir.path(), &settings);
    let plan = |more: &[&str]| {
        let output = TRAIN.succeed(&[&["plan", "-c", &file, "--json", "--no-timing"], more].concat());
        serde_json::from_slice::<Value>(&output.stdout).unwrap()
    };
    let (adapters, full) = (plan(&[]), plan(&["lora=null"]));
    let number = |plan: &Value, key: &str| plan[key].as_i64().unwrap();
    let bytes = |key: &str| [&adapters, &full].map(|plan| number(&plan["memory_bytes"], key));
    let (all, trained) = (number(&adapters, "parameters"), number(&adapters, "trained_parameters"));
    assert_eq!(number(&full, "trained_parameters"), all);
    assert!(trained < all / 4, "{adapters}");
    // The model below the adapters is also the anchor. When every weight is trained, the anchor is
    // a second model.
    assert_eq!(bytes("weights"), [4 * (all + trained), 8 * all]);
    assert_eq!(bytes("gradients"), [4 * trained, 4 * all]);
    let quantized = plan(&["lora.base_dtype=int8"]);
    let weights = number(&quantized["memory_bytes"], "weights");
    assert!((all..3 * all).contains(&(weights - 4 * trained)), "{quantized}");
    assert_eq!(bytes("optimizer"), [8 * trained, 8 * all]);
    let [with_adapters, plain] = bytes("activations");
    // Low-rank outputs come, normalized inputs and the gradient of the vocabulary go.
    assert!(plain * 8 / 10 < with_adapters && with_adapters < plain * 11 / 10, "{plain} {with_adapters}");
}

#[test]
fn bad_settings_are_named() {
    for (assignment, message) in [
        ("lora.rank=0", "lower than 1"),
        ("lora.alpha=0", "lower than 0.001"),
        ("lora.targets=[]", "lora.targets is not set"),
        ("lora.targets=[q_proj, lm_head]", "expected one of"),
        ("lora.ranks=4", "did you mean `lora.rank`"),
    ] {
        let key = assignment.split('=').next().unwrap();
        TRAIN.fail(&["validate", "model=x", "datasets=[x]", "output=x", assignment], 2, &[key, message]);
    }
    let with_bf16_state =
        ["validate", "model=x", "datasets=[x]", "output=x", "lora.rank=4", "optimizer.state_dtype=bfloat16"];
    TRAIN.fail(&with_bf16_state, 2, &["optimizer.state_dtype must be float32 with lora"]);
    let random = ["validate", "datasets=[x]", "output=x", "lora.rank=4", "init.tokenizer=x"];
    TRAIN.fail(&random, 2, &["lora needs `model`"]);
    let output = TRAIN.succeed(&["validate", "model=x", "datasets=[x]", "output=x", "lora.targets=[v_proj, q_proj]"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("lora:\n  rank: 16\n  alpha: 32.0\n  targets:\n"), "{text}");
}

#[test]
fn settings_without_effect_on_draft_tokens_are_refused_with_adapters_for_these_alone() {
    let whole = ["validate", "model=x", "datasets=[x]", "output=x", "consistency.anchor_weight=0"];
    let drafts = [&whole[..], &["lora.on=drafts"]].concat();
    for (assignment, message) in [
        ("consistency.anchor_weight=1", "add consistency.anchor_weight=0"),
        ("objective=sft", "lora.on=drafts needs objective=consistency"),
        ("consistency.global_weight=0", "consistency.global_weight and consistency.local_weight are both 0"),
        ("consistency.anchor=y", "consistency.anchor has no effect with lora.on=drafts"),
        ("consistency.labels=dataset", "consistency.labels=dataset has no effect with lora.on=drafts"),
        ("consistency.context=noisy_window", "consistency.context=noisy_window does not go with lora.on=drafts"),
        ("validation.n=33", "validation.n=33 is too large with lora.on=drafts"),
    ] {
        TRAIN.fail(&[&drafts[..], &[assignment]].concat(), 2, &[message]);
    }
    for assignment in ["consistency.anchor=null", "consistency.local_weight=1", "validation.n=32"] {
        TRAIN.succeed(&[&drafts[..], &[assignment]].concat());
    }
    // Drafts of a model all of whose weights are trained have a frozen model, which the settings may name.
    for assignment in ["consistency.anchor=y", "consistency.context=noisy_window", "validation.n=33"] {
        TRAIN.succeed(&[&whole[..], &[assignment]].concat());
    }
}
