//! `export` and `import`: files of the reference implementation.

use std::fs;

use cllm_core::trajectory::FinishReason;
use cllm_testing::programs::path;
use serde_json::{Value, json};

use crate::fixtures::{collect, rows, run, run_error, teacher};

#[test]
fn exported_rows_can_be_imported_again() {
    let dir = tempfile::tempdir().unwrap();
    let (data, file, back) = (path(dir.path(), "a"), path(dir.path(), "a.json"), path(dir.path(), "b"));
    collect(&data, &["limit=5"]);
    run(&["export", &data, "--output", &file]).success();
    let model = teacher();
    run(&["import", &file, "--model", &model, "--output", &back]).success();
    assert_eq!(rows(&data), rows(&back));
    fs::write(&file, "[{\"data_id\": 3}]").unwrap();
    let said = run_error(&["import", &file, "--model", &model, "--output", &path(dir.path(), "c")], 2);
    assert!(said.contains("a.json"), "{said}");
}

#[test]
fn files_of_the_reference_implementation_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let (file, output) = (path(dir.path(), "r.json"), path(dir.path(), "a"));
    // As it writes them: the first prompt is nested once more than the others, blocks continue
    // after EOS, and cleaning has removed single blocks.
    let record = |id: &str, block: usize, prompt: Value, states: Value| {
        json!({ "data_id": id, "jacobian_itr_id": format!("itr_{block}"), "prompt_ids_len": [2], "prompt_ids": prompt,
            "answer_trajectory_ids": states, "teacher_output_ids": [[0]] })
    };
    let records = json!([
        record("data_0", 0, json!([[[7, 8]]]), json!([[9, 9], [5, 6]])),
        record("data_0", 1, json!([[7, 8, 5, 6]]), json!([[9, 9], [0, 33]])),
        record("data_1", 1, json!([[7, 8, 5, 6]]), json!([[5, 6]])),
        record("data_2", 0, json!([[[7, 9]]]), json!([[5, 6]])),
        record("data_2", 2, json!([[7, 9, 5, 6, 5, 6]]), json!([[5, 6]])),
    ]);
    fs::write(&file, records.to_string()).unwrap();
    run(&["import", &file, "--model", &teacher(), "--output", &output]).success();
    let imported = rows(&output);
    assert_eq!(imported.iter().map(|row| row.response_ids.clone()).collect::<Vec<_>>(), [vec![5, 6, 0], vec![5, 6]]);
    assert_eq!(imported[0].finish_reason, FinishReason::Eos);
    assert_eq!(imported[0].prompt_ids, [7, 8]);
}
