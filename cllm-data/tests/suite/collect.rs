//! `collect`: the same files for the same seed, resuming, several processes, and prompts that do
//! not fit.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use assert_cmd::Command;
use cllm_core::trajectory::Trajectory;
use cllm_core::{checkpoint, prompt_set};
use cllm_testing::programs::path;
use serde_json::json;

use crate::fixtures::{collect, prompt_set, rows, run, run_error, run_json, shard, shards, teacher};

#[test]
fn several_processes_collect_one_data_set_together() {
    let dir = tempfile::tempdir().unwrap();
    let (alone, shared) = (path(dir.path(), "alone"), path(dir.path(), "shared"));
    collect(&alone, &[]);
    let (model, prompts) = (format!("model={}", teacher()), format!("prompts={}", prompt_set()));
    let settings = [&model, &prompts, "n=8", "max_new_tokens=20", "device=cpu", "rows_per_shard=8"];
    let started = |output: &str, world_size: &str, rank: &str| {
        let mut command = Command::cargo_bin("cllm-data").unwrap();
        command.args(["--quiet", "collect"]).args(settings).arg(format!("output={output}"));
        command.env("WORLD_SIZE", world_size).env("RANK", rank);
        command.env("MASTER_ADDR", "nobody").env("MASTER_PORT", "1").assert()
    };
    let collect_as = |rank: &str| {
        started(&shared, "2", rank).success();
    };
    let refuses = |output: &str, world_size: &str, advice: &str| {
        let stderr = started(output, world_size, "0").code(2).get_output().stderr.clone();
        assert!(String::from_utf8_lossy(&stderr).contains(advice), "{}", String::from_utf8_lossy(&stderr));
    };
    collect_as("1");
    // With another number, the prompts are divided in another way.
    for other in ["1", "3"] {
        refuses(&shared, other, "shared: holds a collection by 2 processes: start 2 again, or choose another output");
    }
    refuses(&alone, "2", "alone: holds a collection by 1 process: start 1 again");
    let error = run_error(&["stats", &shared], 2);
    assert!(error.contains("rank-0-of-2: is missing"), "{error}");
    collect_as("0");
    let sorted = |folder: &str| {
        let mut rows = rows(folder);
        rows.sort_by(|a, b| a.sample_id.cmp(&b.sample_id));
        rows
    };
    assert_eq!(sorted(&shared), sorted(&alone));
    assert_eq!(run_json(&["validate", "--json", &shared])["rows"], 24);
}

#[test]
fn a_process_whose_prompts_are_all_too_long_has_no_rows() {
    let dir = tempfile::tempdir().unwrap();
    let (prompts, output) = (path(dir.path(), "prompts.jsonl"), path(dir.path(), "output"));
    let row = |id: usize, text: &str| json!({ "id": id.to_string(), "prompt": text }).to_string() + "\n";
    let (short, long) = ("3+4", "apples ".repeat(400));
    let collect_as = |rank: &str, max_new_tokens: &str| {
        let mut command = Command::cargo_bin("cllm-data").unwrap();
        command.args(["--quiet", "collect", "n=8", "device=cpu", &format!("max_new_tokens={max_new_tokens}")]);
        command.args([format!("model={}", teacher()), format!("prompts={prompts}"), format!("output={output}")]);
        command.env("WORLD_SIZE", "2").env("RANK", rank).env("MASTER_ADDR", "nobody").env("MASTER_PORT", "1").assert()
    };
    fs::write(&prompts, row(0, &long) + &row(1, &long)).unwrap();
    for rank in ["0", "1"] {
        let stderr = collect_as(rank, "20").code(2).get_output().stderr.clone();
        let stderr = String::from_utf8_lossy(&stderr);
        assert!(stderr.contains("no prompt of") && stderr.contains("lower max_new_tokens"), "{stderr}");
    }
    fs::remove_dir_all(&output).unwrap();
    fs::write(&prompts, row(0, short) + &row(1, &long) + &row(2, short) + &row(3, &long)).unwrap();
    for rank in ["0", "1", "0", "1"] {
        collect_as(rank, "20").success();
        assert!(rank == "0" || !rows(&output).is_empty(), "what is complete stays complete");
    }
    assert_eq!(rows(&output).iter().map(|row| row.sample_id.as_str()).collect::<Vec<_>>(), ["0", "2"]);
    for rank in ["0", "1"] {
        let stderr = collect_as(rank, "19").failure().get_output().stderr.clone();
        let stderr = String::from_utf8_lossy(&stderr);
        assert!(stderr.contains("was started with max_new_tokens=20; this command says 19"), "{stderr}");
    }
}

#[test]
fn collecting_again_what_is_complete_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let output = path(dir.path(), "output");
    let once = collect(&output, &[]);
    let files = || {
        let entries = ["", "data"].map(|inside| fs::read_dir(Path::new(&output).join(inside)).unwrap());
        let file = |entry: fs::DirEntry| (entry.path(), entry.metadata().unwrap().ino());
        entries.into_iter().flatten().map(|entry| file(entry.unwrap())).collect::<BTreeMap<_, _>>()
    };
    let before = files();
    let again = collect(&output, &[]);
    assert_eq!((&again["total"], &again["resumed"]), (&once["total"], &json!(24)));
    assert_eq!((&again["run"]["rows"], &again["run"]["tokens_per_second"]), (&json!(0), &json!(null)));
    // A file that is written again has another number.
    assert_eq!(files(), before);
}

#[test]
fn adapters_for_draft_tokens_are_refused_and_their_model_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let (adapters, output) = (path(dir.path(), "adapters"), path(dir.path(), "trajectories"));
    fs::create_dir(&adapters).unwrap();
    let config = json!({
        "peft_type": "LORA", "base_model_name_or_path": teacher(), "r": 4, "lora_alpha": 4, "adapted_tokens": "drafts"
    });
    fs::write(Path::new(&adapters).join("adapter_config.json"), config.to_string()).unwrap();
    let settings = [format!("model={adapters}"), format!("prompts={}", prompt_set()), format!("output={output}")];
    let error = run_error(&["collect", &settings[0], &settings[1], &settings[2]], 2);
    assert!(error.contains(&format!("set model={}, the model", teacher())), "{error}");
    assert!(!Path::new(&output).exists());
}

#[test]
fn the_same_seed_gives_the_same_files_whatever_the_batch_size_and_after_a_stop() {
    let dir = tempfile::tempdir().unwrap();
    let (once, again, other) = (path(dir.path(), "a"), path(dir.path(), "b"), path(dir.path(), "c"));
    let summary = collect(&once, &["batch_size=64"]);
    assert_eq!(
        (&summary["prompts"], &summary["resumed"], &summary["total"]["rows"]),
        (&json!(24), &json!(0), &json!(24))
    );
    collect(&again, &["batch_size=5"]);
    assert_eq!(shards(&once), shards(&again));
    let manifest = fs::read(Path::new(&again).join("manifest.json")).unwrap();
    // As if killed after the first shard: the second is cut off, the third was never written.
    let second = Path::new(&again).join("data/part-00001.parquet");
    fs::write(&second, &fs::read(&second).unwrap()[..300]).unwrap();
    fs::remove_file(Path::new(&again).join("data/part-00002.parquet")).unwrap();
    let resumed = collect(&again, &[]);
    // The forwards of earlier rows are derived from their states, so the total is that of a run
    // without a stop.
    assert_eq!((&resumed["resumed"], &resumed["total"]), (&json!(8), &summary["total"]));
    assert_eq!((&resumed["run"]["rows"], &summary["run"]["rows"]), (&json!(16), &json!(24)));
    assert_eq!(shards(&once), shards(&again));
    assert_eq!(manifest, fs::read(Path::new(&again).join("manifest.json")).unwrap());
    collect(&other, &["seed=1"]);
    assert_ne!(shards(&once), shards(&other));
    let prompts = prompt_set::read(Path::new(&prompt_set())).unwrap();
    let ids = |rows: Vec<Trajectory>| rows.into_iter().map(|row| row.sample_id).collect::<Vec<_>>();
    assert_eq!(ids(rows(&once)), prompts.into_iter().map(|sample| sample.id).collect::<Vec<_>>());
    run(&["validate", &once]).success();
    let stats = run_json(&["stats", &once, "--json"]);
    for key in ["rows", "unfinished", "response_tokens", "blocks", "tokens_per_forward"] {
        assert_eq!(stats[key], summary["total"][key], "{key}");
    }
    assert!(fs::read_to_string(Path::new(&once).join("README.md")).unwrap().starts_with("---\n"));
}

#[test]
fn the_same_seed_gives_the_same_file_for_every_family() {
    for (name, mut config) in cllm_testing::families::shapes() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        fs::create_dir(&model).unwrap();
        config["vocab_size"] = 300.into();
        config["max_position_embeddings"] = 400.into();
        let random = cllm_testing::families::random_model(&config, 5);
        checkpoint::save(&random, &model, tch::Kind::Float).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            fs::copy(Path::new(&teacher()).join(file), model.join(file)).unwrap();
        }
        let model = format!("model={}", model.display());
        let file = |folder: &str, more: &str| {
            let folder = path(dir.path(), folder);
            collect(&folder, &[model.as_str(), "limit=6", more]);
            fs::read(shard(&folder, 0)).unwrap()
        };
        let once = file("a", "batch_size=64");
        assert!(once == file("b", "batch_size=64"), "{name}");
        assert!(once == file("c", "batch_size=5"), "{name}: another batch size");
        assert!(once != file("d", "seed=1"), "{name}: another seed");
    }
}

#[test]
fn the_name_of_the_prompt_file_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (renamed, output) = (path(dir.path(), "renamed.jsonl"), path(dir.path(), "a"));
    fs::copy(prompt_set(), &renamed).unwrap();
    collect(&output, &["limit=4"]);
    let before = fs::read(shard(&output, 0)).unwrap();
    collect(&output, &["limit=4", &format!("prompts={renamed}")]);
    assert_eq!(fs::read(shard(&output, 0)).unwrap(), before);
    let other = path(dir.path(), "b");
    collect(&other, &["limit=4", &format!("prompts={renamed}")]);
    assert_eq!(fs::read(shard(&other, 0)).unwrap(), before);
}

#[test]
fn resuming_with_other_settings_names_the_field() {
    let dir = tempfile::tempdir().unwrap();
    let output = path(dir.path(), "a");
    collect(&output, &["limit=2"]);
    let model = format!("model={}", teacher());
    let prompts = format!("prompts={}", prompt_set());
    let output = format!("output={output}");
    let said = run_error(&["collect", &model, &prompts, &output, "n=4", "device=cpu", "limit=2"], 2);
    assert!(said.contains("was started with n=8; this command says 4"), "{said}");
    let said = run_error(&["collect", &model, &prompts, &output, "batch_row=4"], 2);
    assert!(said.contains("did you mean `batch_size`"), "{said}");
}

#[test]
fn prompts_too_long_for_the_context_are_skipped() {
    let dir = tempfile::tempdir().unwrap();
    let (prompts, output) = (path(dir.path(), "p.jsonl"), path(dir.path(), "a"));
    let row = |id: &str, text: String| json!({ "id": id, "source": "jsonl/train", "prompt": text }).to_string() + "\n";
    fs::write(&prompts, row("long", "apples ".repeat(400)) + &row("short", "3+4".to_owned())).unwrap();
    let summary = collect(&output, &[&format!("prompts={prompts}")]);
    assert_eq!(
        (&summary["prompts"], &summary["total"]["rows"], &summary["skipped"]),
        (&json!(2), &json!(1), &json!(1))
    );
    assert!(fs::read_to_string(Path::new(&output).join("skipped.jsonl")).unwrap().contains("\"long\""));
}
