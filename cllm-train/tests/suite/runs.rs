//! Whole runs on a tiny random model: the loss falls, and a run that was stopped goes on as if it had not been.

use cllm_core::checkpoint;
use std::path::{Path, PathBuf};

use cllm_core::decode::{DecodeOptions, Request, StopConditions, Strategy, decode};
use cllm_core::prompt_set::{self, Prompt, Sample};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory;
use cllm_core::trajectory::{Provenance, Trajectory, Writer};
use cllm_train::settings::{BlockContext, InitSettings, Objective, OptimizerSettings, Settings};
use cllm_train::tokenizer_training;
use cllm_train::trainer;
use serde_json::Value;
use tch::{Device, Kind};

use cllm_testing::families::{random_model, shapes};

pub const N: usize = 4;

/// A folder with a prompt set and a tokenizer.
pub fn prepare(folder: &Path) {
    let samples: Vec<Sample> = (0..12)
        .map(|index| Sample {
            id: format!("s{index}"),
            source: "jsonl/train".to_owned(),
            prompt: Prompt::question(format!("What is {index} and one?")),
            reference: Some(format!("It is {}.", index + 1)),
            meta: None,
        })
        .collect();
    prompt_set::write(&folder.join("prompts.jsonl"), &samples).unwrap();
    let texts: Vec<String> = samples.iter().flat_map(|sample| sample.reference.clone()).collect();
    tokenizer_training::train(&texts, 270, &folder.join("tokenizer")).unwrap();
}

pub fn sft(folder: &Path, output: &str) -> Settings {
    Settings {
        init: Some(InitSettings {
            tokenizer: folder.join("tokenizer"),
            hidden_size: 32,
            intermediate_size: 48,
            num_layers: 2,
            num_heads: 2,
            num_kv_heads: 1,
            max_positions: 128,
        }),
        objective: Objective::Sft,
        datasets: vec![folder.join("prompts.jsonl")],
        output: folder.join(output),
        epochs: 4,
        max_batch_tokens: 128,
        max_example_tokens: 128,
        accumulation: 2,
        max_checkpoints: 100,
        optimizer: OptimizerSettings { lr: 3e-3, ..OptimizerSettings::default() },
        log_every: 1,
        save_every: Some(3),
        device: "cpu".to_owned(),
        ..Settings::default()
    }
}

/// Step and losses of each line of metrics.jsonl.
pub fn curve(run: &Path) -> Vec<(u64, Value, Value)> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let losses = lines.filter(|line| line["loss"].is_number());
    losses
        .map(|line| (line["step"].as_u64().unwrap(), line["ar_loss"].clone(), line["consistency_loss"].clone()))
        .collect()
}

pub fn summary(run: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(run.join("summary.json")).unwrap()).unwrap()
}

pub fn same_weights(a: &Path, b: &Path) -> bool {
    let load = |folder: &Path| checkpoint::load(folder, Device::Cpu, Kind::Float).unwrap().named_parameters();
    load(a).iter().zip(load(b)).all(|((_, a), (_, b))| a.equal(&b))
}

/// The folder of the model that a run starts from.
pub fn model_of(settings: &Settings) -> &Path {
    Path::new(settings.model.as_deref().unwrap())
}

/// Leaves a run as a kill after `step` would have.
pub fn cut_back(run: &Path, step: usize) {
    let checkpoints = run.join("checkpoints");
    std::fs::remove_file(checkpoints.join("latest")).unwrap();
    std::os::unix::fs::symlink(format!("step-{step:06}"), checkpoints.join("latest")).unwrap();
    std::fs::remove_dir_all(run.join("final")).unwrap();
    std::fs::remove_file(run.join("summary.json")).unwrap();
}

/// Trajectories of a model's own answers.
pub fn collect(model_folder: &Path, folder: &Path) -> PathBuf {
    let model = checkpoint::load(model_folder, Device::Cpu, Kind::Float).unwrap();
    let tokenizer = Tokenizer::load(model_folder).unwrap();
    let samples = prompt_set::read(&folder.join("prompts.jsonl")).unwrap();
    let requests: Vec<Request> = samples
        .iter()
        .map(|sample| Request {
            sample_id: sample.id.clone(),
            prompt_ids: tokenizer.encode_prompt(&sample.prompt).unwrap().1,
        })
        .collect();
    let stop = StopConditions { max_new_tokens: 14, eos_ids: tokenizer.eos_ids().to_vec() };
    let options = DecodeOptions { record_trajectory: true, ..DecodeOptions::greedy(Strategy::Jacobi { n: N }, 1) };
    let (answers, _) = decode(&model, &requests, &stop, options).unwrap();
    let provenance = Provenance {
        teacher: "t".to_owned(),
        tokenizer: tokenizer.fingerprint().to_owned(),
        vocab_size: tokenizer.vocab_size(),
        n: N,
        max_new_tokens: 14,
        eos_ids: tokenizer.eos_ids().to_vec(),
        seed: 1,
        prompts: "p".to_owned(),
        toolkit: cllm_core::VERSION.to_owned(),
        steps: Vec::new(),
    };
    let rows: Vec<Trajectory> = requests
        .into_iter()
        .zip(answers)
        .map(|(request, answer)| Trajectory {
            sample_id: request.sample_id,
            source: "jsonl/train".to_owned(),
            prompt: String::new(),
            prompt_ids: request.prompt_ids,
            response_ids: answer.response_ids,
            reference: None,
            blocks: answer.blocks,
            augmented: None,
            finish_reason: answer.finish_reason,
            meta: None,
        })
        .collect();
    let data = folder.join("trajectories");
    let mut writer = Writer::open(&data, provenance).unwrap();
    writer.write_shard(&rows).unwrap();
    writer.finish().unwrap();
    assert!(trajectory::Reader::open(&data).unwrap().num_rows() == 12);
    data
}

#[test]
fn a_teacher_and_its_student_learn_and_resume_exactly() {
    tch::set_num_threads(1);
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut teacher = Settings { epochs: 60, ..sft(dir.path(), "teacher") };
    teacher.optimizer.lr = 1e-2;
    trainer::run(teacher.clone()).unwrap();
    let losses = curve(dir.path().join("teacher").as_path());
    let (first, last) = (losses[0].1.as_f64().unwrap(), losses[losses.len() - 1].1.as_f64().unwrap());
    assert!(last < first * 0.6, "{first} -> {last}");
    let found = summary(&dir.path().join("teacher"));
    assert_eq!(found["steps"].as_u64().unwrap(), losses.len() as u64);
    for field in ["tokens_per_second", "parameters", "seconds", "final_losses"] {
        assert!(!found[field].is_null(), "{field}");
    }

    let teacher_folder = dir.path().join("teacher/final");
    let data = collect(&teacher_folder, dir.path());
    for context in [BlockContext::Clean, BlockContext::NoisyWindow] {
        let mut student = Settings {
            init: None,
            model: Some(teacher_folder.display().to_string()),
            objective: Objective::Consistency,
            datasets: vec![data.clone()],
            output: dir.path().join(format!("student-{context:?}")),
            epochs: 8,
            ..teacher.clone()
        };
        student.consistency.context = context;
        student.consistency.window_blocks = 2;
        student.consistency.ar_weight = 1.0;
        student.consistency.local_weight = if context == BlockContext::Clean { 0.5 } else { 0.0 };
        let run = student.output.clone();
        trainer::run(student.clone()).unwrap();
        let whole = curve(&run);
        let mean = |part: &[(u64, Value, Value)]| part.iter().filter_map(|line| line.2.as_f64()).sum::<f64>() / 4.0;
        let (first, last) = (mean(&whole[..4]), mean(&whole[whole.len() - 4..]));
        assert!(last < first * 0.9, "{context:?}: {first} -> {last}");

        let kept = dir.path().join("kept");
        std::fs::rename(run.join("final"), &kept).unwrap();
        std::fs::create_dir(run.join("final")).unwrap();
        cut_back(&run, 6);
        trainer::run(student).unwrap();
        assert_eq!(curve(&run), whole, "{context:?}: the curve of the resumed run");
        assert!(same_weights(&kept, &run.join("final")), "{context:?}");
        std::fs::remove_dir_all(&kept).unwrap();
    }
}

#[test]
fn a_probe_tells_the_answers_that_never_end_apart() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut settings = Settings { max_steps: Some(2), ..sft(dir.path(), "run") };
    (settings.validation.prompts, settings.validation.every) = (Some(dir.path().join("prompts.jsonl")), 1);
    (settings.validation.n, settings.validation.max_new_tokens) = (N, 20);
    trainer::run(settings).unwrap();
    let run = dir.path().join("run");
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let probes: Vec<Value> = lines.filter(|line| line["probe_tokens_per_forward"].is_number()).collect();
    // Two steps teach no model to end its answers: none of them makes a checkpoint the best. Cut answers are wrong.
    for probe in &probes {
        let found = ["probe_unfinished", "probe_tokens_per_forward_finished", "probe_accuracy"].map(|key| &probe[key]);
        assert_eq!(found, [&12.into(), &Value::Null, &0.0.into()]);
    }
    let found = summary(&run);
    assert_eq!(probes.iter().map(|probe| &probe["step"]).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!((probes.len(), &found["unfinished"], &found["best_probe"]), (3, &12.into(), &Value::Null));
    assert!(found["tokens_per_forward"].is_number() && !run.join("checkpoints/best").exists());
}

#[test]
fn ids_that_end_an_answer_can_be_named() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let mut settings = Settings { epochs: 60, eos_ids: Some(vec![5]), ..sft(dir.path(), "run") };
    settings.optimizer.lr = 1e-2;
    trainer::run(settings.clone()).unwrap();
    let model = dir.path().join("run/final");
    let tokenizer = Tokenizer::load(&model).unwrap();
    assert!(tokenizer.eos_ids().contains(&5), "{:?}", tokenizer.eos_ids());
    // Collected with what the model itself names: the answers that it learnt end with token 5.
    let rows = trajectory::Reader::open(&collect(&model, dir.path())).unwrap().rows().map(Result::unwrap);
    let ended = rows.filter(|row| row.response_ids.ends_with(&[5])).count();
    assert!(ended > 0, "no answer ends with token 5");
    let message = trainer::run(Settings { eos_ids: Some(vec![270]), ..settings }).unwrap_err().to_string();
    assert!(message.contains("eos_ids: 270 is no token of"), "{message}");
}

#[test]
fn a_student_of_every_family_resumes_exactly() {
    tch::set_num_threads(1);
    for (name, mut config) in shapes() {
        let dir = tempfile::tempdir().unwrap();
        prepare(dir.path());
        let model = dir.path().join("tokenizer");
        let vocab_size = Tokenizer::load(&model).unwrap().vocab_size();
        config["vocab_size"] = vocab_size.into();
        checkpoint::save(&random_model(&config, 5), &model, Kind::Float).unwrap();
        let mut student = Settings {
            init: None,
            objective: Objective::Consistency,
            datasets: vec![collect(&model, dir.path())],
            model: Some(model.display().to_string()),
            max_steps: Some(4),
            save_every: Some(2),
            ..sft(dir.path(), "run")
        };
        student.consistency.local_weight = 0.5;
        student.consistency.anchor_weight = 0.5;
        let run = dir.path().join("run");
        trainer::run(student.clone()).unwrap();
        let (whole, kept) = (curve(&run), dir.path().join("kept"));
        assert!(whole.len() == 4 && whole.iter().all(|line| line.2.is_number()), "{name}: {whole:?}");
        std::fs::rename(run.join("final"), &kept).unwrap();
        std::fs::create_dir(run.join("final")).unwrap();
        cut_back(&run, 2);
        trainer::run(student).unwrap();
        assert_eq!(curve(&run), whole, "{name}");
        assert!(same_weights(&kept, &run.join("final")), "{name}");
        assert!(!same_weights(&kept, &model), "{name}: it learnt nothing");
    }
}

#[test]
fn a_run_with_other_settings_in_the_same_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = Settings { max_steps: Some(2), ..sft(dir.path(), "run") };
    trainer::run(settings.clone()).unwrap();
    let message = trainer::run(Settings { seed: 9, ..settings }).unwrap_err().to_string();
    assert!(message.contains("`seed` was another (0 then, 9 now)"), "{message}");
}

#[test]
fn a_run_of_fewer_data_sets_or_in_another_order_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let [one, two] = ["prompts.jsonl", "more.jsonl"].map(|name| dir.path().join(name));
    let text = std::fs::read_to_string(&one).unwrap();
    std::fs::write(&two, text.replace("\"id\":\"", "\"id\":\"more-")).unwrap();
    let of = |data: Vec<PathBuf>| Settings { max_steps: Some(1), datasets: data, ..sft(dir.path(), "run") };
    trainer::run(of(vec![one.clone(), two.clone()])).unwrap();
    for data in [vec![one.clone()], vec![two, one]] {
        let message = trainer::run(of(data)).unwrap_err().to_string();
        assert!(message.contains("`data` was another"), "{message}");
    }
}

#[test]
fn a_run_whose_data_or_model_became_another_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let teacher = Settings { max_steps: Some(1), ..sft(dir.path(), "teacher") };
    trainer::run(teacher.clone()).unwrap();
    let model = dir.path().join("teacher/final");
    let data = collect(&model, dir.path());
    let student = Settings {
        init: None,
        model: Some(model.display().to_string()),
        objective: Objective::Consistency,
        datasets: vec![data.clone()],
        max_steps: Some(2),
        ..sft(dir.path(), "student")
    };
    trainer::run(student.clone()).unwrap();
    trainer::run(student.clone()).unwrap();
    let refused = |settings: &Settings, part: &str| {
        let message = trainer::run(settings.clone()).unwrap_err().to_string();
        assert!(message.contains(part) && message.contains("was another"), "{message}");
    };
    // Collected anew with fewer rows; then the file of an sft run; then the weights that a run starts from.
    let rows: Vec<_> = trajectory::Reader::open(&data).unwrap().rows().map(Result::unwrap).collect();
    let provenance = trajectory::Reader::open(&data).unwrap().provenance().clone();
    std::fs::remove_dir_all(&data).unwrap();
    let mut writer = Writer::open(&data, provenance).unwrap();
    writer.write_shard(&rows[..11]).unwrap();
    writer.finish().unwrap();
    refused(&student, &format!("the data {}", data.display()));
    let prompts = dir.path().join("prompts.jsonl");
    let text = std::fs::read_to_string(&prompts).unwrap();
    std::fs::write(&prompts, text.replace("It is 3.", "It is 4.")).unwrap();
    refused(&teacher, "prompts.jsonl");
    std::fs::remove_dir_all(&data).unwrap();
    collect(&model, dir.path());
    trainer::run(student.clone()).unwrap();
    let weights = checkpoint::load(&model, Device::Cpu, Kind::Float).unwrap();
    let (_, mut norm) = weights.named_parameters().pop().unwrap();
    let _ = tch::no_grad(|| norm.fill_(0.5));
    checkpoint::save(&weights, &model, Kind::Float).unwrap();
    refused(&student, &format!("the model {}", model.display()));
}

#[test]
fn a_run_without_finite_gradients_or_weights_ends_with_1_and_keeps_what_was_good() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    // The last norm of this model is `value` everywhere.
    let model_of = |name: &str, value: f64| {
        let folder = dir.path().join(name);
        trainer::run(Settings { max_steps: Some(1), ..sft(dir.path(), &format!("start-{name}")) }).unwrap();
        std::fs::rename(dir.path().join(format!("start-{name}/final")), &folder).unwrap();
        let model = checkpoint::load(&folder, Device::Cpu, Kind::Float).unwrap();
        let (_, mut norm) = model.named_parameters().into_iter().find(|(name, _)| name == "model.norm.weight").unwrap();
        let _ = tch::no_grad(|| norm.fill_(value));
        checkpoint::save(&model, &folder, Kind::Float).unwrap();
        folder.display().to_string()
    };
    let ended = |settings: &Settings, parts: &[&str]| {
        let error = trainer::run(settings.clone()).unwrap_err();
        let message = error.to_string();
        assert!(error.exit_code() == 1 && parts.iter().all(|part| message.contains(part)), "{message}");
        let run = settings.output.as_path();
        assert!(!run.join("final").exists() && !run.join("summary.json").exists());
    };
    let run = |name: &str, model: String| Settings {
        init: None,
        model: Some(model),
        max_steps: Some(3),
        ..sft(dir.path(), name)
    };
    let broken = model_of("broken", f64::NAN);
    let advice = "lower optimizer.lr";
    ended(&run("run", broken.clone()), &["after step 3 there are weights that are not finite", advice]);
    ended(
        &Settings { save_every: Some(2), ..run("saving", broken.clone()) },
        &["after step 2", "no checkpoint from before"],
    );
    assert!(!dir.path().join("saving/checkpoints").exists());
    let long = Settings { max_steps: Some(40), epochs: 40, log_every: 7, save_every: None, ..run("long", broken) };
    ended(&long, &["not finite 21 steps in a row", advice]);
    // Finite weights whose logits are not: the steps that are skipped change nothing.
    let overflowing = model_of("overflowing", 3e38);
    let long = Settings {
        max_steps: Some(40),
        epochs: 40,
        log_every: 30,
        save_every: Some(5),
        ..run("kept", overflowing.clone())
    };
    ended(&long, &["not finite 30 steps in a row", "the last checkpoint is kept"]);
    let kept = dir.path().join("kept/checkpoints/latest");
    assert!(same_weights(&kept, Path::new(&overflowing)));
    let short = run("short", overflowing);
    trainer::run(short.clone()).unwrap();
    assert_eq!(summary(Path::new(&short.output))["skipped_steps"], 3);
}
