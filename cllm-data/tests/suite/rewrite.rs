//! Rewriting data sets: the order of the rows, and the same files on any number of cores and after
//! a kill.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use cllm_core::trajectory::{Trajectory, Writer};
use cllm_testing::programs::path;
use serde_json::Value;

use crate::fixtures::{provenance, row, rows, run, teacher};

/// Writes 3,000 rows in shards of 700. Every seventh is unfinished, every eleventh has the prompt
/// of the row before it.
fn write_many_rows() -> (tempfile::TempDir, Vec<Trajectory>) {
    let mut rows: Vec<Trajectory> = Vec::new();
    for index in 0..3000 {
        let answer: Vec<i32> = (0..7).map(|at| 20 + (index * 7 + at * 13) % 200).chain([0]).collect();
        let mut next = row(&format!("row-{index}"), if index % 7 == 0 { &answer[..7] } else { &answer });
        if index % 11 == 10 {
            next.prompt_ids = rows[rows.len() - 1].prompt_ids.clone();
        }
        rows.push(next);
    }
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(&dir.path().join("raw"), provenance()).unwrap();
    rows.chunks(700).for_each(|shard| writer.write_shard(shard).unwrap());
    writer.finish().unwrap();
    (dir, rows)
}

/// The files of a data set except its settings, which name the folder.
fn files(folder: &str) -> BTreeMap<String, Vec<u8>> {
    let entries = |inside: &str| fs::read_dir(Path::new(folder).join(inside)).unwrap().map(Result::unwrap);
    let named = |inside: &str, entry: fs::DirEntry| {
        (format!("{inside}{}", entry.file_name().into_string().unwrap()), fs::read(entry.path()).unwrap())
    };
    let shards = entries("data").map(|entry| named("data/", entry));
    let beside = entries("").filter(|entry| entry.path().is_file()).map(|entry| named("", entry));
    let mut files: BTreeMap<_, _> = shards.chain(beside).collect();
    let settings = String::from_utf8(files.remove("config.yaml").unwrap()).unwrap();
    assert!(settings.contains(&format!("output: {folder}")) && settings.contains("input: "), "{settings}");
    files
}

#[test]
fn kept_and_dropped_rows_are_in_order_on_any_number_of_cores() {
    let (dir, all) = write_many_rows();
    let (input, model) = (format!("input={}", path(dir.path(), "raw")), format!("model={}", teacher()));
    let clean = |name: &str, threads: &str| {
        let output = path(dir.path(), name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_cllm-data"));
        command.args(["--quiet", "clean", &input, &model, &format!("output={output}"), "keep_dropped=true"]);
        assert!(command.env("RAYON_NUM_THREADS", threads).status().unwrap().success());
        output
    };
    let (one, four) = (clean("one", "1"), clean("four", "4"));
    assert!(files(&one) == files(&four));
    // A row with the prompt of a dropped row is not a duplicate.
    let unfinished = |index: usize| index.is_multiple_of(7);
    let dropped = |index: usize| unfinished(index) || (index % 11 == 10 && !unfinished(index - 1));
    let (mut dropped_rows, kept): (Vec<_>, Vec<_>) =
        all.into_iter().enumerate().partition(|(index, _)| dropped(*index));
    assert_eq!(rows(&one), kept.into_iter().map(|(_, row)| row).collect::<Vec<_>>());
    let lines = fs::read_to_string(Path::new(&one).join("dropped.jsonl")).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    for (line, (index, row)) in lines.zip(dropped_rows.drain(..)) {
        let rule = if unfinished(index) { "unfinished" } else { "duplicate" };
        assert_eq!((&line["row"]["sample_id"], &line["rule"]), (&row.sample_id.into(), &rule.into()));
    }
}

#[test]
fn after_a_kill_the_data_set_is_written_again_from_the_start() {
    let (dir, _) = write_many_rows();
    let (input, output) = (format!("input={}", path(dir.path(), "raw")), path(dir.path(), "augmented"));
    let into = format!("output={output}");
    run(&["augment", &input, &into]).success();
    let whole = files(&output);
    // The state that a kill leaves: one shard in the manifest, shards that the manifest does not
    // list, a half-written file, no card.
    let mut manifest: Value = serde_json::from_slice(&whole["manifest.json"]).unwrap();
    manifest["complete"] = false.into();
    manifest["shards"].as_array_mut().unwrap().truncate(1);
    let at = |name: &str| Path::new(&output).join(name);
    fs::write(at("manifest.json"), manifest.to_string()).unwrap();
    fs::write(at("data/part-00077.parquet"), "half").unwrap();
    fs::write(at(".writing-abc"), "half").unwrap();
    fs::remove_file(at("README.md")).unwrap();
    run(&["augment", &input, &into]).success();
    assert!(files(&output) == whole);
}
