//! What a recipe chooses beside the losses: labels, held-out losses, the best checkpoint, the end, the average of the weights.

use std::path::Path;

use cllm_core::checkpoint;
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Reader, Writer};
use cllm_train::data::dataset as examples;
use cllm_train::settings::{LabelSource, Objective, Settings};
use cllm_train::trainer;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::runs::{N, collect, curve, cut_back, model_of, prepare, same_weights, sft, summary};

/// A teacher that has learnt its prompts, and a student's settings on its trajectories.
fn student(folder: &Path, output: &str) -> Settings {
    prepare(folder);
    let mut teacher = Settings { epochs: 60, save_every: None, ..sft(folder, "teacher") };
    teacher.optimizer.lr = 1e-2;
    trainer::run(teacher).unwrap();
    let model = folder.join("teacher/final");
    Settings {
        init: None,
        model: Some(model.display().to_string()),
        objective: Objective::Consistency,
        datasets: vec![collect(&model, folder)],
        epochs: 8,
        ..sft(folder, output)
    }
}

/// Gives the rows of a data set these references.
fn refer(data: &Path, reference: impl Fn(usize) -> Option<String>) {
    let reader = Reader::open(data).unwrap();
    let rows = reader.rows().map(Result::unwrap).enumerate();
    let rows: Vec<_> = rows
        .map(|(index, mut row)| {
            row.reference = reference(index);
            row
        })
        .collect();
    let provenance = reader.provenance().clone();
    std::fs::remove_dir_all(data).unwrap();
    let mut writer = Writer::open(data, provenance).unwrap();
    writer.write_shard(&rows).unwrap();
    writer.finish().unwrap();
}

fn lines(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn labels_of_the_data_set_are_sequences_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let mut settings = Settings { max_steps: Some(2), ..student(dir.path(), "student") };
    settings.consistency.labels = LabelSource::Dataset;
    let message = trainer::run(settings.clone()).unwrap_err().to_string();
    assert!(message.contains("no row of the data has a reference"), "{message}");

    refer(&settings.datasets[0], |index| (index != 3).then(|| format!("Say {index}.")));
    let model = model_of(&settings);
    let (tokenizer, config) = (Tokenizer::load(model).unwrap(), checkpoint::load_config(model).unwrap());
    let read = |settings: &Settings| examples::read(settings, &tokenizer, &config).unwrap();
    let found = read(&settings);
    let (labels, trajectories): (Vec<_>, Vec<_>) = found.iter().partition(|example| example.labels);
    let ids: Vec<&str> = labels.iter().map(|example| example.id.as_str()).collect();
    let expected: Vec<String> = (0..12).filter(|index| *index != 3).map(|index| format!("s{index}")).collect();
    assert_eq!(ids, expected);
    assert_eq!(labels[0].response, tokenizer.encode_target("Say 0.").unwrap());
    assert!(labels.iter().all(|example| example.blocks.is_empty()));
    // The trajectories are what they are with the teacher's labels, these aside.
    settings.consistency.labels = LabelSource::Teacher;
    let teacher = read(&settings);
    assert!(teacher.len() == 12 && trajectories.len() == 12);
    for (bare, own) in trajectories.into_iter().zip(&teacher) {
        assert_eq!(examples::Example { labels: true, ..bare.clone() }, *own);
    }
    settings.consistency.labels = LabelSource::Dataset;
    trainer::run(settings.clone()).unwrap();
    assert!(curve(settings.output.as_path()).iter().all(|line| line.1.as_f64().unwrap() > 0.0));
}

#[test]
fn held_out_losses_are_those_that_training_would_take() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let mut settings = Settings { epochs: 2, ..student(dir.path(), "student") };
    (settings.max_batch_tokens, settings.accumulation) = (100_000, 1);
    (settings.consistency.local_weight, settings.consistency.anchor_weight) = (0.5, 0.5);
    (settings.validation.trajectories, settings.validation.every) = (Some(settings.datasets[0].clone()), 1);
    trainer::run(settings.clone()).unwrap();
    let run = settings.output.as_path();
    let lines = lines(run);
    let of_step = |step: u64, key: &str| {
        let line = lines.iter().find(|line| line["step"] == step && line[key].is_number());
        line.unwrap_or_else(|| panic!("no {key} of step {step}"))[key].as_f64().unwrap()
    };
    // One batch holds all: the first step starts from what the first probe saw.
    for loss in ["loss", "ar_loss", "consistency_loss", "local_loss", "anchor_loss"] {
        let (held_out, trained) = (of_step(0, &format!("held_out_{loss}")), of_step(1, loss));
        assert!((held_out - trained).abs() < 1e-6 * trained.abs().max(1.0), "{loss}: {held_out} {trained}");
    }
    assert!(of_step(0, "held_out_local_loss") > 0.0);
    assert!(of_step(2, "held_out_loss") < of_step(0, "held_out_loss"));
    // Small batches and fewer rows: each loss still is a mean over all of its tokens.
    settings.output = dir.path().join("small");
    (settings.max_batch_tokens, settings.max_steps) = (128, Some(1));
    trainer::run(settings.clone()).unwrap();
    let small = self::lines(settings.output.as_path());
    for loss in ["held_out_ar_loss", "held_out_consistency_loss", "held_out_local_loss"] {
        let (found, expected) = (small[0][loss].as_f64().unwrap(), of_step(0, loss));
        assert!((found - expected).abs() < 1e-5, "{loss}: {found} {expected}");
    }
}

#[test]
fn a_run_without_a_new_best_ends_early_and_resumes_exactly() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    let mut settings = Settings { save_every: Some(1), ..student(dir.path(), "student") };
    (settings.validation.prompts, settings.validation.every) = (Some(dir.path().join("prompts.jsonl")), 1);
    (settings.validation.n, settings.validation.max_new_tokens, settings.validation.patience) = (N, 20, Some(3));
    let run = settings.output.clone();
    trainer::run(settings.clone()).unwrap();
    let (whole, found) = (lines(&run), summary(&run));
    assert_eq!(found["stopped_early"], true, "{found}");
    let steps = found["steps"].as_u64().unwrap();
    let last_best = found["best_probe"][0].as_u64().unwrap_or(0);
    assert_eq!(steps, last_best + 3);
    assert!(found["start_accuracy"].as_f64().unwrap() > 0.0 && found["accuracy"].is_number(), "{found}");
    // Once over, it stays over.
    trainer::run(settings.clone()).unwrap();
    assert_eq!(lines(&run).len(), whole.len());

    let without_times = |lines: Vec<Value>| -> Vec<Value> {
        let bare = lines.into_iter().map(|mut line| {
            line.as_object_mut().unwrap().retain(|key, _| !key.contains("second"));
            line
        });
        bare.collect()
    };
    let whole = without_times(whole);
    let kept = dir.path().join("kept");
    std::fs::rename(run.join("final"), &kept).unwrap();
    std::fs::create_dir(run.join("final")).unwrap();
    cut_back(&run, steps as usize - 1);
    trainer::run(settings.clone()).unwrap();
    assert_eq!((without_times(lines(&run)), summary(&run)["steps"].as_u64()), (whole.clone(), Some(steps)));
    assert!(same_weights(&kept, &run.join("final")));
    // A signal in the midst of the last probe: the step is saved, and the probe is still to be taken.
    let state = run.join(format!("checkpoints/step-{:06}/state.json", steps - 1));
    let mut position: Value = serde_json::from_str(&std::fs::read_to_string(&state).unwrap()).unwrap();
    position["selection"]["probed"] = (steps - 2).into();
    position["selection"]["without_best"] = 1.into();
    std::fs::write(&state, position.to_string()).unwrap();
    std::fs::remove_dir_all(&kept).unwrap();
    std::fs::rename(run.join("final"), &kept).unwrap();
    std::fs::create_dir(run.join("final")).unwrap();
    cut_back(&run, steps as usize - 1);
    trainer::run(settings).unwrap();
    assert_eq!(without_times(lines(&run)), whole);
    assert!(same_weights(&kept, &run.join("final")));
}

#[test]
fn the_average_of_the_weights_is_what_is_saved_and_it_resumes_exactly() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let plain = Settings { max_steps: Some(4), save_every: Some(1), ..sft(dir.path(), "plain") };
    trainer::run(plain.clone()).unwrap();
    let mut averaged = Settings { output: dir.path().join("averaged"), ..plain.clone() };
    averaged.optimizer.ema_decay = Some(0.5);
    (averaged.validation.prompts, averaged.validation.every) = (Some(dir.path().join("prompts.jsonl")), 1);
    (averaged.validation.n, averaged.validation.max_new_tokens) = (N, 4);
    trainer::run(averaged.clone()).unwrap();
    let run = Path::new(&averaged.output);
    // Neither the average nor the probe changes the course.
    assert_eq!(curve(run), curve(Path::new(&plain.output)));
    let weights = |folder: &Path| checkpoint::load(folder, Device::Cpu, Kind::Float).unwrap().named_parameters();
    let steps: Vec<_> =
        (1..=4).map(|step| weights(&Path::new(&plain.output).join(format!("checkpoints/step-{step:06}")))).collect();
    for folder in ["final", "checkpoints/latest"] {
        for (index, (name, found)) in weights(&run.join(folder)).into_iter().enumerate() {
            let terms = steps.iter().zip([1.0, 2.0, 4.0, 8.0]).map(|(step, weight)| &step[index].1 * (weight / 15.0));
            let expected: Tensor = terms.sum();
            assert!(found.allclose(&expected, 1e-5, 1e-6, false), "{folder}: {name}");
        }
    }
    let kept = dir.path().join("kept");
    std::fs::rename(run.join("final"), &kept).unwrap();
    std::fs::create_dir(run.join("final")).unwrap();
    cut_back(run, 2);
    trainer::run(averaged.clone()).unwrap();
    assert_eq!(curve(run), curve(Path::new(&plain.output)));
    assert!(same_weights(&kept, &run.join("final")));
}
