//! `export` and `import`: files of the reference implementation.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use cllm_core::trajectory::{Block, FinishReason, Trajectory};
use cllm_testing::programs::path;
use serde_json::{Value, json};

use crate::fixtures::{N, collect, row, rows, run, run_error, teacher, write_data_set};

/// The files that make a data set.
fn files(folder: &str) -> BTreeMap<String, Vec<u8>> {
    let shards = fs::read_dir(Path::new(folder).join("data")).unwrap().map(|entry| entry.unwrap().path());
    let beside = ["manifest.json", "README.md"].map(|name| Path::new(folder).join(name));
    let files = shards.chain(beside).map(|file| (file.file_name().unwrap().to_string_lossy().into_owned(), file));
    files.map(|(name, file)| (name, fs::read(file).unwrap())).collect()
}

fn records(file: &str) -> Vec<Value> {
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

#[test]
fn export_then_import_is_the_identity_in_any_order_of_records() {
    let dir = tempfile::tempdir().unwrap();
    let (data, augmented) = (path(dir.path(), "a"), path(dir.path(), "augmented"));
    collect(&data, &[]);
    run(&["augment", &format!("input={data}"), &format!("output={augmented}")]).success();
    let reasons: Vec<_> = rows(&data).iter().map(|row| row.finish_reason).collect();
    assert!(reasons.contains(&FinishReason::Length), "{reasons:?}");
    for (index, data) in [data, augmented].iter().enumerate() {
        let at = |name: &str| path(dir.path(), &format!("{name}{index}"));
        let (file, back) = (at("file.json"), at("back"));
        run(&["export", data, "--output", &file]).success();
        run(&["import", &file, "--output", &back]).success();
        assert!(files(data) == files(&back));
        let mut shuffled = records(&file);
        shuffled.sort_by_key(|record| blake3::hash(record.to_string().as_bytes()).to_hex().to_string());
        fs::write(&file, json!(shuffled).to_string()).unwrap();
        let back = at("from-shuffled");
        run(&["import", &file, "--model", &teacher(), "--output", &back]).success();
        assert!(files(data) == files(&back));
    }
}

/// Rows with all that a row may have: an EOS that nothing verified after the limit, one state in a
/// block, flags, texts, two rows of one id.
fn varied_rows() -> Vec<Trajectory> {
    let mut cut = row("cut", &[5, 6, 7, 8, 5, 6]);
    cut.blocks[1].states[2] = vec![5, 6, 0, 7];
    let mut short = row("short", &[5, 0]);
    short.blocks = vec![Block { start: 0, states: vec![vec![5, 0, 3, 3]] }];
    let mut full = row("full", &[5, 6, 7, 0]);
    full.augmented = Some(vec![vec![true, false, false]]);
    full.reference = Some("ä \u{1F600}".to_owned());
    full.reference_ids = Some(vec![5, 0]);
    full.meta = Some(r#"{"db_id": "zoo"}"#.to_owned());
    full.source = "spider/train".to_owned();
    vec![cut, short.clone(), full, short, row("data_10", &[9, 0]), row("data_9", &[9, 0])]
}

#[test]
fn every_column_of_every_row_comes_back() {
    let dir = write_data_set(&varied_rows());
    let (data, file, back) = (path(dir.path(), ""), path(dir.path(), "a.json"), path(dir.path(), "back"));
    run(&["export", &data, "--output", &file]).success();
    run(&["import", &file, "--output", &back]).success();
    assert_eq!(rows(&back), varied_rows());
}

/// What `preprocess_distill_data` and the training step of the reference implementation need of a
/// record, in its own terms.
fn check_as_the_reference_loader(record: &Value) {
    let ids = |value: &Value| -> Vec<i64> { value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect() };
    let prompt = ids(&record["prompt_ids"][0]);
    let trajectory: Vec<Vec<i64>> = record["answer_trajectory_ids"]
        .as_array()
        .unwrap()
        .iter()
        .map(|state| [prompt.clone(), ids(state)].concat())
        .collect();
    // It pads nothing, compares states position by position, and draws one before the last.
    assert!(trajectory.len() >= 2 && trajectory.iter().all(|state| state.len() == prompt.len() + N));
    assert_eq!(trajectory.last(), Some(&ids(&record["teacher_output_ids"][0])));
    let complete = ids(&record["complete_teacher_output_ids"]);
    let common = complete.len().min(prompt.len() + N);
    assert_eq!(complete[..common], trajectory.last().unwrap()[..common]);
    // It would take labels of the data set's own answer for what the file calls `labels_ids`.
    assert!(record.get("labels_ids").is_none());
}

#[test]
fn exported_records_are_what_the_reference_loader_reads() {
    let dir = write_data_set(&varied_rows());
    let (data, file) = (path(dir.path(), ""), path(dir.path(), "a.json"));
    run(&["export", &data, "--output", &file]).success();
    let records = records(&file);
    assert_eq!(records.len(), 7);
    records.iter().for_each(check_as_the_reference_loader);
}

#[test]
fn a_file_that_belongs_elsewhere_is_refused() {
    let dir = write_data_set(&varied_rows());
    let (data, file, output) = (path(dir.path(), ""), path(dir.path(), "a.json"), path(dir.path(), "c"));
    let model = teacher();
    fs::write(&file, "[{\"data_id\": 3}]").unwrap();
    let said = run_error(&["import", &file, "--model", &model, "--output", &output], 2);
    assert!(said.contains("a.json"), "{said}");
    run(&["export", &data, "--output", &file]).success();
    let said = run_error(&["import", &file, "--model", &model, "--output", &output], 2);
    assert!(said.contains("another teacher") && said.contains("--model"), "{said}");
    let said = run_error(&["import", &file, "--max-new-tokens", "5", "--output", &output], 2);
    assert!(said.contains("400 tokens, not 5"), "{said}");
    let mut twice = records(&file);
    twice.push(twice[0].clone());
    fs::write(&file, json!(twice).to_string()).unwrap();
    let said = run_error(&["import", &file, "--output", &output], 2);
    assert!(said.contains("`cut`") && said.contains("two records itr_0"), "{said}");
}

/// A file as `generate_trajectory.py` writes it: the first prompt is nested once more than the
/// others, decoding goes on in whole blocks to EOS or over the limit, `complete_teacher_output_ids`
/// are those of the last block, and cleaning has removed single blocks.
#[test]
fn files_of_the_reference_implementation_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (file, output) = (path(dir.path(), "r.json"), path(dir.path(), "a"));
    let record = |id: &str, block: usize, prompt: Value, states: Value, complete: Value| {
        json!({ "data_id": id, "jacobian_itr_id": format!("itr_{block}"), "prompt_ids_len": [2], "prompt_ids": prompt,
            "answer_trajectory_ids": states, "labels_ids": [[7, 8, 5]], "teacher_output_ids": [[0]],
            "complete_teacher_output_ids": complete })
    };
    let records = json!([
        // It hit the limit of 5 tokens inside its third block.
        record("data_10", 0, json!([[[7, 8]]]), json!([[9, 9], [5, 6]]), json!([7, 8, 5, 6, 5, 6, 5, 0])),
        record("data_10", 2, json!([[7, 8, 5, 6, 5, 6]]), json!([[3, 3], [5, 0]]), json!([7, 8, 5, 6, 5, 6, 5, 0])),
        record("data_0", 1, json!([[7, 8, 5, 6]]), json!([[9, 9], [0, 33]]), json!([7, 8, 5, 6, 0, 33])),
        record("data_1", 1, json!([[7, 8, 5, 6]]), json!([[5, 6]]), json!([7, 8, 5, 6, 5, 6])),
        record("data_10", 1, json!([[7, 8, 5, 6]]), json!([[5, 6]]), json!([7, 8, 5, 6, 5, 6, 5, 0])),
        record("data_2", 0, json!([[[7, 9]]]), json!([[5, 6]]), json!([7, 9, 5, 6, 5, 6, 5, 6])),
        record("data_2", 2, json!([[7, 9, 5, 6, 5, 6]]), json!([[5, 6]]), json!([7, 9, 5, 6, 5, 6, 5, 6])),
        record("data_0", 0, json!([[[7, 8]]]), json!([[9, 9], [5, 6]]), json!([7, 8, 5, 6, 0, 33])),
    ]);
    fs::write(&file, records.to_string()).unwrap();
    let said = run_error(&["import", &file, "--output", &output], 2);
    assert!(said.contains("--model"), "{said}");
    run(&["import", &file, "--model", &teacher(), "--output", &output, "--max-new-tokens", "5"]).success();
    let imported = rows(&output);
    let responses: Vec<_> = imported.iter().map(|row| (row.sample_id.as_str(), &row.response_ids[..])).collect();
    assert_eq!(responses, [("data_0", &[5, 6, 0][..]), ("data_2", &[5, 6]), ("data_10", &[5, 6, 5, 6, 5])]);
    let reasons: Vec<_> = imported.iter().map(|row| row.finish_reason).collect();
    assert_eq!(reasons, [FinishReason::Eos, FinishReason::Length, FinishReason::Length]);
    assert_eq!(imported[0].prompt_ids, [7, 8]);
}
