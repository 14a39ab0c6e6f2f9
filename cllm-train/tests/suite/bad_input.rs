//! Bad input, paths that cannot be written, and devices that do not exist: each is named, and
//! nothing is written.

use std::fs;
use std::path::{Path, PathBuf};

use cllm_core::chat_template::RenderingRecord;
use cllm_train::settings::{Objective, Settings};
use cllm_train::trainer;
use serde_json::json;

use crate::setup::{
    TRAIN, consistency, initial_model, prepare, read_trajectories, settings_file, sft, write_trajectories,
};
use cllm_testing::foreign_parquet;
use cllm_testing::programs::{copy_folder, damaged_models, path, unwritable_path};

/// Settings of a student whose teacher and trajectories are in `folder`.
fn student(folder: &Path) -> Settings {
    prepare(folder);
    trainer::run(Settings { max_steps: Some(1), ..sft(folder, "teacher") }).unwrap();
    Settings { max_steps: Some(2), ..consistency(folder, &folder.join("teacher/final"), "run") }
}

/// `run` with these settings must fail with code 2 and a message with these parts.
#[track_caller]
fn assert_run_fails(folder: &Path, settings: &Settings, parts: &[&str]) {
    TRAIN.fail(&["run", "-c", &settings_file(folder, settings)], 2, parts);
}

#[test]
fn every_damaged_model_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let settings = student(dir.path());
    for (model, parts) in damaged_models(initial_model(&settings), dir.path()) {
        for (objective, data_set) in
            [(Objective::Consistency, &settings.datasets[0]), (Objective::Sft, &dir.path().join("prompts.jsonl"))]
        {
            let datasets = vec![data_set.clone()];
            let damaged = Settings { model: Some(model.clone()), objective, datasets, ..settings.clone() };
            assert_run_fails(dir.path(), &damaged, &parts);
        }
        assert!(!settings.output.exists(), "{model}");
    }
    // A sound tokenizer, but not the one that the data were collected with.
    let model = dir.path().join("other-tokenizer");
    copy_folder(initial_model(&settings), &model);
    cllm_testing::train_tokenizer(["Other words make other ids."], 261, &model);
    let other = Settings { model: Some(model.display().to_string()), ..settings.clone() };
    assert_run_fails(dir.path(), &other, &["trajectories", "tokenizer is not that of the model"]);
    let output = path(dir.path(), "run");
    TRAIN.fail(&["export", "no/such/model", "--output", &output], 2, &["no/such/model"]);
    let cut_weights = path(dir.path(), "cut-weights");
    TRAIN.fail(&["export", &cut_weights, "--output", &output], 2, &["cut-weights/model.safetensors"]);
    assert!(!settings.output.exists());
}

#[test]
fn a_bad_gguf_file_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (gguf, output) = (path(dir.path(), "model.gguf"), path(dir.path(), "output"));
    let arguments = ["convert", &gguf, &output];
    TRAIN.fail(&arguments, 2, &["model.gguf", "there is no such file"]);
    // A header that promises one tensor and ends there; a header that is cut; a file of another
    // kind; an empty file.
    let header = [&b"GGUF"[..], &3u32.to_le_bytes(), &1u64.to_le_bytes(), &0u64.to_le_bytes()].concat();
    for bytes in [&header[..], &header[..10], b"PK\x03\x04 is a zip", b""] {
        fs::write(&gguf, bytes).unwrap();
        TRAIN.fail(&arguments, 2, &["model.gguf"]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "{bytes:?}");
    }
}

#[test]
fn every_bad_shard_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let settings = student(dir.path());
    let shard = settings.datasets[0].join("data/part-00000.parquet");
    let good = fs::read(&shard).unwrap();
    let assert_fails = |settings: &Settings, parts: &[&str]| {
        for verb in ["run", "plan"] {
            TRAIN.fail(&[verb, "-c", &settings_file(dir.path(), settings)], 2, parts);
        }
    };
    fs::write(&shard, &good[..good.len() / 2]).unwrap();
    assert_fails(&settings, &["part-00000.parquet", "not a complete Parquet file", "collect again"]);
    foreign_parquet::write(&shard, "text", None);
    assert_fails(&settings, &["part-00000.parquet", "not a trajectory shard"]);
    foreign_parquet::write(&shard, "text", Some("1"));
    assert_fails(&settings, &["part-00000.parquet", "no column `sample_id`"]);
    fs::remove_file(&shard).unwrap();
    assert_fails(&settings, &["part-00000.parquet", "there is no such file"]);
    assert!(!settings.output.exists());

    fs::write(&shard, &good).unwrap();
    let manifest = settings.datasets[0].join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"complete\": true", "\"complete\": false")).unwrap();
    assert_fails(&settings, &["trajectories", "is not complete", "run the same command"]);
    assert_fails(&Settings { datasets: vec![dir.path().join("nothing")], ..settings.clone() }, &["nothing"]);
}

#[test]
fn bad_settings_are_named_with_file_line_and_value() {
    let dir = tempfile::tempdir().unwrap();
    let file = path(dir.path(), "run.yaml");
    for verb in ["run", "plan", "validate"] {
        fs::write(&file, "output: x\noptimiser:\n  lr: 1\n").unwrap();
        TRAIN.fail(&[verb, "-c", &file], 2, &["run.yaml", "line 2", "did you mean `optimizer`"]);
        fs::write(&file, "output: x\noptimizer:\n  lr: 7\n").unwrap();
        let parts = ["run.yaml, line 3: optimizer.lr=7.0: greater than 1", "datasets is not set"];
        TRAIN.fail(&[verb, "-c", &file], 2, &parts);
    }
    for (assignment, message) in [
        ("optimizer.beta1=1", "greater than 0.99999"),
        ("optimizer.beta2=1", "greater than 0.99999"),
        ("optimizer.eps=0", "`optimizer.eps=0`: lower than"),
        // Numbers for which a run would never end, or would ask for more memory than there is.
        ("epochs=10000000", "greater than 100000"),
        ("max_batch_tokens=18446744073709551615", "greater than 16777216"),
        ("init.num_layers=100000000", "greater than 1024"),
        ("init.hidden_size=1000000000", "greater than 65536"),
        ("consistency.states_per_block=18446744073709551615", "greater than 1024"),
    ] {
        TRAIN.fail(&["validate", assignment], 2, &[assignment, message]);
    }
    TRAIN.fail(&["run", "output=x", "datasets=[x]"], 2, &["model: expected a folder or an id"]);
    TRAIN.fail(&["run", "--optimizer.lr", "1e-4"], 2, &["settings are written KEY=VALUE, such as optimizer.lr="]);
    TRAIN.fail(&["run", "--lr", "1e-4"], 2, &["there is no option --lr", "KEY=VALUE, such as seed=1; the verb"]);
    TRAIN.fail(&["validate", "model=x", "datasets=x", "output=x", "device=gpu"], 2, &["device `gpu` is unknown"]);
    TRAIN.fail(&["settings", "rund"], 2, &["`rund` has no settings; did you mean `run`"]);
    TRAIN.fail(&["run", "save_every=none"], 2, &["save_every: expected a whole number from 0, or null"]);
    let [model, same] = ["model", "model/../model"].map(|name| path(dir.path(), name));
    fs::create_dir(&model).unwrap();
    let arguments = ["run", &format!("model={model}"), &format!("output={same}"), "datasets=[x]"];
    TRAIN.fail(&arguments, 2, &["output is the folder of the model"]);
}

#[test]
fn examples_longer_than_the_context_are_excluded_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings =
        Settings { max_steps: Some(1), max_example_tokens: 4096, max_batch_tokens: 4096, ..sft(dir.path(), "run") };
    let prompts = dir.path().join("prompts.jsonl");
    let short = fs::read_to_string(&prompts).unwrap();
    let long = |id: &str| {
        json!({ "id": id, "source": "jsonl/train", "prompt": "long ".repeat(100), "reference": "x" }).to_string() + "\n"
    };
    fs::write(&prompts, short.clone() + &long("a") + &long("b")).unwrap();
    let stderr = TRAIN.succeed(&["run", "-c", &settings_file(dir.path(), &settings)]).stderr;
    let message = "excluded 2 examples: longer than the model's context of 128 tokens, prompt included";
    assert!(stderr.contains(message), "{stderr}");

    let unlabelled = dir.path().join("unlabelled.jsonl");
    fs::write(&unlabelled, short + &json!({ "id": "bare", "prompt": "What?" }).to_string()).unwrap();
    let with_unlabelled =
        Settings { datasets: vec![unlabelled], output: dir.path().join("unlabelled"), ..settings.clone() };
    let stderr = TRAIN.succeed(&["run", "-c", &settings_file(dir.path(), &with_unlabelled)]).stderr;
    assert!(stderr.contains("unlabelled.jsonl: excluded 1 of 13 prompts for lack of a reference"), "{stderr}");

    let only_long = dir.path().join("long.jsonl");
    fs::write(&only_long, long("a")).unwrap();
    let mut settings = Settings { output: dir.path().join("other"), ..settings };
    let all_too_long = Settings { datasets: vec![only_long.clone()], ..settings.clone() };
    assert_run_fails(dir.path(), &all_too_long, &["no examples to learn from", "context of 128"]);
    // Bad validation data stop a run before its first step, not at the first validation.
    settings.validation.prompts = Some(only_long);
    assert_run_fails(dir.path(), &settings, &["long.jsonl: sample `a`", "128"]);
    settings.validation.prompts = Some(PathBuf::from("no/such.jsonl"));
    assert_run_fails(dir.path(), &settings, &["no/such.jsonl"]);
    assert!(!settings.output.exists());
}

#[test]
fn a_prompt_set_in_place_of_trajectories_is_named_and_vice_versa() {
    let dir = tempfile::tempdir().unwrap();
    let settings = student(dir.path());
    let prompts = dir.path().join("prompts.jsonl");
    let with =
        |objective, data_set: &Path| Settings { objective, datasets: vec![data_set.to_owned()], ..settings.clone() };
    let parts = ["prompts.jsonl", "perhaps a prompt set", "cllm-data collect"];
    assert_run_fails(dir.path(), &with(Objective::Consistency, &prompts), &parts);
    let parts = ["is a folder: expected a prompt set", "cllm-data prepare"];
    assert_run_fails(dir.path(), &with(Objective::Sft, &settings.datasets[0]), &parts);
    assert!(!settings.output.exists());
}

#[test]
fn ids_outside_the_vocabulary_of_the_student_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = student(dir.path());
    // The same tokenizer, but a teacher with a larger vocabulary, one of whose ids is in a state.
    let (mut provenance, mut rows) = read_trajectories(&settings.datasets[0]);
    let vocab_size = provenance.vocab_size;
    provenance.vocab_size += 5;
    let block = rows[3].blocks.iter_mut().find(|block| block.states.len() > 1).unwrap();
    block.states[0][1] = provenance.vocab_size as i32 - 1;
    let padded = dir.path().join("padded");
    write_trajectories(&padded, provenance, &rows);
    settings.datasets = vec![padded];
    let parts = ["padded", "row `s3`", &format!("outside the vocabulary of {vocab_size}")];
    assert_run_fails(dir.path(), &settings, &parts);
}

#[test]
fn trajectories_that_were_rendered_otherwise_are_refused_or_told() {
    let dir = tempfile::tempdir().unwrap();
    let settings = student(dir.path());
    let (provenance, rows) = read_trajectories(&settings.datasets[0]);
    let with = |name: &str, change: &dyn Fn(&mut RenderingRecord)| {
        let mut provenance = provenance.clone();
        change(&mut provenance.rendering);
        let data_set = dir.path().join(name);
        write_trajectories(&data_set, provenance, &rows);
        Settings { datasets: vec![data_set], ..settings.clone() }
    };
    let other = with("other-template", &|rendering| rendering.chat_template = Some("another".to_owned()));
    assert_run_fails(dir.path(), &other, &["other-template", "another chat template", "set chat_template as collect"]);
    let plan = |settings: &Settings| TRAIN.succeed(&["plan", "-c", &settings_file(dir.path(), settings)]).stderr;
    let told = plan(&with("other-variables", &|rendering| {
        rendering.chat_template_kwargs.insert("enable_thinking".to_owned(), false.into());
    }));
    assert!(
        told.contains(r#"other-variables: was rendered with chat_template_kwargs={"enable_thinking":false}"#),
        "{told}"
    );
    // Another date is none of the run's business, and data of an earlier version say nothing.
    for quiet in [
        with("yesterday", &|rendering| rendering.date = Some("2025-01-02".parse().unwrap())),
        with("unrecorded", &|rendering| *rendering = RenderingRecord::default()),
    ] {
        let told = plan(&quiet);
        assert!(!told.contains("was rendered"), "{told}");
    }
}

#[test]
fn missing_devices_and_unwritable_paths_exit_with_code_3() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = sft(dir.path(), "run");
    let file = settings_file(dir.path(), &settings);
    TRAIN.fail(&["run", "-c", &file, "device=cuda:4096"], 3, &["`cuda:4096`"]);
    TRAIN.fail(&["run", "-c", &file, "device=gpu"], 2, &["`gpu` is unknown"]);
    assert!(!settings.output.exists());
    let output = unwritable_path(dir.path());
    let parts = ["/file", "cannot be written", "choose another path"];
    TRAIN.fail(&["run", "-c", &file, &format!("output={output}")], 3, &parts);
    let prompts = path(dir.path(), "prompts.jsonl");
    TRAIN.fail(&["tokenizer", &prompts, "--output", &output], 3, &parts);
    TRAIN.fail_on_full_stdout(&["validate", "-c", &file]);
    TRAIN.fail_on_full_stdout(&["plan", "-c", &file]);
    TRAIN.fail_on_full_stdout(&["completions", "bash"]);
}
