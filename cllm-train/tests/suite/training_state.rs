//! The training state of a run: what is saved when, and what a finished run keeps.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use cllm_train::settings::Settings;
use cllm_train::trainer;

use crate::setup::{TRAIN, have_same_weights, num_metrics, prepare, settings_file, sft, trained_teacher};
use cllm_testing::programs::path;

fn file_names(folder: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn has_training_state(checkpoint: &Path) -> bool {
    let is_state = |name: &String| name == "state.json" || name.starts_with("optimizer");
    file_names(checkpoint).iter().any(is_state)
}

#[test]
fn a_finished_run_keeps_models_only_and_is_known_to_be_complete() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let kept = Settings { max_steps: Some(5), save_every: Some(2), ..sft(dir.path(), "kept") };
    trainer::run(kept.clone()).unwrap();
    let settings = Settings { keep_state: false, output: dir.path().join("run"), ..kept.clone() };
    trainer::run(settings.clone()).unwrap();
    let names = |run: &Settings| file_names(&run.output.join("checkpoints"));
    assert_eq!(names(&kept), ["latest", "step-000002", "step-000004", "step-000005"].map(str::to_owned).into());
    assert_eq!(names(&settings), ["step-000002", "step-000004"].map(str::to_owned).into());
    for step in ["step-000002", "step-000004"] {
        let [with_state, without] = [&kept, &settings].map(|run| run.output.join("checkpoints").join(step));
        assert!(has_training_state(&with_state) && !has_training_state(&without));
        assert!(have_same_weights(&with_state, &without));
    }
    assert!(have_same_weights(&kept.output.join("final"), &settings.output.join("final")));
    // As a kill leaves it that comes while the state is removed.
    let (from, to) = (kept.output.join("checkpoints/step-000002"), settings.output.join("checkpoints/step-000002"));
    fs::copy(from.join("state.json"), to.join("state.json")).unwrap();
    fs::write(to.join(".writing-checksums.json-abcdef"), "{").unwrap();
    let again = TRAIN.succeed(&["run", "-c", &settings_file(dir.path(), &settings)]);
    assert!(again.stderr.contains("already complete: 5 steps"), "{}", again.stderr);
    assert!(!to.join("state.json").exists() && !to.join(".writing-checksums.json-abcdef").exists());
    let error = trainer::run(Settings { seed: 3, ..settings }).unwrap_err().to_string();
    assert!(error.contains("was started with seed=0"), "{error}");
}

#[test]
fn without_save_every_a_run_saves_its_state_only_when_it_is_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    for save_every in [None, Some(0)] {
        let settings = Settings {
            max_steps: Some(3),
            save_every,
            keep_state: false,
            ..sft(dir.path(), &format!("run-{save_every:?}"))
        };
        trainer::run(settings.clone()).unwrap();
        assert!(!settings.output.join("checkpoints").exists() && settings.output.join("final").exists());
        let pruned = TRAIN.succeed(&["prune", &settings.output.display().to_string()]);
        assert!(String::from_utf8_lossy(&pruned.stdout).ends_with(": holds no training state\n"));
    }
    let settings = Settings { epochs: 1000, save_every: Some(0), keep_state: false, ..sft(dir.path(), "interrupted") };
    let run = &settings.output;
    let arguments = ["run", "-c", &settings_file(dir.path(), &settings)];
    TRAIN.interrupt(&arguments, "TERM", 143, || num_metrics(run) >= 2);
    assert!(has_training_state(&run.join("checkpoints/latest")) && !run.join("final").exists());
}

#[test]
fn the_last_step_is_the_best_checkpoint_without_a_copy_of_its_model() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let teacher = trained_teacher(dir.path());
    let mut settings = Settings {
        init: None,
        model: Some(teacher.display().to_string()),
        max_steps: Some(1),
        keep_state: false,
        ..sft(dir.path(), "run")
    };
    settings.optimizer.lr = 1e-6;
    settings.validation.prompts = Some(dir.path().join("prompts.jsonl"));
    settings.validation.max_new_tokens = 20;
    trainer::run(settings.clone()).unwrap();
    let checkpoints = settings.output.join("checkpoints");
    assert_eq!(file_names(&checkpoints), ["best".to_owned()].into());
    assert_eq!(fs::canonicalize(checkpoints.join("best")).unwrap(), settings.output.join("final"));
}

#[test]
fn prune_removes_the_state_of_finished_runs() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings { max_steps: Some(4), save_every: Some(2), ..sft(dir.path(), "run") };
    trainer::run(settings.clone()).unwrap();
    let run = &settings.output;
    // Earlier versions left the train state in checkpoints alone.
    fs::remove_file(run.join("state.json")).unwrap();
    let (folder, other) = (path(dir.path(), "run"), path(dir.path(), "other"));
    fs::create_dir_all(dir.path().join("other/checkpoints")).unwrap();
    fs::write(run.join("checkpoints/step-9"), "a stray file").unwrap();
    TRAIN.fail(&["prune", &folder, &path(dir.path(), "tokenizer")], 2, &["tokenizer: is not the folder of a run"]);
    TRAIN.fail(&["prune", &folder, &other], 2, &["other: is not finished", "--force"]);
    let prune = |more: &[&str]| String::from_utf8(TRAIN.succeed(&[&["prune", &folder], more].concat()).stdout).unwrap();
    let promise = prune(&["--dry-run"]);
    assert!(
        promise.contains("would free ") && promise.contains(" MB, the training state of 2 checkpoints"),
        "{promise}"
    );
    assert!(has_training_state(&run.join("checkpoints/latest")));
    assert_eq!(prune(&[]), promise.replace("would free", "freed"));
    let names = ["step-000002", "step-000004"].map(str::to_owned);
    fs::remove_file(run.join("checkpoints/step-9")).unwrap();
    assert_eq!(file_names(&run.join("checkpoints")), names.clone().into());
    assert!(names.iter().all(|name| !has_training_state(&run.join("checkpoints").join(name))));
    assert!(prune(&[]).ends_with("run: holds no training state\n"));
    let again = TRAIN.succeed(&["run", "-c", &settings_file(dir.path(), &settings)]);
    assert!(again.stderr.contains("already complete: 4 steps"), "{}", again.stderr);
    let state = fs::read_to_string(run.join("state.json")).unwrap();
    fs::write(run.join("state.json"), state.replace("\"step\": 4", "\"step\": 5")).unwrap();
    let damage = "state.json: is damaged: the model in `final` is not affected; to train again, choose another output";
    TRAIN.fail(&["run", "-c", &settings_file(dir.path(), &settings)], 2, &[damage]);
    // An unfinished run starts over.
    fs::remove_file(run.join("summary.json")).unwrap();
    TRAIN.fail(&["prune", &folder], 2, &["is not finished"]);
    prune(&["--force"]);
    assert!(!TRAIN.succeed(&["run", "-c", &settings_file(dir.path(), &settings)]).stderr.contains("resuming"));
}
