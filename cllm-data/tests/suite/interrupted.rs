//! Signals: a stopped collection keeps its answers, and the same command resumes it.

use std::fs;
use std::path::Path;

use cllm_core::trajectory::{Reader, Writer};
use cllm_testing::programs::path;
use serde_json::{Value, json};

use crate::fixtures::{DATA, collect, rows, shard, teacher};

#[test]
fn a_collection_stopped_within_a_shard_keeps_its_answers() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, stopped) = (path(dir.path(), "whole"), path(dir.path(), "stopped"));
    collect(&whole, &[]);
    collect(&stopped, &["rows_per_shard=24"]);
    // The state that a signal leaves: no shard, but seven of its rows in the partial file.
    let mut kept = rows(&stopped);
    kept.rotate_left(10);
    kept.truncate(7);
    let provenance = Reader::open(Path::new(&stopped)).unwrap().provenance().clone();
    fs::remove_dir_all(&stopped).unwrap();
    Writer::open(Path::new(&stopped), provenance).unwrap().save_partial_rows(&kept).unwrap();
    assert_eq!(collect(&stopped, &["rows_per_shard=24", "batch_size=5"])["resumed"], 7);
    assert_eq!(rows(&stopped), rows(&whole));
    assert!(!Path::new(&stopped).join("stopped.partial").exists());
}

#[test]
fn verbs_that_only_read_or_prepare_stop_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let (data, prompts) = (path(dir.path(), "data"), path(dir.path(), "prompts.jsonl"));
    let at_once = || true;
    DATA.interrupt(&["prepare", "synthetic", "--num-problems", "9000000", "--output", &prompts], "INT", 130, at_once);
    assert!(!Path::new(&prompts).exists());
    // Reading one shard that is there under many names takes long.
    collect(&data, &["limit=8"]);
    let manifest = Path::new(&data).join("manifest.json");
    let mut contents: Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    let listed = contents["shards"][0].clone();
    let names = (0..20_000).map(|index| format!("data/part-{index:05}.parquet"));
    contents["shards"] = names.map(|name| json!([name, listed[1], listed[2]])).collect();
    (1..20_000).for_each(|index| fs::hard_link(shard(&data, 0), shard(&data, index)).unwrap());
    fs::write(&manifest, contents.to_string()).unwrap();
    DATA.interrupt(&["validate", &data], "INT", 130, at_once);
    DATA.interrupt(&["stats", &data], "TERM", 143, at_once);
}

#[test]
fn an_incomplete_data_set_can_be_described_but_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let (data, output, model) = (path(dir.path(), "data"), path(dir.path(), "output"), teacher());
    collect(&data, &[]);
    let manifest = Path::new(&data).join("manifest.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace("\"complete\": true", "\"complete\": false")).unwrap();
    let (input, into, model) = (format!("input={data}"), format!("output={output}"), format!("model={model}"));
    let said = ["data: is not complete", "run the same command"];
    for verb in [&["augment", &input, &into][..], &["clean", &input, &into, &model], &["export", &data, "-o", &output]]
    {
        DATA.fail(verb, 2, &said);
    }
    assert!(!Path::new(&output).exists());
    let stats = DATA.succeed(&["stats", &data]);
    assert!(stats.stderr.contains("is not complete"), "{}", stats.stderr);
    DATA.succeed(&["inspect", &data]);
    let finished = DATA.run(&["validate", &data]);
    let text = String::from_utf8(finished.stdout).unwrap();
    assert!(finished.code == Some(1) && text.contains("is not complete") && text.contains("1 violation"), "{text}");
    // A single shard is always complete.
    DATA.succeed(&["validate", &shard(&data, 0).display().to_string()]);
}

#[test]
fn a_collection_stopped_twice_equals_one_that_was_not_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = path(dir.path(), "prompts.jsonl");
    DATA.succeed(&["prepare", "synthetic", "--num-problems", "60", "--output", &prompts]);
    let (whole, stopped) = (path(dir.path(), "whole"), path(dir.path(), "stopped"));
    let (model, prompts) = (format!("model={}", teacher()), format!("prompts={prompts}"));
    let (into_whole, into_stopped) = (format!("output={whole}"), format!("output={stopped}"));
    let arguments =
        ["collect", "n=8", "max_new_tokens=40", "device=cpu", "rows_per_shard=2", "batch_size=2", &model, &prompts];
    let once = [&arguments[..], &[&into_whole]].concat();
    let again = [&arguments[..], &[&into_stopped]].concat();
    let shard = |index| shard(&stopped, index);
    DATA.interrupt(&again, "INT", 130, || shard(1).exists());
    let kept = fs::read(shard(0)).unwrap();
    DATA.interrupt(&again, "TERM", 143, || shard(6).exists());
    assert!(Path::new(&stopped).join("stopped.partial").exists());
    assert!(!shard(29).exists(), "it was stopped midway");
    DATA.succeed(&again);
    assert_eq!(fs::read(shard(0)).unwrap(), kept);
    DATA.succeed(&once);
    assert_eq!(rows(&stopped), rows(&whole));
    for inside in ["", "data"] {
        let (whole, stopped) = (Path::new(&whole).join(inside), Path::new(&stopped).join(inside));
        for name in fs::read_dir(&whole).unwrap().map(|entry| entry.unwrap().file_name()).filter(|name| *name != "data")
        {
            assert!(fs::read(whole.join(&name)).unwrap() == fs::read(stopped.join(&name)).unwrap(), "{name:?}");
        }
        assert_eq!(fs::read_dir(&whole).unwrap().count(), fs::read_dir(&stopped).unwrap().count());
    }
}
