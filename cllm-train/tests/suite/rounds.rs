//! On-policy rounds: interrupted between and within stages, they leave what uninterrupted ones
//! leave.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use cllm_train::rounds::RoundsSettings;
use serde_json::{Value, json};

use crate::setup::{
    N, TRAIN, num_metrics, plain_consistency, plain_optimizer, prepare, settings_file, trained_teacher,
};

/// Writes the settings of two rounds that start from a trained teacher. The blocks of the second
/// round are twice as long.
pub fn write_settings(folder: &Path) -> String {
    prepare(folder);
    let teacher = trained_teacher(folder);
    let prompts = folder.join("prompts.jsonl");
    let settings: RoundsSettings = serde_json::from_value(json!({
        "model": teacher,
        "output": folder.join("rounds"),
        "collect": {
            "prompts": prompts, "n": N, "max_new_tokens": 14, "device": "cpu", "batch_size": 1, "rows_per_shard": 4,
        },
        "augment": {},
        "clean": {"drop_unfinished": false},
        "train": {
            "epochs": 40, "max_batch_tokens": 256, "max_example_tokens": 256, "log_every": 1, "save_every": null,
            "device": "cpu", "optimizer": plain_optimizer(), "consistency": plain_consistency(),
            "validation": {"prompts": prompts, "every": 10, "n": N, "max_new_tokens": 14, "max_accuracy_drop": 1.0},
        },
        "rounds": [{}, {"collect": {"n": 2 * N}, "augment": null, "train": {"seed": 1}}],
    }))
    .unwrap();
    settings_file(folder, &settings)
}

fn report(output: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(output.join("rounds.json")).unwrap()).unwrap()
}

/// A report without durations, speeds, paths and what depends on paths.
fn comparable(mut report: Value) -> Value {
    match &mut report {
        Value::Object(fields) => {
            fields.retain(|key, _| !key.contains("second") && !["inputs", "model"].contains(&key.as_str()));
            fields.values_mut().for_each(|field| *field = comparable(field.take()));
        }
        Value::Array(items) => items.iter_mut().for_each(|item| *item = comparable(item.take())),
        _ => {}
    }
    report
}

/// The files of data sets and models below a folder, by their relative path. Checkpoints and files
/// that hold durations or paths, or name models by these, are not among them.
pub fn outputs(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    const VARYING: [&str; 7] =
        ["metrics.jsonl", "summary.json", "state.json", "rounds.json", "config.yaml", "README.md", "manifest.json"];
    let mut outputs = BTreeMap::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "checkpoints" && name != "tensorboard" {
                    folders.push(path);
                }
            } else if !VARYING.contains(&name.as_str()) {
                outputs.insert(path.strip_prefix(root).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    outputs
}

/// Every key of a report, except those of inputs, which are settings and paths.
fn keys(value: &Value) -> Vec<String> {
    match value {
        Value::Object(fields) => fields
            .iter()
            .flat_map(|(key, value)| {
                let inner = if key == "inputs" { Vec::new() } else { keys(value) };
                [vec![key.clone()], inner].concat()
            })
            .collect(),
        Value::Array(items) => items.iter().flat_map(keys).collect(),
        _ => Vec::new(),
    }
}

/// The stages that a run of the program has announced on stderr.
fn announced_stages(stderr: &str) -> Vec<&str> {
    stderr.lines().filter(|line| line.starts_with("round ")).collect()
}

#[test]
fn rounds_interrupted_between_and_within_stages_equal_uninterrupted_ones() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_settings(dir.path());
    let (interrupted, whole) = (dir.path().join("rounds"), dir.path().join("whole"));
    let arguments = ["rounds", "-c", &file];
    let num_steps = |round: &str| num_metrics(&interrupted.join(round).join("student"));
    TRAIN.interrupt(&arguments, "TERM", 143, || interrupted.join("round-01/trajectories/manifest.json").exists());
    TRAIN.interrupt(&arguments, "INT", 130, || interrupted.join("round-01/clean/clean-report.json").exists());
    TRAIN.interrupt(&arguments, "TERM", 143, || num_steps("round-01") >= 8);
    let steps_before = num_steps("round-01");
    TRAIN.interrupt(&arguments, "TERM", 143, || interrupted.join("round-02/trajectories/manifest.json").exists());
    assert!(steps_before < num_steps("round-01") && interrupted.join("round-01/student/summary.json").exists());
    TRAIN.interrupt(&arguments, "TERM", 143, || num_steps("round-02") >= 8);
    let stderr = TRAIN.succeed(&arguments).stderr;
    assert!(stderr.contains("round 2: train") && stderr.contains("resuming after step"), "{stderr}");
    for finished in ["round 1", "round 2: collect", "round 2: clean"] {
        assert!(!stderr.contains(finished), "{finished} was done twice: {stderr}");
    }

    TRAIN.succeed(&["rounds", "-c", &file, &format!("output={}", whole.display())]);
    assert_eq!(comparable(report(&interrupted)), comparable(report(&whole)));
    let (outputs, expected) = (outputs(&interrupted), outputs(&whole));
    assert_eq!(outputs.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    assert!(outputs.contains_key(Path::new("round-02/student/final/model.safetensors")));
    for (path, contents) in &outputs {
        assert!(*contents == expected[path], "{} differs", path.display());
    }
    // The same command again changes nothing.
    let stderr = TRAIN.succeed(&arguments).stderr;
    assert!(!stderr.contains("round 1") && stderr.contains("2 rounds done"), "{stderr}");
    let printed = TRAIN.succeed(&["rounds", "-c", &file, "--json"]).stdout;
    assert_eq!(serde_json::from_slice::<Value>(&printed).unwrap(), report(&interrupted));
}

#[test]
fn each_round_learns_from_the_student_before_it_and_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_settings(dir.path());
    let output = dir.path().join("rounds");
    let arguments = ["rounds", "-c", &file, "train.max_steps=10"];
    // Rounds that were started on another day keep its date.
    let started = json!({ "schema_version": 2, "complete": false, "date": "2020-01-01", "model": null, "rounds": [] });
    fs::create_dir(&output).unwrap();
    fs::write(output.join("rounds.json"), started.to_string()).unwrap();
    TRAIN.succeed(&arguments);
    let finished = report(&output);
    assert_eq!((&finished["complete"], &finished["rounds"][1]["n"]), (&true.into(), &(2 * N).into()));
    let stages = |round: usize| finished["rounds"][round]["stages"].as_array().unwrap();
    for stage in [0, 1]
        .into_iter()
        .flat_map(stages)
        .filter(|stage| ["collect", "train"].map(Value::from).contains(&stage["name"]))
    {
        assert_eq!(stage["inputs"]["settings"]["date"], "\"2020-01-01\"", "{stage}");
    }
    let names = |round: usize| stages(round).iter().map(|stage| stage["name"].as_str().unwrap()).collect::<Vec<_>>();
    assert_eq!((names(0), names(1)), (vec!["collect", "augment", "clean", "train"], vec!["collect", "clean", "train"]));
    for (collect, train) in [(&stages(0)[0], &stages(0)[3]), (&stages(1)[0], &stages(1)[2])] {
        assert!(collect["summary"]["tokens_per_forward"].is_number() && collect["summary"]["accuracy"].is_number());
        assert!(train["summary"]["validation"]["last"]["accuracy"].is_number());
        assert!(train["summary"]["final_losses"]["global_loss"].is_number());
    }
    // Round 2 collects with the best checkpoint of round 1, whose validation answered the same
    // prompts.
    let (trained, collected) = (&stages(0)[3]["summary"]["validation"], &stages(1)[0]["summary"]);
    assert_eq!(trained["best"]["step"], 10, "{trained}");
    assert_eq!(collected["accuracy"], trained["last"]["accuracy"]);
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/data-format.md")).unwrap();
    for key in keys(&finished) {
        assert!(page.contains(&format!("`{key}`")), "{key} is missing in docs/data-format.md");
    }

    // After a kill between the last file of a stage and its record, the stage is recorded and not
    // done again.
    let mut unrecorded = finished.clone();
    for round in unrecorded["rounds"].as_array_mut().unwrap() {
        for stage in round["stages"].as_array_mut().unwrap() {
            (stage["output"], stage["summary"]) = (Value::Null, Value::Null);
        }
    }
    fs::write(output.join("rounds.json"), unrecorded.to_string()).unwrap();
    TRAIN.succeed(&arguments);
    assert_eq!(report(&output), finished);
    let mut newer = finished.clone();
    newer["schema_version"] = 3.into();
    fs::write(output.join("rounds.json"), newer.to_string()).unwrap();
    TRAIN.fail(&arguments, 2, &["rounds.json", "schema_version is 3"]);
    fs::write(output.join("rounds.json"), finished.to_string()).unwrap();
}

#[test]
fn changed_settings_and_outputs_of_finished_stages_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_settings(dir.path());
    let output = dir.path().join("rounds");
    TRAIN.succeed(&["rounds", "-c", &file, "train.max_steps=10"]);
    // Another setting of training does not concern the trajectories of round 1, but it does concern
    // its student.
    let changed = ["rounds", "-c", &file, "train.max_steps=11"];
    let message = "was made with max_steps=10; this command says 11";
    TRAIN.fail(&changed, 2, &["round-01/student", message, "delete this one"]);
    fs::remove_dir_all(output.join("round-01/student")).unwrap();
    // The new student is not the one that collected the trajectories of round 2.
    TRAIN.fail(&changed, 2, &["round-02/trajectories", "was made from another version of the model"]);
    fs::remove_dir_all(output.join("round-02")).unwrap();
    let stderr = TRAIN.succeed(&changed).stderr;
    assert_eq!(announced_stages(&stderr), ["round 2: collect", "round 2: clean", "round 2: train"]);
    // The output of a finished stage must be unchanged.
    let message = "has changed since its stage finished";
    fs::remove_file(output.join("round-01/clean/data/part-00000.parquet")).unwrap();
    TRAIN.fail(&changed, 2, &["round-01/clean", message]);
    fs::remove_dir_all(output.join("round-01/clean")).unwrap();
    let stderr = TRAIN.succeed(&changed).stderr;
    assert_eq!(announced_stages(&stderr), ["round 1: clean"], "the same rows again are what the rest was made from");
    let model = |round: &str, folder: &str| output.join(round).join("student").join(folder).join("model.safetensors");
    fs::copy(model("round-01", "final"), model("round-02", "checkpoints/best")).unwrap();
    TRAIN.fail(&changed, 2, &["round-02/student", message]);
}

#[test]
fn adapters_of_a_round_are_trained_on_the_best_model_of_the_round_before() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_settings(dir.path());
    let output = dir.path().join("rounds");
    // Nothing is learnt, so the first validation is the best.
    let changes = ["train.lora.rank=2", "train.optimizer.lr=1e-9", "train.max_steps=2", "train.validation.every=1"];
    let arguments = [&["rounds", "-c", &file][..], &changes].concat();
    TRAIN.succeed(&arguments);
    let students = ["round-01", "round-02"].map(|round| output.join(round).join("student"));
    for student in &students {
        let best = student.join("checkpoints/best");
        assert_eq!(fs::read_link(&best).unwrap(), Path::new("step-000001"));
        assert!(!best.join("model.safetensors").exists() && student.join("best-merged/model.safetensors").exists());
    }
    let finished = report(&output);
    assert_eq!(finished["model"], students[1].join("best-merged").display().to_string());
    // After a kill before the adapters were merged, they are merged.
    let merged = outputs(&students[0].join("best-merged"));
    fs::remove_dir_all(students[0].join("best-merged")).unwrap();
    TRAIN.succeed(&arguments);
    assert_eq!(report(&output), finished);
    assert!(outputs(&students[0].join("best-merged")) == merged);
}
