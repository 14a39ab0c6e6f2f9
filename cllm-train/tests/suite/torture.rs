//! Runs that are stopped at any of their operations on files train the same models.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use cllm_testing::torture::{files_below, torture};
use cllm_train::settings::Settings;
use serde_json::Value;

use crate::rounds::{outputs, write_settings};
use crate::setup::{TRAIN, prepare, reproducible_metrics, settings_file, sft};

#[test]
fn stopped_anywhere_a_run_trains_the_same_model() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings { max_steps: Some(8), save_every: Some(2), max_checkpoints: 2, ..sft(dir.path(), "run") };
    let arguments = ["run".to_owned(), "-c".to_owned(), settings_file(dir.path(), &settings)];
    let outcome = |run: &Path| -> (Vec<Value>, BTreeMap<PathBuf, Vec<u8>>) {
        (reproducible_metrics(run), files_below(&run.join("final")))
    };
    torture(&TRAIN, &arguments, &settings.output, outcome);
}

#[test]
fn stopped_anywhere_rounds_make_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let file = write_settings(dir.path());
    let arguments = ["rounds", "-c", &file, "train.epochs=2", "train.save_every=2"].map(str::to_owned);
    torture(&TRAIN, &arguments, &dir.path().join("rounds"), outputs);
}
