//! Whole runs on a tiny random model: they learn, they resume exactly, and a run whose settings or
//! data have changed is refused.

use std::path::{Path, PathBuf};

use cllm_core::checkpoint::{self, STREAMING_BYTES, TensorFile, TensorSpec, TensorWriter};
use cllm_core::tokenizer::Tokenizer;
use cllm_train::settings::{BlockContext, Settings};
use cllm_train::trainer;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::setup::{
    N, StepLosses, assert_resumes_exactly, collect, consistency, have_same_weights, loss_curve, metrics, prepare,
    read_trajectories, rewind_to, sft, summary, write_trajectories,
};
use cllm_testing::families::{random_model, shapes};

#[test]
fn a_teacher_and_its_student_learn_and_resume_exactly() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut teacher = Settings { epochs: 60, ..sft(dir.path(), "teacher") };
    teacher.optimizer.lr = 1e-2;
    trainer::run(teacher.clone()).unwrap();
    let losses = loss_curve(&teacher.output);
    let (first, last) = (losses[0].ar, losses[losses.len() - 1].ar);
    assert!(last < first * 0.6, "{first} -> {last}");
    let teacher_summary = summary(&teacher.output);
    assert_eq!(teacher_summary["steps"], losses.len());
    for field in ["tokens_per_second", "parameters", "seconds", "final_losses"] {
        assert!(!teacher_summary[field].is_null(), "{field}");
    }

    let model = dir.path().join("teacher/final");
    for context in [BlockContext::Clean, BlockContext::NoisyWindow] {
        let mut student = Settings { epochs: 8, ..consistency(dir.path(), &model, &format!("student-{context:?}")) };
        student.optimizer.lr = 1e-2;
        student.consistency.context = context;
        student.consistency.window_blocks = 2;
        student.consistency.ar_weight = 1.0;
        student.consistency.local_weight = if context == BlockContext::Clean { 0.5 } else { 0.0 };
        trainer::run(student.clone()).unwrap();
        let losses = loss_curve(&student.output);
        let mean = |steps: &[StepLosses]| steps.iter().map(|step| step.global).sum::<f64>() / steps.len() as f64;
        let (first, last) = (mean(&losses[..4]), mean(&losses[losses.len() - 4..]));
        assert!(last < first * 0.9, "{context:?}: {first} -> {last}");
        assert_resumes_exactly(&student, 6);
    }
}

#[test]
fn a_folder_with_files_of_the_user_is_never_written_to() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings { max_steps: Some(1), ..sft(dir.path(), "project") };
    std::fs::create_dir(&settings.output).unwrap();
    let config = settings.output.join("config.yaml");
    std::fs::write(&config, "mine").unwrap();
    let message = trainer::run(settings).unwrap_err().to_string();
    assert!(message.contains("holds files that this command did not write (config.yaml)"), "{message}");
    assert_eq!(std::fs::read_to_string(config).unwrap(), "mine");
}

#[test]
fn a_date_that_the_template_does_not_print_is_no_part_of_a_run() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut settings = Settings { max_steps: Some(1), ..sft(dir.path(), "run") };
    trainer::run_on(settings.clone(), "2026-11-28".parse().unwrap()).unwrap();
    let config = std::fs::read_to_string(dir.path().join("run/config.yaml")).unwrap();
    assert!(config.contains("\ndate: null\n"), "{config}");
    settings.rendering.date = Some("2020-01-01".parse().unwrap());
    trainer::run(settings).unwrap();
}

#[test]
fn validation_counts_unfinished_answers_separately() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut settings = Settings { max_steps: Some(2), ..sft(dir.path(), "run") };
    settings.validation.prompts = Some(dir.path().join("prompts.jsonl"));
    settings.validation.every = 1;
    settings.validation.n = N;
    settings.validation.max_new_tokens = 20;
    trainer::run(settings.clone()).unwrap();
    let is_validation = |line: &Value| line["validation_tokens_per_forward"].is_number();
    let validations: Vec<Value> = metrics(&settings.output).into_iter().filter(is_validation).collect();
    assert_eq!(validations.iter().map(|line| &line["step"]).collect::<Vec<_>>(), [0, 1, 2]);
    // Two steps are too few to learn how an answer ends. An answer that is cut is incorrect, and no
    // checkpoint is the best.
    for line in &validations {
        assert_eq!(line["validation_unfinished"], 12);
        assert_eq!(line["validation_tokens_per_forward_finished"], Value::Null);
        assert_eq!(line["validation_accuracy"], 0.0);
    }
    let validation = &summary(&settings.output)["validation"];
    assert_eq!((&validation["last"]["unfinished"], &validation["best"]), (&json!(12), &Value::Null));
    assert!(validation["last"]["tokens_per_forward"].is_number());
    assert!(!settings.output.join("checkpoints/best").exists());
}

#[test]
fn eos_ids_replace_those_of_the_model() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut settings = Settings { epochs: 60, eos_ids: Some(vec![5]), ..sft(dir.path(), "run") };
    settings.optimizer.lr = 1e-2;
    trainer::run(settings.clone()).unwrap();
    let model = dir.path().join("run/final");
    let tokenizer = Tokenizer::load(&model).unwrap();
    assert_eq!(tokenizer.eos_ids(), [5]);
    let (_, rows) = read_trajectories(&collect(&model, dir.path()));
    assert!(rows.iter().any(|row| row.response_ids.ends_with(&[5])), "no answer ends with token 5");
    let message = trainer::run(Settings { eos_ids: Some(vec![270]), ..settings }).unwrap_err().to_string();
    assert!(message.contains("eos_ids: 270 is not in the vocabulary of"), "{message}");
}

#[test]
fn a_student_of_every_family_resumes_exactly() {
    tch::set_num_threads(1);
    for (name, mut config) in shapes() {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        let model = dir.path().join("tokenizer");
        config["vocab_size"] = Tokenizer::load(&model).unwrap().vocab_size().into();
        checkpoint::save(&random_model(&config, 5), &model, Kind::Float).unwrap();
        let mut student =
            Settings { max_steps: Some(4), save_every: Some(2), ..consistency(dir.path(), &model, "run") };
        student.consistency.local_weight = 0.5;
        student.consistency.anchor_weight = 0.5;
        trainer::run(student.clone()).unwrap();
        let losses = loss_curve(&student.output);
        assert!(losses.len() == 4 && losses.iter().all(|step| step.global.is_finite()), "{name}: {losses:?}");
        assert_resumes_exactly(&student, 2);
        assert!(!have_same_weights(&student.output.join("final"), &model), "{name}: it learnt nothing");
    }
}

/// Earlier versions wrote one file, with the state of each weight by its name, and no checksums.
#[test]
fn a_checkpoint_of_an_earlier_version_resumes_exactly() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings { max_steps: Some(4), save_every: Some(2), ..sft(dir.path(), "run") };
    trainer::run(settings.clone()).unwrap();
    let folder = settings.output.join("checkpoints/step-000002");
    let path = folder.join("optimizer-00001-of-00001.safetensors");
    let file = TensorFile::open(&path, "").unwrap();
    let model = checkpoint::load(&folder, Device::Cpu, Kind::Float).unwrap();
    let mut tensors = model.named_parameters();
    tensors.iter_mut().for_each(|(name, _)| *name = format!("master_weights.{name}"));
    let stored: Vec<_> = file.tensors().collect();
    assert_eq!(stored.len(), 2, "the model has the master weights");
    let target = |index: usize| Ok(Tensor::zeros(stored[index].1.shape(), (Kind::Float, Device::Cpu)));
    checkpoint::read_tensors(&stored, Device::Cpu, target, |index, flat| {
        let slices = model.weights().ranges().map(|(name, range)| {
            (format!("{}.{name}", stored[index].0), flat.narrow(0, range.start, range.end - range.start))
        });
        tensors.extend(slices);
        Ok(())
    })
    .unwrap();
    let specs: Vec<_> = tensors
        .iter()
        .map(|(name, tensor)| TensorSpec { name: name.clone(), kind: Kind::Float, shape: tensor.size() })
        .collect();
    let mut writer = TensorWriter::new(Device::Cpu, STREAMING_BYTES);
    writer.begin_file(&folder.join("optimizer.safetensors"), &[], &specs).unwrap();
    tensors.iter().for_each(|(_, tensor)| writer.write(tensor, Kind::Float).unwrap());
    writer.finish().unwrap();
    std::fs::remove_file(path).unwrap();
    std::fs::remove_file(folder.join("checksums.json")).unwrap();
    assert_resumes_exactly(&settings, 2);
}

#[test]
fn a_run_with_other_settings_in_the_same_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings { max_steps: Some(2), ..sft(dir.path(), "run") };
    trainer::run(settings.clone()).unwrap();
    let message = trainer::run(Settings { seed: 9, ..settings }).unwrap_err().to_string();
    assert!(message.contains("was started with seed=0; this command says 9"), "{message}");
}

#[test]
fn an_unfinished_run_with_other_settings_is_refused_before_the_model_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    trainer::run(Settings { max_steps: Some(1), ..sft(dir.path(), "teacher") }).unwrap();
    let model = dir.path().join("teacher/final");
    let student = Settings { max_steps: Some(2), save_every: Some(1), ..consistency(dir.path(), &model, "student") };
    trainer::run(student.clone()).unwrap();
    rewind_to(&student.output, 1);
    let weights = model.join("model.safetensors");
    std::fs::write(&weights, &std::fs::read(&weights).unwrap()[..100]).unwrap();
    let message = trainer::run(Settings { seed: 9, ..student }).unwrap_err().to_string();
    assert!(message.contains("was started with seed=0; this command says 9"), "{message}");
}

#[test]
fn a_run_with_fewer_data_sets_or_in_another_order_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let [one, two] = ["prompts.jsonl", "more.jsonl"].map(|name| dir.path().join(name));
    let text = std::fs::read_to_string(&one).unwrap();
    std::fs::write(&two, text.replace("\"id\":\"", "\"id\":\"more-")).unwrap();
    let settings = |datasets: Vec<PathBuf>| Settings { max_steps: Some(1), datasets, ..sft(dir.path(), "run") };
    trainer::run(settings(vec![one.clone(), two.clone()])).unwrap();
    for datasets in [vec![one.clone()], vec![two, one]] {
        let message = trainer::run(settings(datasets)).unwrap_err().to_string();
        assert!(message.contains("was started with datasets="), "{message}");
    }
}

#[test]
fn a_run_whose_data_or_model_has_changed_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let teacher = Settings { max_steps: Some(1), ..sft(dir.path(), "teacher") };
    trainer::run(teacher.clone()).unwrap();
    let model = dir.path().join("teacher/final");
    let student = Settings { max_steps: Some(2), ..consistency(dir.path(), &model, "student") };
    trainer::run(student.clone()).unwrap();
    trainer::run(student.clone()).unwrap();
    let assert_refused = |settings: &Settings, name: &str| {
        let message = trainer::run(settings.clone()).unwrap_err().to_string();
        assert!(message.contains("was started from another version of ") && message.contains(name), "{message}");
    };
    let data_set = &student.datasets[0];
    let (provenance, rows) = read_trajectories(data_set);
    write_trajectories(data_set, provenance, &rows[..11]);
    assert_refused(&student, &format!("the data set {}", data_set.display()));
    let prompts = dir.path().join("prompts.jsonl");
    let text = std::fs::read_to_string(&prompts).unwrap();
    std::fs::write(&prompts, text.replace("It is 3.", "It is 4.")).unwrap();
    assert_refused(&teacher, "prompts.jsonl");
    collect(&model, dir.path());
    trainer::run(student.clone()).unwrap();
    let changed = checkpoint::load(&model, Device::Cpu, Kind::Float).unwrap();
    let (_, mut last_weight) = changed.named_parameters().pop().unwrap();
    let _ = tch::no_grad(|| last_weight.fill_(0.5));
    checkpoint::save(&changed, &model, Kind::Float).unwrap();
    assert_refused(&student, &format!("the model {}", model.display()));
}

#[test]
fn a_run_that_diverges_exits_with_code_1_and_keeps_its_last_good_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let model_with_last_norm = |name: &str, value: f64| {
        let folder = dir.path().join(name);
        trainer::run(Settings { max_steps: Some(1), ..sft(dir.path(), &format!("start-{name}")) }).unwrap();
        std::fs::rename(dir.path().join(format!("start-{name}/final")), &folder).unwrap();
        let model = checkpoint::load(&folder, Device::Cpu, Kind::Float).unwrap();
        let (_, mut norm) = model.named_parameters().into_iter().find(|(name, _)| name == "model.norm.weight").unwrap();
        let _ = tch::no_grad(|| norm.fill_(value));
        checkpoint::save(&model, &folder, Kind::Float).unwrap();
        folder.display().to_string()
    };
    let assert_diverges = |settings: &Settings, parts: &[&str]| {
        let error = trainer::run(settings.clone()).unwrap_err();
        let message = error.to_string();
        assert!(error.exit_code() == 1 && parts.iter().all(|part| message.contains(part)), "{message}");
        assert!(!settings.output.join("final").exists() && !settings.output.join("summary.json").exists());
    };
    let settings = |name: &str, model: &str| Settings {
        init: None,
        model: Some(model.to_owned()),
        max_steps: Some(3),
        ..sft(dir.path(), name)
    };
    let long = Settings { max_steps: Some(40), epochs: 40, ..Settings::default() };
    let nan = settings("nan-run", &model_with_last_norm("nan", f64::NAN));
    let error = trainer::run(nan.clone()).unwrap_err();
    assert!(
        error.exit_code() == 2 && error.to_string().contains("`model.norm.weight` has numbers that are not finite")
    );
    assert!(!nan.output.join("final").exists());

    // Finite weights with infinite logits: every step is skipped and changes nothing.
    let overflowing = model_with_last_norm("overflowing", 3e38);
    let logging = Settings {
        max_steps: long.max_steps,
        epochs: long.epochs,
        log_every: 7,
        save_every: None,
        ..settings("logging", &overflowing)
    };
    assert_diverges(
        &logging,
        &["not finite 21 steps in a row", "there is no earlier checkpoint", "lower optimizer.lr"],
    );
    assert!(!logging.output.join("checkpoints").exists());
    let skipping = Settings {
        max_steps: long.max_steps,
        epochs: long.epochs,
        log_every: 30,
        save_every: Some(5),
        ..settings("skipping", &overflowing)
    };
    assert_diverges(
        &skipping,
        &["not finite 30 steps in a row", "the last checkpoint was saved before that and is kept"],
    );
    assert!(have_same_weights(&dir.path().join("skipping/checkpoints/latest"), Path::new(&overflowing)));
    let short = settings("short", &overflowing);
    trainer::run(short.clone()).unwrap();
    assert_eq!(summary(&short.output)["skipped_steps"], 3);
}
