//! Signals and full disks: an interrupted run keeps its steps, and the same command resumes to the
//! same weights.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use cllm_train::settings::Settings;
use serde_json::{Value, json};

use crate::setup::{
    TRAIN, assert_checkpoints_are_whole, num_metrics, prepare, reproducible_metrics, rewind_to, settings_file, sft,
    trained_teacher, wait_for_a_save,
};
use cllm_testing::programs::path;

fn assert_same_final_model(a: &Path, b: &Path) {
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        let [a, b] = [a, b].map(|run| fs::read(run.join("final").join(name)).unwrap());
        assert!(a == b, "{name} differs");
    }
}

#[test]
fn a_run_that_met_signals_and_a_full_disk_equals_one_that_did_not() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings {
        epochs: 1000,
        max_steps: Some(400),
        save_every: None,
        max_checkpoints: 1,
        ..sft(dir.path(), "interrupted")
    };
    let file = settings_file(dir.path(), &settings);
    let (interrupted, whole) = (dir.path().join("interrupted"), dir.path().join("whole"));
    let arguments = ["run", "-c", &file];
    let assert_saved = |steps: usize| {
        let state = fs::read_to_string(interrupted.join("checkpoints/latest/state.json")).unwrap();
        assert!(state.contains(&format!("\"step\": {steps},")), "{steps}: {state}");
    };
    TRAIN.interrupt(&arguments, "INT", 130, || num_metrics(&interrupted) >= 3);
    let first_steps = num_metrics(&interrupted);
    assert_saved(first_steps);
    TRAIN.interrupt(&arguments, "TERM", 143, || num_metrics(&interrupted) >= first_steps + 3);
    let steps = num_metrics(&interrupted);
    assert!(first_steps < steps && steps < 400, "{first_steps}, {steps}");
    assert_saved(steps);
    // The next checkpoint does not fit on the disk, so the last one stays.
    TRAIN.fail_on_full_disk(64, &arguments, &["interrupted/"]);
    assert_saved(steps);
    assert!(!interrupted.join("final").exists());
    let resumed = TRAIN.succeed(&arguments);
    assert!(resumed.stderr.contains(&format!("resuming after step {steps}")), "{}", resumed.stderr);
    TRAIN.succeed(&["run", "-c", &file, &format!("output={}", whole.display())]);
    assert_eq!(reproducible_metrics(&interrupted), reproducible_metrics(&whole));
    assert_same_final_model(&interrupted, &whole);
    // If an exported model does not fit on the disk, no part of it is left.
    let exported = path(dir.path(), "exported");
    let export = ["export", &path(&whole, "final"), "--output", &exported];
    TRAIN.fail_on_full_disk(16, &export, &["exported/model.safetensors"]);
    assert!(!Path::new(&exported).exists());
    let of_run = ["export", &whole.display().to_string(), "--output", &exported];
    TRAIN.fail(&of_run, 2, &["is the folder of a run, not a model: name ", "whole/final or one of "]);
    // A flipped bit of a weight is found before it is exported.
    let weights = whole.join("final/model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    let mut flipped = bytes.clone();
    flipped[bytes.len() - 100] ^= 1;
    fs::write(&weights, flipped).unwrap();
    TRAIN.fail(&export, 2, &["final/model.safetensors: is damaged, or was changed", "copy the folder again"]);
    fs::write(&weights, bytes).unwrap();
    // The same command again changes nothing.
    let complete = TRAIN.succeed(&arguments);
    assert!(complete.stderr.contains("already complete: 400 steps"), "{}", complete.stderr);
    assert_same_final_model(&interrupted, &whole);
}

#[test]
fn a_full_disk_says_whether_there_is_a_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings { max_steps: Some(2), save_every: Some(1), ..sft(dir.path(), "run") };
    let file = settings_file(dir.path(), &settings);
    let without = ["run", "-c", &file, "save_every=0"];
    TRAIN.fail_on_full_disk(64, &without, &["run/final/model.safetensors", "the run starts over"]);
    TRAIN.succeed(&["run", "-c", &file]);
    rewind_to(&settings.output, 1);
    TRAIN.fail_on_full_disk(64, &["run", "-c", &file], &["command again; the last checkpoint is kept"]);
}

#[test]
fn a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before_it() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings {
        epochs: 1000,
        max_steps: Some(8),
        save_every: Some(3),
        max_checkpoints: 1,
        ..sft(dir.path(), "run")
    };
    let file = settings_file(dir.path(), &settings);
    let arguments = ["run", "-c", &file];
    let (run, whole) = (dir.path().join("run"), dir.path().join("whole"));
    TRAIN.succeed(&["run", "-c", &file, &format!("output={}", whole.display())]);
    TRAIN.succeed(&["run", "-c", &file, "max_checkpoints=3"]);
    let checkpoints = run.join("checkpoints");
    for later in ["step-000006", "step-000008"] {
        fs::remove_dir_all(checkpoints.join(later)).unwrap();
    }
    rewind_to(&run, 3);
    // A checkpoint is written while training goes on, and the next step or the end meets the error.
    for _ in 0..2 {
        TRAIN.fail_on_full_disk(64, &arguments, &["run/checkpoints/step-000006/"]);
        assert_eq!(fs::canonicalize(checkpoints.join("latest")).unwrap(), checkpoints.join("step-000003"));
        assert_checkpoints_are_whole(&run, 1);
        let mut names: Vec<_> = fs::read_dir(&checkpoints).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["latest", "step-000003"], "nothing of the checkpoint is left");
    }
    let resumed = TRAIN.succeed(&arguments);
    assert!(resumed.stderr.contains("resuming after step 3"), "{}", resumed.stderr);
    assert_eq!(reproducible_metrics(&run), reproducible_metrics(&whole));
    assert_same_final_model(&run, &whole);
}

#[test]
fn a_run_killed_at_twenty_moments_of_its_saves_resumes_to_the_same_curve() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings {
        epochs: 1000,
        // More than a busy machine lets it take between two looks at it.
        max_steps: Some(500),
        save_every: Some(1),
        max_checkpoints: 2,
        ..sft(dir.path(), "run")
    };
    let file = settings_file(dir.path(), &settings);
    let (run, whole) = (dir.path().join("run"), dir.path().join("whole"));
    TRAIN.succeed(&["run", "-c", &file, "save_every=null", &format!("output={}", whole.display())]);
    for kill in 0..20 {
        let mut child = TRAIN.command(&[]).args(["run", "-c", &file]).stderr(Stdio::piped()).spawn().unwrap();
        wait_for_a_save(&run, kill, &mut child);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_checkpoints_are_whole(&run, 1);
    }
    TRAIN.succeed(&["run", "-c", &file, "save_every=100"]);
    assert_eq!(reproducible_metrics(&run), reproducible_metrics(&whole));
    assert_same_final_model(&run, &whole);
}

#[test]
fn a_run_killed_after_it_resumed_in_a_validation_resumes_again() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut settings = Settings {
        init: None,
        model: Some(trained_teacher(dir.path()).display().to_string()),
        epochs: 1000,
        max_steps: Some(500),
        save_every: None,
        ..sft(dir.path(), "run")
    };
    settings.optimizer.lr = 1e-6;
    settings.validation.prompts = Some(dir.path().join("prompts.jsonl"));
    settings.validation.every = 1;
    settings.validation.max_new_tokens = 20;
    let arguments = ["run", "-c", &settings_file(dir.path(), &settings)];
    let (run, checkpoints) = (&settings.output, settings.output.join("checkpoints"));
    TRAIN.interrupt(&arguments, "INT", 130, || num_metrics(run) >= 3);
    // As if the signal had come during a validation that finds the best model so far.
    let latest = fs::canonicalize(checkpoints.join("latest")).unwrap();
    let mut state: Value = serde_json::from_slice(&fs::read(latest.join("state.json")).unwrap()).unwrap();
    state["validation"] =
        json!({ "last_step": null, "initial": null, "last": null, "best": null, "num_without_best": 0 });
    state.as_object_mut().unwrap().remove("checksum");
    fs::write(latest.join("state.json"), state.to_string()).unwrap();
    fs::remove_file(latest.join("checksums.json")).unwrap();
    let best = checkpoints.join("best");
    let _ = fs::remove_file(&best);
    let mut resumed = TRAIN.command(&[]).args(arguments).stderr(Stdio::null()).spawn().unwrap();
    while !best.exists() {
        assert!(resumed.try_wait().unwrap().is_none(), "the run ended before it could be killed");
        std::thread::yield_now();
    }
    resumed.kill().unwrap();
    resumed.wait().unwrap();
    assert_eq!(fs::canonicalize(&best).unwrap(), latest);
    let num_before = num_metrics(run);
    TRAIN.interrupt(&arguments, "TERM", 143, || num_metrics(run) >= num_before + 3);
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_serves() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings { max_steps: Some(6), save_every: Some(2), ..sft(dir.path(), "run") };
    let file = settings_file(dir.path(), &settings);
    let (run, whole) = (dir.path().join("run"), dir.path().join("whole"));
    let arguments = ["run", "-c", &file];
    TRAIN.succeed(&["run", "-c", &file, &format!("output={}", whole.display())]);
    TRAIN.succeed(&arguments);
    fs::remove_dir_all(run.join("final")).unwrap();
    fs::remove_file(run.join("summary.json")).unwrap();
    let newest = run.join("checkpoints/step-000006");
    let advice = "step-000006 to resume from the checkpoint before it";
    for name in ["model.safetensors", "optimizer-00001-of-00001.safetensors", "state.json", "tokenizer.json"] {
        let bytes = fs::read(newest.join(name)).unwrap();
        fs::write(newest.join(name), &bytes[..bytes.len() / 2]).unwrap();
        TRAIN.fail(&arguments, 2, &[name, "is damaged", "delete ", advice]);
        fs::write(newest.join(name), bytes).unwrap();
    }
    // Numbers that are as good as any other: only the checksum tells.
    for (name, at) in [("model.safetensors", 0.9), ("optimizer-00001-of-00001.safetensors", 0.5)] {
        let bytes = fs::read(newest.join(name)).unwrap();
        let mut flipped = bytes.clone();
        flipped[(at * bytes.len() as f64) as usize] ^= 1;
        fs::write(newest.join(name), flipped).unwrap();
        TRAIN.fail(&arguments, 2, &[name, "checksums.json has another checksum", "delete ", advice]);
        fs::write(newest.join(name), bytes).unwrap();
    }
    let state = fs::read_to_string(newest.join("state.json")).unwrap();
    fs::write(newest.join("state.json"), state.replace("\"step\": 6", "\"step\": 5")).unwrap();
    TRAIN.fail(&arguments, 2, &["state.json: is damaged: delete ", advice]);
    fs::write(newest.join("state.json"), state).unwrap();
    // One of two processes wrote the other half.
    let half = newest.join("optimizer-00002-of-00002.safetensors");
    fs::rename(newest.join("optimizer-00001-of-00001.safetensors"), half).unwrap();
    TRAIN.fail(&arguments, 2, &["optimizer-00001-of-00001.safetensors: is missing, although checksums.json lists it"]);
    // As an earlier version wrote it.
    fs::remove_file(newest.join("checksums.json")).unwrap();
    TRAIN.fail(&arguments, 2, &["optimizer-00001-of-00002.safetensors: is missing: delete "]);
    fs::write(newest.join("state.json"), b"\xff").unwrap();
    TRAIN.fail(&arguments, 2, &["state.json: is damaged: delete "]);
    fs::remove_dir_all(&newest).unwrap();
    // The state that a kill during a save leaves: a folder and a file half written, and a
    // checkpoint about to be replaced.
    fs::create_dir(run.join("checkpoints/.writing-abc")).unwrap();
    fs::write(run.join(".writing-def"), "half").unwrap();
    fs::remove_file(run.join("checkpoints/latest")).unwrap();
    fs::rename(run.join("checkpoints/step-000004"), run.join("checkpoints/.old-77-step-000004")).unwrap();
    let resumed = TRAIN.succeed(&arguments);
    assert!(resumed.stderr.contains("resuming after step 4"), "{}", resumed.stderr);
    for folder in [&run, &run.join("checkpoints")] {
        let mut names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(names.all(|name| !name.to_string_lossy().starts_with('.')), "something half-written is left");
    }
    assert_eq!(reproducible_metrics(&run), reproducible_metrics(&whole));
    assert_same_final_model(&run, &whole);
}
