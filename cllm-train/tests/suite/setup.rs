//! Shared by the tests: a tiny prompt set with a tokenizer, settings of tiny runs, trajectories,
//! and the outputs of runs.

use std::path::{Path, PathBuf};
use std::process::Child;

use cllm_core::checkpoint::{self, TensorFile};
use cllm_core::decode::{DecodeOptions, Request, StopConditions, Strategy, decode};
use cllm_core::fingerprint;
use cllm_core::prompt_set::{self, Prompt, Sample};
use cllm_core::tokenizer::Tokenizer;
use cllm_core::trajectory::{Provenance, Reader, Trajectory, Writer};
use cllm_train::settings::{ConsistencySettings, InitSettings, Objective, OptimizerSettings, Settings};
use cllm_train::{tokenizer_training, trainer};
use rand_chacha::rand_core::Rng;
use serde_json::Value;
use tch::{Device, Kind};

use cllm_testing::programs::{Program, path};

pub const TRAIN: Program = Program("cllm-train");

/// Block size of the trajectories.
pub const N: usize = 4;

/// Losses on the data alone, without a second model.
pub fn plain_consistency() -> ConsistencySettings {
    ConsistencySettings {
        ar_weight: 10.0,
        anchor_weight: 0.0,
        anchor_prompt_fraction: 0.0,
        ..ConsistencySettings::default()
    }
}

/// An optimizer that keeps no average of the weights.
pub fn plain_optimizer() -> OptimizerSettings {
    OptimizerSettings { ema_decay: None, ..OptimizerSettings::default() }
}

/// Makes `prompts.jsonl` with 12 prompts, and a tokenizer in `tokenizer`.
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

/// Settings of a run that trains a tiny random model on the references of what [`prepare`] made.
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
        keep_state: true,
        optimizer: OptimizerSettings { lr: 3e-3, ..plain_optimizer() },
        consistency: plain_consistency(),
        log_every: 1,
        save_every: Some(3),
        device: "cpu".to_owned(),
        ..Settings::default()
    }
}

/// Settings of a run that trains the model in `model` on its own trajectories.
pub fn consistency(folder: &Path, model: &Path, output: &str) -> Settings {
    Settings {
        init: None,
        model: Some(model.display().to_string()),
        objective: Objective::Consistency,
        datasets: vec![collect(model, folder)],
        ..sft(folder, output)
    }
}

/// Trains a teacher until it has learnt its prompts. Returns its folder.
pub fn trained_teacher(folder: &Path) -> PathBuf {
    let mut settings = Settings { epochs: 60, save_every: None, ..sft(folder, "teacher") };
    settings.optimizer.lr = 1e-2;
    trainer::run(settings).unwrap();
    folder.join("teacher/final")
}

/// Collects trajectories of a model's own answers to the prompts in `folder`.
pub fn collect(model_folder: &Path, folder: &Path) -> PathBuf {
    const MAX_NEW_TOKENS: usize = 14;
    let model = checkpoint::load(model_folder, Device::Cpu, Kind::Float).unwrap();
    let tokenizer = Tokenizer::load(model_folder).unwrap();
    let samples = prompt_set::read(&folder.join("prompts.jsonl")).unwrap();
    let request = |sample: &Sample| Request {
        sample_id: sample.id.clone(),
        prompt_ids: tokenizer.encode_prompt(&sample.prompt).unwrap().1,
    };
    let requests: Vec<Request> = samples.iter().map(request).collect();
    let stop = StopConditions::new(MAX_NEW_TOKENS, tokenizer.eos_ids().to_vec());
    let options = DecodeOptions { record_trajectory: true, ..DecodeOptions::greedy(Strategy::Jacobi { n: N }, 1) };
    let (answers, _) = decode(&model, &requests, &stop, options).unwrap();
    let rows = requests.into_iter().zip(answers).map(|(request, answer)| Trajectory {
        sample_id: request.sample_id,
        source: "jsonl/train".to_owned(),
        prompt: String::new(),
        prompt_ids: request.prompt_ids,
        response_ids: answer.response_ids,
        reference: None,
        reference_ids: None,
        blocks: answer.blocks,
        augmented: None,
        finish_reason: answer.finish_reason,
        meta: None,
    });
    let provenance = Provenance {
        teacher: "t".to_owned(),
        teacher_name: None,
        teacher_base: None,
        tokenizer: tokenizer.fingerprint().to_owned(),
        vocab_size: tokenizer.vocab_size(),
        n: N,
        max_new_tokens: MAX_NEW_TOKENS,
        thought_closing: None,
        eos_ids: tokenizer.eos_ids().to_vec(),
        seed: 1,
        prompts: "p".to_owned(),
        rendering: tokenizer.rendering_record(),
        toolkit: cllm_core::VERSION.to_owned(),
        steps: Vec::new(),
    };
    let data_set = folder.join("trajectories");
    write_trajectories(&data_set, provenance, &rows.collect::<Vec<_>>());
    assert_eq!(Reader::open(&data_set).unwrap().num_rows(), 12);
    data_set
}

/// Writes a data set in place of any that is there.
pub fn write_trajectories(data_set: &Path, provenance: Provenance, rows: &[Trajectory]) {
    let _ = std::fs::remove_dir_all(data_set);
    let mut writer = Writer::open(data_set, provenance).unwrap();
    writer.write_shard(rows).unwrap();
    writer.finish().unwrap();
}

/// Reads a data set whole.
pub fn read_trajectories(data_set: &Path) -> (Provenance, Vec<Trajectory>) {
    let reader = Reader::open(data_set).unwrap();
    (reader.provenance().clone(), reader.rows().map(Result::unwrap).collect())
}

/// Writes settings into `settings.yaml` and returns its path.
pub fn settings_file(folder: &Path, settings: &impl serde::Serialize) -> String {
    let file = path(folder, "settings.yaml");
    std::fs::write(&file, cllm_core::settings::to_yaml(settings).unwrap()).unwrap();
    file
}

/// The folder of the model that a run starts from.
pub fn initial_model(settings: &Settings) -> &Path {
    Path::new(settings.model.as_deref().unwrap())
}

/// The lines of metrics.jsonl.
pub fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The number of whole lines that metrics.jsonl has so far.
pub fn num_metrics(run: &Path) -> usize {
    std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default().lines().count()
}

/// The lines of metrics.jsonl without durations and speeds, which differ between equal runs.
pub fn reproducible_metrics(run: &Path) -> Vec<Value> {
    let mut lines = metrics(run);
    for line in &mut lines {
        line.as_object_mut().unwrap().retain(|key, _| !key.contains("second"));
    }
    lines
}

/// Losses of one step, as metrics.jsonl has them.
#[derive(Debug, PartialEq)]
pub struct StepLosses {
    pub step: u64,
    pub ar: f64,
    pub global: f64,
    pub anchor: f64,
}

/// The losses of all steps.
pub fn loss_curve(run: &Path) -> Vec<StepLosses> {
    let loss = |line: &Value, key: &str| line[key].as_f64().unwrap_or(f64::NAN);
    let steps = metrics(run).into_iter().filter(|line| line["loss"].is_number());
    let losses = steps.map(|line| StepLosses {
        step: line["step"].as_u64().unwrap(),
        ar: loss(&line, "ar_loss"),
        global: loss(&line, "global_loss"),
        anchor: loss(&line, "anchor_loss"),
    });
    losses.collect()
}

/// Waits until a run has got further than before its last kills, and then until a random moment
/// while it saves.
pub fn wait_for_a_save(run: &Path, num_kills: usize, process: &mut Child) {
    let is_saving = || {
        let entries = std::fs::read_dir(run.join("checkpoints")).into_iter().flatten();
        entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with(".writing-"))
    };
    while num_metrics(run) <= num_kills || !is_saving() {
        if process.try_wait().unwrap().is_some() {
            let message = std::io::read_to_string(process.stderr.take().unwrap()).unwrap();
            panic!("the run ended before it could be killed: {message}");
        }
        std::thread::yield_now();
    }
    let mut random = fingerprint::derive_rng(1, "kill", num_kills as u64);
    // On a busy machine a moment can be long, and the run must not reach its end.
    let num_steps = num_metrics(run);
    for _ in 0..random.next_u32() % 200 {
        if num_metrics(run) > num_steps + 3 {
            break;
        }
        std::thread::yield_now();
    }
}

/// Every checkpoint of a run has whole files, and those of all processes.
#[track_caller]
pub fn assert_checkpoints_are_whole(run: &Path, num_processes: usize) {
    for entry in std::fs::read_dir(run.join("checkpoints")).unwrap() {
        let folder = entry.unwrap().path();
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        if !name.starts_with("step-") {
            continue;
        }
        let state: Value = serde_json::from_slice(&std::fs::read(folder.join("state.json")).unwrap()).unwrap();
        assert_eq!(name, format!("step-{:06}", state["step"].as_u64().unwrap()));
        checkpoint::load(&folder, Device::Cpu, Kind::Float).unwrap();
        for process in 1..=num_processes {
            let file = folder.join(format!("optimizer-{process:05}-of-{num_processes:05}.safetensors"));
            TensorFile::open(&file, "").unwrap();
        }
    }
}

pub fn summary(run: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(run.join("summary.json")).unwrap()).unwrap()
}

pub fn have_same_weights(a: &Path, b: &Path) -> bool {
    let load = |folder: &Path| checkpoint::load(folder, Device::Cpu, Kind::Float).unwrap().named_parameters();
    load(a).iter().zip(load(b)).all(|((_, a), (_, b))| a.equal(&b))
}

/// Leaves a finished run as a kill after `step` would have left it.
pub fn rewind_to(run: &Path, step: usize) {
    let checkpoints = run.join("checkpoints");
    std::fs::remove_file(checkpoints.join("latest")).unwrap();
    std::os::unix::fs::symlink(format!("step-{step:06}"), checkpoints.join("latest")).unwrap();
    std::fs::remove_dir_all(run.join("final")).unwrap();
    std::fs::remove_file(run.join("summary.json")).unwrap();
}

/// Rewinds a finished run to `step` and resumes it. It must have the same course and the same final
/// weights as before.
#[track_caller]
pub fn assert_resumes_exactly(settings: &Settings, step: usize) {
    let run = &settings.output;
    let before = reproducible_metrics(run);
    let kept = run.with_extension("kept");
    let _ = std::fs::remove_dir_all(&kept);
    std::fs::rename(run.join("final"), &kept).unwrap();
    std::fs::create_dir(run.join("final")).unwrap();
    rewind_to(run, step);
    trainer::run(settings.clone()).unwrap();
    assert_eq!(reproducible_metrics(run), before);
    assert!(have_same_weights(&kept, &run.join("final")));
}
