//! `plan`, and what `run` refuses by the same estimates.

use std::path::Path;

use cllm_core::model::LoraConfig;
use cllm_core::prompt_set::{self, Prompt, Sample};
use cllm_testing::programs::path;
use cllm_train::settings::{OptimizerSettings, Settings, StateDtype};
use serde_json::{Value, json};

use crate::setup::{TRAIN, prepare, settings_file, sft};

/// Settings of a run on a folder that has the configuration of a published model and the tokenizer
/// of [`prepare`], but no weights.
fn without_weights(folder: &Path, config: &Value) -> Settings {
    prepare(folder);
    let sample = |index: usize| Sample {
        id: format!("s{index}"),
        source: "jsonl/train".to_owned(),
        prompt: Prompt::question("Count.".to_owned()),
        reference: Some("one two three ".repeat(160)),
        meta: None,
    };
    prompt_set::write(&folder.join("long.jsonl"), &(0..24).map(sample).collect::<Vec<_>>()).unwrap();
    let model = folder.join("tokenizer");
    std::fs::write(model.join("config.json"), config.to_string()).unwrap();
    Settings {
        init: None,
        model: Some(model.display().to_string()),
        datasets: vec![folder.join("long.jsonl")],
        max_batch_tokens: 16384,
        max_example_tokens: 4096,
        device: "auto".to_owned(),
        ..sft(folder, "run")
    }
}

fn llama_8b() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "tie_word_embeddings": false,
    })
}

fn plan_json(file: &str, more: &[&str]) -> Value {
    let output = TRAIN.succeed(&[&["plan", "-c", file, "--json"], more].concat());
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(value: &Value, pointer: &str) -> f64 {
    value.pointer(pointer).and_then(Value::as_f64).unwrap_or_else(|| panic!("{pointer} in {value}"))
}

/// The settings of a proposal as they are written on a command line.
fn assignments(proposal: &Value) -> Vec<String> {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    proposal["settings"].as_object().unwrap().iter().map(|(key, value)| format!("{key}={}", text(value))).collect()
}

#[test]
fn plan_shows_parameters_memory_steps_and_time_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let file = settings_file(dir.path(), &sft(dir.path(), "run"));
    let text =
        |more: &[&str]| String::from_utf8(TRAIN.succeed(&[&["plan", "-c", &file], more].concat()).stdout).unwrap();
    let shown = text(&[]);
    for part in ["0.02 M of them trained", "steps", "host memory", "disk", "fits", "final model", "about", "timed here"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    assert!(text(&["--no-timing"]).contains("unknown"));
    for verb in ["plan", "run"] {
        TRAIN.fail(&[verb, "-c", &file, &format!("output={file}")], 2, &[&file, "is a file"]);
    }
    let (small, large) = (plan_json(&file, &[]), plan_json(&file, &["max_batch_tokens=256", "--no-timing"]));
    // In float32, each parameter has a weight, a gradient and two moments. Only the activations
    // depend on the batch.
    let static_bytes = 16.0 * number(&small, "/parameters");
    for plan in [&small, &large] {
        let peak = static_bytes + number(plan, "/memory_bytes/activations");
        assert_eq!(number(plan, "/memory_bytes/peak"), peak);
        // On the CPU, tensors are in the memory of the host.
        assert_eq!(number(plan, "/host_bytes/tensors"), peak);
        assert!(plan["comparisons"]["device_memory"].is_null() && plan["fits"] == true, "{plan}");
    }
    let growth = number(&large, "/memory_bytes/activations") / number(&small, "/memory_bytes/activations");
    assert!((1.7..2.3).contains(&growth), "{growth}");
    let expected = number(&small, "/duration/estimated/seconds_per_step") * number(&small, "/steps");
    let seconds = number(&small, "/duration/estimated/seconds");
    assert!(expected > 0.0 && (seconds / expected - 1.0).abs() < 1e-9, "{small}");
    assert!(large["duration"]["unknown"].is_object(), "{large}");
    assert!(!dir.path().join("run").exists());
}

#[test]
fn every_field_is_documented() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let file = settings_file(dir.path(), &sft(dir.path(), "run"));
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/data-format.md")).unwrap();
    fn check(value: &Value, page: &str) {
        for (key, value) in value.as_object().into_iter().flatten() {
            assert!(
                key == "schema_version" || page.contains(&format!("`{key}`")),
                "{key} is missing in docs/data-format.md"
            );
            check(value, page);
        }
    }
    check(&plan_json(&file, &[]), &page);
}

#[test]
fn processes_use_the_memory_of_their_own_host_and_are_not_timed_as_one() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let file = settings_file(dir.path(), &sft(dir.path(), "run"));
    let plan = |local_world_size: &str| -> Value {
        let mut command = TRAIN.command(&[]);
        let launcher = [("WORLD_SIZE", "2"), ("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")];
        command.args(["plan", "-c", &file, "--json"]).envs(launcher).env("LOCAL_WORLD_SIZE", local_world_size);
        let output = command.output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let (apart, together) = (plan("1"), plan("2"));
    assert_eq!(apart["num_processes"], 2);
    for key in ["/host_bytes/program", "/host_bytes/examples", "/host_bytes/tensors"] {
        assert_eq!(2.0 * number(&apart, key), number(&together, key), "{key}");
    }
    let reason = together["duration"]["unknown"]["reason"].as_str().unwrap();
    assert!(reason.contains("a single process"), "{reason}");
}

/// Bytes of what a plan counts of the files of a model: all but headers, configurations, cards,
/// checksums and train states.
fn planned_bytes(folder: &Path) -> u64 {
    let file_bytes = |path: &Path| {
        let bytes = std::fs::read(path).unwrap();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => bytes.len() as u64 - 8 - u64::from_le_bytes(bytes[..8].try_into().unwrap()),
            _ if path.ends_with("config.json") || path.ends_with("adapter_config.json") => 0,
            _ if path.ends_with("state.json") || path.ends_with("checksums.json") => 0,
            _ if path.ends_with("README.md") => 0,
            _ => bytes.len() as u64,
        }
    };
    let paths = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.map(|path| if path.is_dir() { planned_bytes(&path) } else { file_bytes(&path) }).sum()
}

#[test]
fn the_files_of_a_run_have_the_planned_sizes() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    // The template in a file, and a named one in a folder.
    let tokenizer = dir.path().join("tokenizer");
    let config = std::fs::read(tokenizer.join("tokenizer_config.json")).unwrap();
    let config: Value = serde_json::from_slice(&config).unwrap();
    std::fs::create_dir(tokenizer.join("chat_templates")).unwrap();
    for (file, text) in
        [("chat_template.jinja", config["chat_template"].as_str().unwrap()), ("chat_templates/tools.jinja", "x")]
    {
        std::fs::write(tokenizer.join(file), text).unwrap();
    }
    let full = Settings { max_checkpoints: 1, ..sft(dir.path(), "run") };
    let on_adapters = Settings {
        init: None,
        model: Some(path(dir.path(), "run/final")),
        lora: Some(LoraConfig { rank: 2, ..LoraConfig::default() }),
        output: dir.path().join("adapters"),
        ..full.clone()
    };
    for settings in [full, on_adapters] {
        let plan = plan_json(&settings_file(dir.path(), &settings), &["--no-timing"]);
        cllm_train::trainer::run(settings.clone()).unwrap();
        // Shards of the optimizer's state are padded.
        for (folder, key, padding) in [("checkpoints/latest", "checkpoint", 1024), ("final", "final_model", 0)] {
            let written = planned_bytes(&std::fs::canonicalize(settings.output.join(folder)).unwrap());
            let planned = plan["disk_bytes"][key].as_u64().unwrap();
            assert!((planned..=planned + padding).contains(&written), "{key} of {plan}: {written}");
        }
        // Nothing is left to write.
        let again = plan_json(&settings_file(dir.path(), &settings), &["--no-timing"]);
        assert_eq!(number(&again, "/comparisons/disk/needed"), 0.0, "{again}");
    }
}

#[test]
fn a_model_that_our_kernels_cannot_train_is_told_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = llama_8b();
    config["head_dim"] = 320.into();
    let file = settings_file(dir.path(), &without_weights(dir.path(), &config));
    let plan = plan_json(&file, &["device=h100-80gb"]);
    assert!(plan["slow_path"].as_str().is_some_and(|reason| reason.contains("head_dim of at most 256")), "{plan}");
    assert!(plan["duration"]["unknown"].is_object(), "{plan}");
    let text = TRAIN.succeed(&["plan", "-c", &file, "device=h100-80gb"]).stdout;
    assert!(String::from_utf8_lossy(&text).contains("slow: the kernels need a head_dim of at most 256"));
    assert_eq!(plan_json(&file, &["device=cpu", "--no-timing"])["slow_path"], Value::Null);
}

#[test]
fn a_named_gpu_is_planned_for_from_a_machine_without_it_or_the_weights() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = without_weights(dir.path(), &llama_8b());
    settings.optimizer = OptimizerSettings { state_dtype: StateDtype::Bfloat16, ..settings.optimizer };
    settings.checkpointed_layers = 32;
    let file = settings_file(dir.path(), &settings);
    let plan = plan_json(&file, &["device=h100-80gb"]);
    let parameters = 8_030_261_248.0;
    assert_eq!((number(&plan, "/parameters"), &plan["slow_path"]), (parameters, &Value::Null));
    for (key, bytes_per_parameter) in [("weights", 2.0), ("gradients", 2.0), ("optimizer", 4.0)] {
        assert_eq!(number(&plan, &format!("/memory_bytes/{key}")), bytes_per_parameter * parameters, "{key}");
    }
    let checkpoint = number(&plan, "/disk_bytes/checkpoint") / parameters;
    assert!((checkpoint - 6.0).abs() < 1e-3, "weights and two moments of two bytes: {checkpoint}");
    assert_eq!(plan["comparisons"]["device_memory"]["verdict"], "fits", "{plan}");
    let estimated = &plan["duration"]["estimated"];
    assert!(estimated["timed_steps"] == 0 && number(estimated, "/relative_error") > 0.0, "{plan}");
    // A faster GPU needs less time, and two of them take half of the batches each.
    let seconds = |device: &str| number(&plan_json(&file, &[device]), "/duration/estimated/seconds_per_step");
    let [slow, fast, two] = ["device=a100-80gb", "device=h200", "device=2xh200"].map(seconds);
    assert!(slow > 1.5 * fast && (0.45..0.75).contains(&(two / fast)), "{slow} {fast} {two}");
    let text = String::from_utf8(TRAIN.succeed(&["plan", "-c", &file, "device=h100-80gb"]).stdout).unwrap();
    let rows_of_this_machine = text.lines().filter(|line| line.ends_with("(this machine)"));
    assert_eq!(rows_of_this_machine.count(), 2, "{text}");
    let amount = plan_json(&file, &["memory=80GB"]);
    assert_eq!(amount["memory_bytes"], plan["memory_bytes"]);
    assert!(amount["duration"]["unknown"]["reason"].as_str().unwrap().contains("device=h100-80gb"), "{amount}");
    TRAIN.fail(&["plan", "-c", &file, "device=h100-80g"], 2, &["did you mean `h100-80gb`", "rtx-4090"]);
    TRAIN.fail(&["plan", "-c", &file, "memory=80"], 2, &["memory=80", "a size such as 80GB"]);
    for more in ["device=h100-80gb", "device=2xh200", "memory=80GB"] {
        TRAIN.fail(&["run", "-c", &file, more], 2, &[more, "`plan`"]);
    }
    TRAIN.fail(&["plan", "-c", &file, "device=4xh200"], 2, &["accumulation=2 is too few for 4 processes"]);
    assert!(!settings.output.exists());
}

#[test]
fn every_proposal_fits_and_the_fastest_that_trains_the_same_comes_first() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = without_weights(dir.path(), &llama_8b());
    settings.model = Some(dir.path().join("tokenizer").display().to_string());
    let file = settings_file(dir.path(), &settings);
    for (more, min_proposals) in [
        // The float32 state of 8B does not fit any one H100; other states and adapters do.
        (vec!["device=h100-80gb"], 2),
        (vec!["device=h100-80gb", "optimizer.state_dtype=bfloat16"], 2),
        (vec!["memory=48GB"], 1),
        // With whole gradients, no batches are small enough.
        (vec!["device=2xh100-80gb", "accumulation=4", "checkpointed_layers=32", "max_batch_tokens=4096"], 2),
    ] {
        let plan = plan_json(&file, &more);
        assert_eq!(plan["comparisons"]["device_memory"]["verdict"], "does_not_fit", "{plan}");
        assert_eq!(plan["fits"], false);
        let proposals = plan["proposals"]["device_memory"].as_array().unwrap();
        assert!(proposals.len() >= min_proposals, "{more:?}: {proposals:?}");
        assert!(proposals.is_sorted_by_key(|proposal| proposal["changes_training"] == true), "{proposals:?}");
        let same = proposals.iter().filter(|proposal| proposal["changes_training"] == false);
        assert!(same.is_sorted_by_key(|proposal| number(proposal, "/relative_time")), "{proposals:?}");
        for proposal in proposals {
            let changes = assignments(proposal);
            let changed = [more.clone(), changes.iter().map(String::as_str).collect()].concat();
            let plan = plan_json(&file, &changed);
            assert_eq!(plan["comparisons"]["device_memory"]["verdict"], "fits", "{changed:?}: {plan}");
            let needed = number(&plan, "/comparisons/device_memory/needed");
            assert_eq!(needed, number(proposal, "/needed"), "{changed:?}");
        }
        let text = TRAIN.succeed(&[&["plan", "-c", &file], &more[..]].concat()).stdout;
        let text = String::from_utf8(text).unwrap();
        let first = assignments(&proposals[0]).join(" ");
        assert!(text.contains("device memory does not fit: ") && text.contains(&first), "{text}");
    }
}

#[test]
fn a_run_that_cannot_fit_is_refused_before_it_loads_or_writes_anything() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut settings = sft(dir.path(), "run");
    // 1.5 trillion parameters.
    let init = settings.init.as_mut().unwrap();
    (init.hidden_size, init.intermediate_size, init.num_layers) = (65536, 262_144, 24);
    let file = settings_file(dir.path(), &settings);
    let parts = ["host memory does not fit: ", "disk does not fit: ", " TB short", "make room"];
    TRAIN.fail(&["run", "-c", &file], 3, &parts);
    assert!(!settings.output.exists());
}
