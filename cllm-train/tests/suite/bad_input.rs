//! What a run says of bad input, of places that cannot be written, and of devices that are not there.

use std::fs;
use std::path::{Path, PathBuf};

use cllm_train::settings::{Objective, Settings};
use cllm_train::trainer;

use crate::runs::{collect, model_of, prepare, sft};
use cllm_testing::foreign_parquet;
use cllm_testing::programs::{Program, copy_folder, damaged_models, path, unwritable_path};

const TRAIN: Program = Program("cllm-train");

/// A settings file; its path.
fn file(settings: &Settings) -> String {
    let folder = settings.output.as_path().parent().unwrap();
    let file = path(folder, "run.yaml");
    fs::write(&file, cllm_core::settings::to_yaml(settings).unwrap()).unwrap();
    file
}

/// A folder with prompts, a trained model and its trajectories, and the settings of a student.
fn student(folder: &Path) -> Settings {
    prepare(folder);
    trainer::run(Settings { max_steps: Some(1), ..sft(folder, "teacher") }).unwrap();
    let model = folder.join("teacher/final");
    let data = vec![collect(&model, folder)];
    let model = Some(model.display().to_string());
    Settings {
        init: None,
        model,
        objective: Objective::Consistency,
        datasets: data,
        max_steps: Some(2),
        ..sft(folder, "run")
    }
}

#[test]
fn every_damaged_model_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let settings = student(dir.path());
    for (model, parts) in damaged_models(model_of(&settings), dir.path()) {
        for (objective, data) in
            [(Objective::Consistency, &settings.datasets[0]), (Objective::Sft, &dir.path().join("prompts.jsonl"))]
        {
            let settings =
                Settings { model: Some(model.clone()), objective, datasets: vec![data.clone()], ..settings.clone() };
            TRAIN.fail(&["run", "-c", &file(&settings)], 2, &parts);
        }
        assert!(!settings.output.as_path().exists(), "{model}");
    }
    // A whole tokenizer that is not the one of the data.
    let model = dir.path().join("other-tokenizer");
    copy_folder(model_of(&settings), &model);
    cllm_testing::train_tokenizer(["Other words make other ids."], 261, &model);
    let other = Settings { model: Some(model.display().to_string()), ..settings.clone() };
    TRAIN.fail(&["run", "-c", &file(&other)], 2, &["trajectories", "tokenizer is not that of the model"]);
    let output = path(dir.path(), "run");
    TRAIN.fail(&["export", "no/such/model", "--output", &output], 2, &["no/such/model"]);
    let cut = path(dir.path(), "cut-weights");
    TRAIN.fail(&["export", &cut, "--output", &output], 2, &["cut-weights/model.safetensors"]);
    assert!(!settings.output.as_path().exists());
}

#[test]
fn a_gguf_file_that_is_missing_cut_or_none_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (gguf, output) = (path(dir.path(), "model.gguf"), path(dir.path(), "output"));
    let arguments = ["convert", &gguf, &output];
    TRAIN.fail(&arguments, 2, &["model.gguf", "there is no such file"]);
    // A header that promises one tensor and ends there; a file of another kind; nothing.
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
    let shard = settings.datasets[0].join("part-00000.parquet");
    let good = fs::read(&shard).unwrap();
    type Damage<'d> = Box<dyn Fn() + 'd>;
    let damages: [(Damage<'_>, &[&str]); 4] = [
        (
            Box::new(|| fs::write(&shard, &good[..good.len() / 2]).unwrap()),
            &["not a complete Parquet file", "collect again"],
        ),
        (Box::new(|| foreign_parquet::write(&shard, "text", None)), &["not a trajectory shard"]),
        (Box::new(|| foreign_parquet::write(&shard, "text", Some("1"))), &["no column `sample_id`"]),
        (Box::new(|| fs::remove_file(&shard).unwrap()), &["there is no such file"]),
    ];
    for (damage, parts) in damages {
        damage();
        let parts = [parts, &["part-00000.parquet"]].concat();
        for verb in ["run", "plan"] {
            TRAIN.fail(&[verb, "-c", &file(&settings)], 2, &parts);
        }
    }
    assert!(!settings.output.as_path().exists());
    fs::write(&shard, &good).unwrap();
    let manifest = settings.datasets[0].join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"complete\": true", "\"complete\": false")).unwrap();
    for verb in ["run", "plan"] {
        TRAIN.fail(&[verb, "-c", &file(&settings)], 2, &["trajectories", "is not complete", "run the same command"]);
    }
    let empty = Settings { datasets: vec![dir.path().join("nothing")], ..settings };
    TRAIN.fail(&["run", "-c", &file(&empty)], 2, &["nothing"]);
}

#[test]
fn bad_settings_are_named_with_file_line_and_value() {
    let dir = tempfile::tempdir().unwrap();
    let file = path(dir.path(), "run.yaml");
    for verb in ["run", "plan", "validate"] {
        fs::write(&file, "output: x\noptimiser:\n  lr: 1\n").unwrap();
        TRAIN.fail(&[verb, "-c", &file], 2, &["run.yaml", "line 2", "did you mean `optimizer`"]);
        fs::write(&file, "output: x\noptimizer:\n  lr: 7\n").unwrap();
        TRAIN.fail(
            &[verb, "-c", &file],
            2,
            &["run.yaml, line 3: optimizer.lr=7.0: greater than 1", "datasets is not set"],
        );
    }
    for (wrong, said) in [
        ("optimizer.beta1=1", "greater than 0.99999"),
        ("optimizer.beta2=1", "greater than 0.99999"),
        ("optimizer.eps=0", "`optimizer.eps=0`: lower than"),
    ] {
        TRAIN.fail(&["validate", wrong], 2, &[wrong, said]);
    }
    TRAIN.fail(&["run", "output=x", "datasets=[x]"], 2, &["model: expected a folder or an id"]);
}

#[test]
fn what_is_longer_than_the_context_is_left_out_and_said() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut settings =
        Settings { max_steps: Some(1), max_example_tokens: 4096, max_batch_tokens: 4096, ..sft(dir.path(), "run") };
    let prompts = dir.path().join("prompts.jsonl");
    let long = |id: &str| {
        let text = "long ".repeat(100);
        serde_json::json!({ "id": id, "source": "jsonl/train", "prompt": text, "reference": "x" }).to_string() + "\n"
    };
    let short = fs::read_to_string(&prompts).unwrap();
    fs::write(&prompts, short.clone() + &long("a") + &long("b")).unwrap();
    let found = TRAIN.succeed(&["run", "-c", &file(&settings)]);
    assert!(found.stderr.contains("2 responses are longer, with their prompts, than the model's context of 128"));
    let bare = serde_json::json!({ "id": "bare", "prompt": "What?" }).to_string();
    let lacking = dir.path().join("lacking.jsonl");
    fs::write(&lacking, short.clone() + &bare).unwrap();
    let output = dir.path().join("lacking");
    let found = TRAIN.succeed(&["run", "-c", &file(&Settings { datasets: vec![lacking], output, ..settings.clone() })]);
    assert!(found.stderr.contains("lacking.jsonl: 1 of 13 prompts have no reference"), "{}", found.stderr);
    let only_long = dir.path().join("long.jsonl");
    fs::write(&only_long, long("a")).unwrap();
    settings.output = dir.path().join("other");
    let all_too_long = Settings { datasets: vec![only_long.clone()], ..settings.clone() };
    TRAIN.fail(&["run", "-c", &file(&all_too_long)], 2, &["no responses to learn from", "context of 128"]);
    // A probe that cannot run is found before the first step, not at the two hundredth.
    settings.validation.prompts = Some(only_long);
    TRAIN.fail(&["run", "-c", &file(&settings)], 2, &["sample `a`", "context of 128"]);
    settings.validation.prompts = Some(PathBuf::from("no/such.jsonl"));
    TRAIN.fail(&["run", "-c", &file(&settings)], 2, &["no/such.jsonl"]);
    assert!(!settings.output.as_path().exists());
}

#[test]
fn prompts_for_trajectories_and_the_other_way_round_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let settings = student(dir.path());
    let prompts = dir.path().join("prompts.jsonl");
    let given = |objective, data: &Path| Settings { objective, datasets: vec![data.to_owned()], ..settings.clone() };
    let said = ["prompts.jsonl", "perhaps a prompt set", "cllm-data collect"];
    TRAIN.fail(&["run", "-c", &file(&given(Objective::Consistency, &prompts))], 2, &said);
    let said = ["is a folder: expected a prompt set", "cllm-data prepare"];
    TRAIN.fail(&["run", "-c", &file(&given(Objective::Sft, &settings.datasets[0]))], 2, &said);
    assert!(!settings.output.as_path().exists());
}

#[test]
fn ids_that_the_student_has_not_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = student(dir.path());
    // The same tokenizer, but a teacher that had more ids, one of which stands in a state.
    let reader = cllm_core::trajectory::Reader::open(&settings.datasets[0]).unwrap();
    let mut rows: Vec<_> = reader.rows().map(Result::unwrap).collect();
    let mut provenance = reader.provenance().clone();
    let vocab_size = provenance.vocab_size;
    provenance.vocab_size += 5;
    let block = rows[3].blocks.iter_mut().find(|block| block.states.len() > 1).unwrap();
    block.states[0][1] = provenance.vocab_size as i32 - 1;
    let padded = dir.path().join("padded");
    let mut writer = cllm_core::trajectory::Writer::open(&padded, provenance).unwrap();
    writer.write_shard(&rows).unwrap();
    writer.finish().unwrap();
    settings.datasets = vec![padded];
    TRAIN.fail(
        &["run", "-c", &file(&settings)],
        2,
        &["padded", "row `s3`", &format!("outside the vocabulary of {vocab_size}")],
    );
}

#[test]
fn devices_and_places_that_are_not_there_are_3() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = sft(dir.path(), "run");
    let file = file(&settings);
    TRAIN.fail(&["run", "-c", &file, "device=cuda:4096"], 3, &["`cuda:4096`"]);
    TRAIN.fail(&["run", "-c", &file, "device=gpu"], 2, &["`gpu` is unknown"]);
    assert!(!settings.output.as_path().exists());
    let output = unwritable_path(dir.path());
    let said = ["/file", "cannot be written", "choose another path"];
    TRAIN.fail(&["run", "-c", &file, &format!("output={output}")], 3, &said);
    let prompts = path(dir.path(), "prompts.jsonl");
    TRAIN.fail(&["tokenizer", &prompts, "--output", &output], 3, &said);
    TRAIN.fail_on_full_stdout(&["validate", "-c", &file]);
    TRAIN.fail_on_full_stdout(&["plan", "-c", &file]);
    TRAIN.fail_on_full_stdout(&["completions", "bash"]);
}
