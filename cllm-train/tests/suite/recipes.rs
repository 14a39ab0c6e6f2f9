//! The settings of a recipe besides the weights of its losses: labels, validation, early stopping,
//! the average of the weights.

use std::path::Path;

use cllm_core::checkpoint;
use cllm_core::tokenizer::Tokenizer;
use cllm_train::data::dataset::{self, Example};
use cllm_train::settings::{LabelSource, Settings};
use cllm_train::trainer;
use tch::{Device, Kind, Tensor};

use crate::setup::{
    N, assert_resumes_exactly, consistency, initial_model, loss_curve, metrics, prepare, read_trajectories,
    reproducible_metrics, sft, summary, trained_teacher, write_trajectories,
};

/// Settings of a student of a teacher that has learnt its prompts.
fn student(folder: &Path) -> Settings {
    prepare(folder);
    let teacher = trained_teacher(folder);
    Settings { epochs: 8, ..consistency(folder, &teacher, "student") }
}

/// Sets the references of a data set, row by row.
fn set_references(data_set: &Path, reference: impl Fn(usize) -> Option<String>) {
    let (provenance, mut rows) = read_trajectories(data_set);
    for (index, row) in rows.iter_mut().enumerate() {
        row.reference = reference(index);
    }
    write_trajectories(data_set, provenance, &rows);
}

#[test]
fn labels_of_the_data_set_are_sequences_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = Settings { max_steps: Some(2), ..student(dir.path()) };
    settings.consistency.labels = LabelSource::Dataset;
    let message = trainer::run(settings.clone()).unwrap_err().to_string();
    assert!(message.contains("no row of the data has a reference"), "{message}");

    set_references(&settings.datasets[0], |index| (index != 3).then(|| format!("Say {index}.")));
    let model = initial_model(&settings);
    let (tokenizer, config) = (Tokenizer::load(model).unwrap(), checkpoint::load_config(model).unwrap());
    let read = |settings: &Settings| dataset::read(settings, &tokenizer, &config).unwrap();
    let examples = read(&settings);
    let (labels, trajectories): (Vec<_>, Vec<_>) =
        examples.iter().partition(|example| example.labelled.contains(&true));
    let label_ids: Vec<&str> = labels.iter().map(|example| example.id.as_str()).collect();
    let expected_ids: Vec<String> = (0..12).filter(|index| *index != 3).map(|index| format!("s{index}")).collect();
    assert_eq!(label_ids, expected_ids);
    assert_eq!(labels[0].response_ids, tokenizer.encode_target("Say 0.").unwrap());
    assert!(labels.iter().all(|example| example.blocks.is_empty()));
    // Apart from their labels, the trajectories are the same as with the teacher's labels.
    settings.consistency.labels = LabelSource::Teacher;
    let with_teacher_labels = read(&settings);
    assert!(with_teacher_labels.len() == 12 && trajectories.len() == 12);
    for (trajectory, expected) in trajectories.into_iter().zip(&with_teacher_labels) {
        assert_eq!(Example { labelled: expected.labelled.clone(), ..trajectory.clone() }, *expected);
    }
    settings.consistency.labels = LabelSource::Dataset;
    trainer::run(settings.clone()).unwrap();
    assert!(loss_curve(&settings.output).iter().all(|step| step.ar > 0.0));
}

#[test]
fn validation_losses_are_those_of_training() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let mut settings = Settings { epochs: 2, max_batch_tokens: 100_000, accumulation: 1, ..student(dir.path()) };
    settings.consistency.local_weight = 0.5;
    settings.consistency.anchor_weight = 0.5;
    settings.validation.trajectories = Some(settings.datasets[0].clone());
    settings.validation.every = 1;
    trainer::run(settings.clone()).unwrap();
    let lines = metrics(&settings.output);
    let at_step = |step: u64, key: &str| {
        let line = lines.iter().find(|line| line["step"] == step && line[key].is_number());
        line.unwrap_or_else(|| panic!("no {key} of step {step}"))[key].as_f64().unwrap()
    };
    // All examples fit into one batch, so the first step trains on exactly what the first
    // validation measured.
    for loss in ["loss", "ar_loss", "global_loss", "local_loss", "anchor_loss"] {
        let (validated, trained) = (at_step(0, &format!("validation_{loss}")), at_step(1, loss));
        assert!((validated - trained).abs() < 1e-6 * trained.abs().max(1.0), "{loss}: {validated} {trained}");
    }
    assert!(at_step(0, "validation_local_loss") > 0.0);
    assert!(at_step(2, "validation_loss") < at_step(0, "validation_loss"));
    // In small batches, each loss is still a mean over all of its tokens.
    settings.output = dir.path().join("small");
    settings.max_batch_tokens = 128;
    settings.max_steps = Some(1);
    trainer::run(settings.clone()).unwrap();
    let first_line = &metrics(&settings.output)[0];
    for loss in ["validation_ar_loss", "validation_global_loss", "validation_local_loss"] {
        let (actual, expected) = (first_line[loss].as_f64().unwrap(), at_step(0, loss));
        assert!((actual - expected).abs() < 1e-5, "{loss}: {actual} {expected}");
    }
}

#[test]
fn a_run_without_a_new_best_stops_early_and_resumes_exactly() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let mut settings = Settings { save_every: Some(1), ..student(dir.path()) };
    settings.validation.prompts = Some(dir.path().join("prompts.jsonl"));
    settings.validation.every = 1;
    settings.validation.n = N;
    settings.validation.max_new_tokens = 20;
    settings.validation.patience = Some(3);
    let run = settings.output.clone();
    trainer::run(settings.clone()).unwrap();
    let course = reproducible_metrics(&run);
    let first_summary = summary(&run);
    assert_eq!(first_summary["stopped_early"], true, "{first_summary}");
    let steps = first_summary["steps"].as_u64().unwrap();
    let validation = &first_summary["validation"];
    assert_eq!(steps, validation["best"]["step"].as_u64().unwrap_or(0) + 3);
    assert!(validation["initial"]["accuracy"].as_f64().unwrap() > 0.0, "{first_summary}");
    assert!(validation["last"]["accuracy"].is_number(), "{first_summary}");
    // The same command again changes nothing.
    trainer::run(settings.clone()).unwrap();
    assert_eq!(metrics(&run).len(), course.len());

    assert_resumes_exactly(&settings, steps as usize - 1);
    assert_eq!(summary(&run)["steps"], steps);
    // A signal during the last validation but one: its step is saved, and the validation is
    // repeated.
    let checkpoint = run.join(format!("checkpoints/step-{:06}", steps - 1));
    let state_file = checkpoint.join("state.json");
    let mut state: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&state_file).unwrap()).unwrap();
    state["validation"]["last_step"] = (steps - 2).into();
    state["validation"]["num_without_best"] = 1.into();
    // The checksums are those of the state before.
    state.as_object_mut().unwrap().remove("checksum").unwrap();
    std::fs::write(&state_file, state.to_string()).unwrap();
    std::fs::remove_file(checkpoint.join("checksums.json")).unwrap();
    assert_resumes_exactly(&settings, steps as usize - 1);
}

#[test]
fn the_average_of_the_weights_is_saved_and_resumes_exactly() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let plain = Settings { max_steps: Some(4), save_every: Some(1), ..sft(dir.path(), "plain") };
    trainer::run(plain.clone()).unwrap();
    let mut averaged = Settings { output: dir.path().join("averaged"), ..plain.clone() };
    averaged.optimizer.ema_decay = Some(0.5);
    averaged.validation.prompts = Some(dir.path().join("prompts.jsonl"));
    averaged.validation.every = 1;
    averaged.validation.n = N;
    averaged.validation.max_new_tokens = 4;
    trainer::run(averaged.clone()).unwrap();
    // Neither the average nor validation changes the course of training.
    assert_eq!(loss_curve(&averaged.output), loss_curve(&plain.output));
    let weights = |folder: &Path| checkpoint::load(folder, Device::Cpu, Kind::Float).unwrap().named_parameters();
    let steps: Vec<_> =
        (1..=4).map(|step| weights(&plain.output.join(format!("checkpoints/step-{step:06}")))).collect();
    for folder in ["final", "checkpoints/latest"] {
        for (index, (name, average)) in weights(&averaged.output.join(folder)).into_iter().enumerate() {
            let terms = steps.iter().zip([1.0, 2.0, 4.0, 8.0]).map(|(step, weight)| &step[index].1 * (weight / 15.0));
            let expected: Tensor = terms.sum();
            assert!(average.allclose(&expected, 1e-5, 1e-6, false), "{folder}: {name}");
        }
    }
    assert_resumes_exactly(&averaged, 2);
}
