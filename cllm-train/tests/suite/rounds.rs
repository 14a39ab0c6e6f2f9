//! On-policy rounds: a run that was stopped between and within stages leaves what one that was not leaves.

use std::fs;
use std::path::{Path, PathBuf};

use cllm_core::settings::to_yaml;
use cllm_train::rounds::Settings;
use cllm_train::trainer;
use serde_json::{Value, json};

use crate::runs::{N, prepare, sft};
use cllm_testing::programs::{Program, path};

const TRAIN: Program = Program("cllm-train");

/// Writes the settings of two rounds from a teacher that has learnt its prompts; the second has blocks of twice as many tokens.
fn write_settings(folder: &Path) -> String {
    prepare(folder);
    let mut teacher = cllm_train::settings::Settings { epochs: 60, save_every: None, ..sft(folder, "teacher") };
    teacher.optimizer.lr = 1e-2;
    trainer::run(teacher).unwrap();
    let prompts = folder.join("prompts.jsonl");
    let settings: Settings = serde_json::from_value(json!({
        "model": folder.join("teacher/final"), "output": folder.join("rounds"),
        "collect": {"prompts": prompts, "n": N, "max_new_tokens": 14, "device": "cpu", "batch_size": 1, "rows_per_shard": 4},
        "augment": {},
        "clean": {"drop_unfinished": false},
        "train": {
            "epochs": 40, "max_batch_tokens": 256, "max_example_tokens": 256, "log_every": 1, "save_every": null, "device": "cpu",
            "validation": {"prompts": prompts, "every": 10, "n": N, "max_new_tokens": 14, "max_accuracy_drop": 1.0},
        },
        "rounds": [{}, {"collect": {"n": 2 * N}, "augment": null, "train": {"seed": 1}}],
    }))
    .unwrap();
    let file = path(folder, "rounds.yaml");
    fs::write(&file, to_yaml(&settings).unwrap()).unwrap();
    file
}

fn report(output: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(output.join("rounds.json")).unwrap()).unwrap()
}

/// What a report says, but for times, and for paths and what depends on them.
fn bare(mut value: Value) -> Value {
    match &mut value {
        Value::Object(fields) => {
            fields.retain(|key, _| !key.contains("second") && !["inputs", "model"].contains(&key.as_str()));
            fields.values_mut().for_each(|field| *field = bare(field.take()));
        }
        Value::Array(values) => values.iter_mut().for_each(|item| *item = bare(item.take())),
        _ => {}
    }
    value
}

/// Every file of data sets and models below a folder, checkpoints and records of times aside.
fn results(folder: &Path, found: &mut Vec<(PathBuf, Vec<u8>)>, root: &Path) {
    let mut entries: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for entry in entries {
        let name = entry.file_name().unwrap().to_string_lossy().into_owned();
        if entry.is_dir() {
            if name != "checkpoints" && name != "tensorboard" {
                results(&entry, found, root);
            }
        } else if !["metrics.jsonl", "summary.json", "rounds.json", "settings.yaml", "config.yaml"].contains(&&*name)
            || entry.parent().unwrap().ends_with("final")
        {
            found.push((entry.strip_prefix(root).unwrap().to_owned(), fs::read(&entry).unwrap()));
        }
    }
}

fn keys(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => fields.iter().for_each(|(key, value)| {
            found.push(key.clone());
            keys(value, found);
        }),
        Value::Array(values) => values.iter().for_each(|value| keys(value, found)),
        _ => {}
    }
}

#[test]
fn rounds_that_were_stopped_between_and_within_stages_equal_those_that_were_not() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_settings(dir.path());
    let (stopped, whole) = (dir.path().join("rounds"), dir.path().join("whole"));
    let arguments = ["rounds", "-c", &file];
    let lines = |round: &str| {
        let path = stopped.join(round).join("student/metrics.jsonl");
        fs::read_to_string(path).unwrap_or_default().lines().count()
    };
    TRAIN.interrupt(&arguments, "TERM", 143, || stopped.join("round-01/trajectories/manifest.json").exists());
    TRAIN.interrupt(&arguments, "INT", 130, || stopped.join("round-01/clean/clean-report.json").exists());
    TRAIN.interrupt(&arguments, "TERM", 143, || lines("round-01") >= 8);
    let before = lines("round-01");
    TRAIN.interrupt(&arguments, "TERM", 143, || stopped.join("round-02/trajectories/manifest.json").exists());
    assert!(before < lines("round-01") && stopped.join("round-01/student/summary.json").exists());
    TRAIN.interrupt(&arguments, "TERM", 143, || lines("round-02") >= 8);
    let last = TRAIN.succeed(&arguments);
    assert!(last.stderr.contains("round 2: train") && last.stderr.contains("going on after step"), "{}", last.stderr);
    for finished in ["round 1", "round 2: collect", "round 2: clean"] {
        assert!(!last.stderr.contains(finished), "{finished} was done twice: {}", last.stderr);
    }

    TRAIN.succeed(&["rounds", "-c", &file, &format!("output={}", whole.display())]);
    assert_eq!(bare(report(&stopped)), bare(report(&whole)));
    let [found, expected] = [&stopped, &whole].map(|folder| {
        let mut found = Vec::new();
        results(folder, &mut found, folder);
        found
    });
    let names = |files: &[(PathBuf, Vec<u8>)]| files.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&found), names(&expected));
    assert!(names(&found).contains(&"round-02/student/final/model.safetensors".into()));
    for ((name, found), (_, expected)) in found.iter().zip(&expected) {
        assert!(found == expected, "{} differs", name.display());
    }
    // Done is done.
    let again = TRAIN.succeed(&arguments);
    assert!(!again.stderr.contains("round 1") && again.stderr.contains("2 rounds done"), "{}", again.stderr);
    let printed = TRAIN.succeed(&["rounds", "-c", &file, "--json"]).stdout;
    assert_eq!(serde_json::from_slice::<Value>(&printed).unwrap(), report(&stopped));
}

#[test]
fn each_round_learns_from_the_student_before_it_and_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_settings(dir.path());
    let output = dir.path().join("rounds");
    let (short, longer) = ("train.max_steps=10", "train.max_steps=11");
    let arguments = ["rounds", "-c", &file, short];
    TRAIN.succeed(&arguments);
    let found = report(&output);
    assert_eq!((&found["complete"], &found["rounds"][1]["n"]), (&true.into(), &(2 * N).into()));
    let stages = |round: usize| found["rounds"][round]["stages"].as_array().unwrap();
    let names = |round: usize| stages(round).iter().map(|stage| stage["name"].as_str().unwrap()).collect::<Vec<_>>();
    assert_eq!((names(0), names(1)), (vec!["collect", "augment", "clean", "train"], vec!["collect", "clean", "train"]));
    for (collect, train) in [(&stages(0)[0], &stages(0)[3]), (&stages(1)[0], &stages(1)[2])] {
        assert!(collect["figures"]["tokens_per_forward"].is_number() && collect["figures"]["accuracy"].is_number());
        assert!(train["figures"]["tokens_per_forward"].is_number() && train["figures"]["accuracy"].is_number());
        assert!(train["figures"]["final_losses"]["consistency_loss"].is_number());
    }
    // The model that collects in round 2 is that of round 1's best probe, which answered the same prompts.
    let (best, collected) = (&stages(0)[3]["figures"], &stages(1)[0]["figures"]);
    assert_eq!(best["best_probe"][0], 10, "{best}");
    assert_eq!(collected["accuracy"], best["accuracy"]);
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/data-format.md")).unwrap();
    let mut fields = Vec::new();
    keys(&found, &mut fields);
    for key in fields {
        // Rules of `clean` are named in words.
        assert!(page.contains(&format!("`{key}`")) || key == "duplicate", "{key} is missing in docs/data-format.md");
    }

    // Killed after a stage had written its last file and before that was noted: it is noted, and not done again.
    let mut forgotten = found.clone();
    for stage in
        forgotten["rounds"].as_array_mut().unwrap().iter_mut().flat_map(|round| round["stages"].as_array_mut().unwrap())
    {
        (stage["output"], stage["figures"]) = (Value::Null, Value::Null);
    }
    fs::write(output.join("rounds.json"), forgotten.to_string()).unwrap();
    TRAIN.succeed(&arguments);
    assert_eq!(report(&output), found);
    fs::write(
        output.join("rounds.json"),
        found.to_string().replacen("\"schema_version\":1", "\"schema_version\":2", 1),
    )
    .unwrap();
    TRAIN.fail(&arguments, 2, &["rounds.json", "schema_version is 2"]);
    fs::write(output.join("rounds.json"), found.to_string()).unwrap();

    // Another setting of training leaves the trajectories of round 1 alone, and is refused where its student is.
    let changed = ["rounds", "-c", &file, longer];
    TRAIN.fail(&changed, 2, &["round-01/student", "was made with other settings", "delete this one"]);
    fs::remove_dir_all(output.join("round-01/student")).unwrap();
    // Its student is another then, whose trajectories are not those that are there.
    TRAIN.fail(&changed, 2, &["round-02/trajectories", "from another model"]);
    fs::remove_dir_all(output.join("round-02")).unwrap();
    let redone = TRAIN.succeed(&changed).stderr;
    let done: Vec<&str> = redone.lines().filter(|line| line.starts_with("round ")).collect();
    assert_eq!(done, ["round 2: collect", "round 2: clean", "round 2: train"]);
    // What a finished stage left must be what it left.
    fs::remove_file(output.join("round-01/clean/part-00000.parquet")).unwrap();
    TRAIN.fail(&changed, 2, &["round-01/clean", "is no longer what the stage left there"]);
    fs::remove_dir_all(output.join("round-01/clean")).unwrap();
    let redone = TRAIN.succeed(&changed).stderr;
    let done: Vec<&str> = redone.lines().filter(|line| line.starts_with("round ")).collect();
    assert_eq!(done, ["round 1: clean"], "the same rows again are what the rest was made from");
    let model = |round: &str, folder: &str| output.join(round).join("student").join(folder).join("model.safetensors");
    fs::copy(model("round-01", "final"), model("round-02", "checkpoints/best")).unwrap();
    TRAIN.fail(&changed, 2, &["round-02/student", "is no longer what the stage left there"]);
}
