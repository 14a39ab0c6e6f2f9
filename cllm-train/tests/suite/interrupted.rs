//! Signals and full disks: a run that was stopped keeps its steps, and the same command goes on to the same weights.

use std::fs;
use std::path::Path;

use cllm_train::settings::Settings;

use crate::runs::{prepare, sft};
use cllm_testing::programs::{Program, path};

const TRAIN: Program = Program("cllm-train");

/// Steps of metrics.jsonl.
fn lines(run: &Path) -> usize {
    fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default().lines().count()
}

/// What metrics.jsonl says, times aside.
fn course(run: &Path) -> Vec<String> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut value: serde_json::Value = serde_json::from_str(line).unwrap();
        let fields = value.as_object_mut().unwrap();
        fields.retain(|name, _| !name.contains("second"));
        value.to_string()
    };
    text.lines().map(line).collect()
}

fn same_model(a: &Path, b: &Path) {
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        assert!(
            fs::read(a.join("final").join(name)).unwrap() == fs::read(b.join("final").join(name)).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn a_run_that_was_stopped_and_met_a_full_disk_equals_one_that_was_not() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings {
        epochs: 1000,
        max_steps: Some(400),
        save_every: None,
        max_checkpoints: 1,
        ..sft(dir.path(), "stopped")
    };
    let file = path(dir.path(), "run.yaml");
    fs::write(&file, cllm_core::settings::to_yaml(&settings).unwrap()).unwrap();
    let (stopped, whole) = (dir.path().join("stopped"), dir.path().join("whole"));
    let arguments = ["run", "-c", &file];
    TRAIN.interrupt(&arguments, "INT", 130, || lines(&stopped) >= 3);
    let state = || fs::read_to_string(stopped.join("checkpoints/latest/state.json")).unwrap();
    let after_first = lines(&stopped);
    assert!(state().contains(&format!("\"step\": {after_first},")), "{after_first}: {}", state());
    TRAIN.interrupt(&arguments, "TERM", 143, || lines(&stopped) >= after_first + 3);
    let after_second = lines(&stopped);
    assert!(after_first < after_second && after_second < 400, "{after_first}, {after_second}");
    assert!(state().contains(&format!("\"step\": {after_second},")), "{after_second}: {}", state());
    // What comes next does not fit on the disk; the last checkpoint stays.
    TRAIN.fail_on_full_disk(64, &arguments, &["stopped/"]);
    assert!(state().contains(&format!("\"step\": {after_second},")), "{after_second}: {}", state());
    assert!(!stopped.join("final").exists());
    let resumed = TRAIN.succeed(&arguments);
    assert!(resumed.stderr.contains(&format!("going on after step {after_second}")), "{}", resumed.stderr);
    TRAIN.succeed(&["run", "-c", &file, &format!("output={}", whole.display())]);
    assert_eq!(course(&stopped), course(&whole));
    same_model(&stopped, &whole);
    // A model that does not fit is not there in part.
    let exported = path(dir.path(), "exported");
    TRAIN.fail_on_full_disk(
        16,
        &["export", &path(&whole, "final"), "--output", &exported],
        &["exported/model.safetensors"],
    );
    assert!(!Path::new(&exported).exists());
    // Done is done: the same command once more changes nothing.
    TRAIN.succeed(&arguments);
    same_model(&stopped, &whole);
}

#[test]
fn a_damaged_checkpoint_is_named_and_without_it_the_one_before_serves() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings { max_steps: Some(6), save_every: Some(2), ..sft(dir.path(), "run") };
    let file = path(dir.path(), "run.yaml");
    fs::write(&file, cllm_core::settings::to_yaml(&settings).unwrap()).unwrap();
    let (run, whole) = (dir.path().join("run"), dir.path().join("whole"));
    let arguments = ["run", "-c", &file];
    TRAIN.succeed(&["run", "-c", &file, &format!("output={}", whole.display())]);
    TRAIN.succeed(&arguments);
    fs::remove_dir_all(run.join("final")).unwrap();
    fs::remove_file(run.join("summary.json")).unwrap();
    let newest = run.join("checkpoints/step-000006");
    for name in ["optimizer.safetensors", "state.json"] {
        let bytes = fs::read(newest.join(name)).unwrap();
        fs::write(newest.join(name), &bytes[..bytes.len() / 2]).unwrap();
        let advice = ["delete ", "step-000006 to go on from the checkpoint before it"];
        TRAIN.fail(&arguments, 2, &[&[name, "no whole training state"], &advice[..]].concat());
    }
    fs::remove_dir_all(&newest).unwrap();
    // As a kill leaves it in the middle of two saves: one half written, one about to take the place of another.
    fs::create_dir(run.join("checkpoints/.writing-abc")).unwrap();
    fs::write(run.join(".writing-def"), "half").unwrap();
    fs::remove_file(run.join("checkpoints/latest")).unwrap();
    fs::rename(run.join("checkpoints/step-000004"), run.join("checkpoints/.old-77-step-000004")).unwrap();
    let resumed = TRAIN.succeed(&arguments);
    assert!(resumed.stderr.contains("going on after step 4"), "{}", resumed.stderr);
    for folder in [&run, &run.join("checkpoints")] {
        let mut names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(names.all(|name| !name.to_string_lossy().starts_with('.')), "nothing half-written stays");
    }
    assert_eq!(course(&run), course(&whole));
    same_model(&run, &whole);
}
