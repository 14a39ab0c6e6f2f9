//! Verbs that are stopped at any of their operations on files make the same data sets.

use cllm_testing::programs::path;
use cllm_testing::torture::{files_below, torture};

use crate::fixtures::{DATA, prompt_set, row, teacher, write_data_set};

#[test]
fn stopped_anywhere_a_collection_resumes_to_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("output");
    let fixed = ["collect", "n=8", "max_new_tokens=20", "device=cpu", "rows_per_shard=4", "batch_size=3"];
    let paths =
        [format!("model={}", teacher()), format!("prompts={}", prompt_set()), format!("output={}", output.display())];
    torture(&DATA, &[&fixed.map(str::to_owned)[..], &paths].concat(), &output, files_below);
}

#[test]
fn stopped_anywhere_augment_and_clean_make_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let answers = (0..60).map(|index| row(&format!("row-{index}"), &[5, 6, 7, index % 90 + 1, 8, index % 7 + 20, 0]));
    let (data, output) = (write_data_set(&answers.collect::<Vec<_>>()), dir.path().join("output"));
    let (input, into, model) = (
        format!("input={}", path(data.path(), "")),
        format!("output={}", output.display()),
        format!("model={}", teacher()),
    );
    for verb in [vec!["augment", &input, &into], vec!["clean", &input, &into, &model, "keep_dropped=true"]] {
        let arguments: Vec<String> = verb.into_iter().map(str::to_owned).collect();
        torture(&DATA, &arguments, &output, files_below);
    }
}
