//! Files that are not as they were written: every flipped bit of a shard, and every manifest that no
//! run wrote.

use std::fs;
use std::path::Path;

use cllm_core::Error;
use cllm_core::trajectory::{Reader, Writer};
use cllm_testing::programs::{copy_folder, path};
use serde_json::{Value, json};

use crate::fixtures::{DATA, provenance, row, rows, run_text, write_data_set};

/// What is found wrong with a data set when all of it is read.
fn problem(folder: &Path) -> Option<Error> {
    let reader = Reader::open(folder).err();
    reader.or_else(|| Reader::open(folder).unwrap().rows().find_map(Result::err))
}

#[test]
fn every_flipped_bit_of_a_shard_is_found() {
    let rows: Vec<_> = (0..50).map(|index| row(&format!("row-{index}"), &[5, 6, 7, index % 90 + 1, 8, 0])).collect();
    let data = write_data_set(&rows);
    let shard = data.path().join("data/part-00000.parquet");
    let bytes = fs::read(&shard).unwrap();
    assert!(problem(data.path()).is_none());
    for flip in 0..120 {
        let mut damaged = bytes.clone();
        damaged[flip * bytes.len() / 120] ^= 1 << (flip % 8);
        fs::write(&shard, damaged).unwrap();
        let problem = problem(data.path()).unwrap_or_else(|| panic!("flip {flip} was not found")).to_string();
        assert!(problem.contains("part-00000.parquet"), "{problem}");
    }
    let mut damaged = bytes.clone();
    damaged[bytes.len() / 3] ^= 1;
    fs::write(&shard, damaged).unwrap();
    let folder = data.path().display().to_string();
    let validated = DATA.run(&["validate", &folder]);
    let text = String::from_utf8(validated.stdout).unwrap();
    assert_eq!(validated.code, Some(1), "{text}");
    assert!(text.contains("part-00000.parquet: is damaged, or was changed") && text.contains("1 violation"), "{text}");
    let output = path(data.path(), "exported.json");
    DATA.fail(&["export", &folder, "--output", &output], 2, &["part-00000.parquet: is damaged", "collect again"]);
    DATA.fail(&["stats", &shard.display().to_string()], 2, &["part-00000.parquet: is damaged"]);
    assert!(!Path::new(&output).exists());
}

#[test]
fn a_manifest_that_no_run_wrote_is_refused() {
    let (a, b) = (row("a", &[5, 6, 7, 0]), row("b", &[5, 6, 7, 0]));
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data set");
    let mut writer = Writer::open(&data, provenance()).unwrap();
    [a, b].into_iter().for_each(|row| writer.write_shard(&[row]).unwrap());
    writer.finish().unwrap();
    type Edit = fn(&mut Value);
    let edits: [(Edit, &[&str]); 10] = [
        (|manifest| manifest["schema_version"] = 99.into(), &["manifest.json", "schema version 99", "reads 1"]),
        (|manifest| manifest["provenance"]["n"] = 0.into(), &["manifest.json: says n=0"]),
        (|manifest| manifest["provenance"]["vocab_size"] = u64::MAX.into(), &["manifest.json: says vocab_size=1844"]),
        (
            |manifest| manifest["provenance"]["teacher"] = "other".into(),
            &["part-00000.parquet", "its teacher is another one"],
        ),
        (|manifest| drop(manifest["shards"].as_array_mut().unwrap().pop()), &["does not list", "part-00001.parquet"]),
        (|manifest| manifest["shards"][1][0] = "../part-00001.parquet".into(), &["`../part-00001", "outside"]),
        (|manifest| manifest["shards"][1][0] = "/tmp/part-00001.parquet".into(), &["`/tmp/part-00001", "outside"]),
        (|manifest| manifest["shards"][1][0] = manifest["shards"][0][0].clone(), &["data/part-00000.parquet` twice"]),
        (|manifest| manifest["shards"][1][1] = u64::MAX.into(), &["part-00001.parquet` has 18446744073709551615 rows"]),
        (|manifest| manifest["shards"][1][2] = "0".repeat(64).into(), &["part-00001.parquet: is damaged"]),
    ];
    let good: Value = serde_json::from_slice(&fs::read(data.join("manifest.json")).unwrap()).unwrap();
    for (edit, parts) in edits {
        let mut manifest = good.clone();
        edit(&mut manifest);
        fs::write(data.join("manifest.json"), manifest.to_string()).unwrap();
        DATA.fail(&["stats", &data.display().to_string()], 2, parts);
    }
}

#[test]
fn data_sets_without_checksums_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("old");
    copy_folder(write_data_set(&[row("a", &[5, 6, 7, 0])]).path(), &data);
    let manifest = data.join("manifest.json");
    let mut old: Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    assert_eq!(old["shards"][0].as_array().unwrap().len(), 3);
    old["shards"] = json!([["data/part-00000.parquet", 1]]);
    fs::write(&manifest, old.to_string()).unwrap();
    assert!(run_text(&["validate", &data.display().to_string()]).contains("0 violations"));
    assert_eq!(rows(&data.display().to_string()), [row("a", &[5, 6, 7, 0])]);
}

#[test]
fn damaged_rows_of_a_stopped_run_are_decoded_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut writer = Writer::open(dir.path(), provenance()).unwrap();
    writer.save_partial_rows(&[row("a", &[5, 6, 7, 0])]).unwrap();
    let resumed = || Writer::open(dir.path(), provenance()).unwrap().partial_rows();
    assert_eq!(resumed(), [row("a", &[5, 6, 7, 0])]);
    let partial = dir.path().join("stopped.partial");
    let mut bytes = fs::read(&partial).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle] ^= 1;
    fs::write(&partial, bytes).unwrap();
    assert_eq!(resumed(), []);
}
