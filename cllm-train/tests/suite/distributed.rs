//! Several processes on the CPU, over Gloo: they train as one does, one of them writes, and a run goes on with any number.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use cllm_core::checkpoint;
use cllm_core::model::LoraConfig;
use cllm_train::settings::{ConsistencySettings, Objective, OptimizerSettings, Settings, ValidationSettings};
use serde_json::Value;
use tch::{Device, Kind};

use crate::runs::{N, collect, curve, cut_back, prepare, same_weights, sft, summary};
use cllm_testing::programs::{Program, path};

const TRAIN: Program = Program("cllm-train");

/// Starts `world` processes of a run as torchrun does.
fn start(file: &str, world: usize) -> Vec<Child> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let process = |rank: usize| {
        let numbers = [("WORLD_SIZE", world), ("RANK", rank), ("LOCAL_RANK", rank), ("MASTER_PORT", usize::from(port))];
        let mut command = TRAIN.command(&[]);
        command.args(["run", "-c", file]).env("MASTER_ADDR", "127.0.0.1");
        command.envs(numbers.map(|(name, value)| (name, value.to_string())));
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    // The one that keeps the store comes last.
    (0..world).rev().map(process).collect()
}

/// Exit codes, and what all of them said.
fn ended(processes: Vec<Child>) -> (Vec<Option<i32>>, String) {
    let ends: Vec<_> = processes.into_iter().map(|process| process.wait_with_output().unwrap()).collect();
    let said = ends.iter().map(|end| String::from_utf8_lossy(&end.stderr).into_owned()).collect();
    (ends.iter().map(|end| end.status.code()).collect(), said)
}

fn succeed(file: &str, world: usize) {
    let (codes, said) = ended(start(file, world));
    assert!(codes.iter().all(|code| *code == Some(0)), "{said}");
}

fn settings(folder: &Path, output: &str) -> Settings {
    let optimizer =
        OptimizerSettings { lr: 3e-3, weight_decay: 0.1, ema_decay: Some(0.5), ..OptimizerSettings::default() };
    Settings { accumulation: 4, max_batch_tokens: 64, max_example_tokens: 64, optimizer, ..sft(folder, output) }
}

fn written(folder: &Path, settings: &Settings) -> String {
    let file = path(folder, "run.yaml");
    fs::write(&file, cllm_core::settings::to_yaml(settings).unwrap()).unwrap();
    file
}

fn near(a: &Path, b: &Path) {
    let (one, other) = (curve(a), curve(b));
    assert_eq!(one.len(), other.len());
    let number = |value: &Value| value.as_f64().unwrap();
    for ((step, loss, _), (_, other, _)) in one.iter().zip(&other) {
        let apart = (number(loss) - number(other)).abs();
        assert!(apart < 1e-5 * number(loss).max(1.0), "step {step}: {loss} {other}");
    }
    let load = |run: &Path| checkpoint::load(&run.join("final"), Device::Cpu, Kind::Float).unwrap();
    let (one, other) = (load(a), load(b));
    let apart = (one.weights().buffer() - other.weights().buffer()).abs().max().double_value(&[]);
    assert!(apart < 1e-5, "{apart}");
}

#[test]
fn two_and_three_processes_train_as_one_does() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let run = |name: &str| settings(dir.path(), name);
    cllm_train::trainer::run(run("one")).unwrap();
    for world in [2, 3] {
        let name = format!("of-{world}");
        succeed(&written(dir.path(), &run(&name)), world);
        near(&dir.path().join("one"), &dir.path().join(&name));
        let files = |name: &str| {
            let names = fs::read_dir(dir.path().join(name)).unwrap().map(|entry| entry.unwrap().file_name());
            let mut names: Vec<_> = names.filter(|name| !name.to_string_lossy().contains("tfevents")).collect();
            names.sort();
            names
        };
        assert_eq!(files(&name), files("one"));
    }
    let few = written(dir.path(), &Settings { accumulation: 1, ..run("few") });
    let (codes, said) = ended(start(&few, 2));
    assert!(codes == [Some(2), Some(2)] && said.contains("accumulation is 1, for 2 processes"), "{codes:?} {said}");
}

#[test]
fn a_run_of_two_that_was_stopped_goes_on_to_the_same_weights_with_two_and_to_near_ones_with_one() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let run = |name: &str| Settings { epochs: 60, save_every: None, ..settings(dir.path(), name) };
    succeed(&written(dir.path(), &run("whole")), 2);
    let file = written(dir.path(), &run("stopped"));
    let stopped = dir.path().join("stopped");
    let processes = start(&file, 2);
    while curve_so_far(&stopped) < 3 {
        std::thread::yield_now();
    }
    // One of them hears it; all of them stop.
    signal(&processes[0], "TERM");
    let (codes, said) = ended(processes);
    assert_eq!(codes, [Some(143), Some(143)], "{said}");
    let steps = curve(&stopped).len();
    assert!((3..curve(&dir.path().join("whole")).len()).contains(&steps), "{steps}");
    succeed(&file, 2);
    let whole = dir.path().join("whole");
    assert!(curve(&stopped) == curve(&whole) && same_weights(&stopped.join("final"), &whole.join("final")));
    cut_back(&stopped, steps);
    cllm_train::trainer::run(run("stopped")).unwrap();
    near(&stopped, &whole);
}

#[test]
fn two_processes_probe_with_an_anchor_and_adapters_as_one_does() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    cllm_train::trainer::run(sft(dir.path(), "teacher")).unwrap();
    let model = dir.path().join("teacher/final");
    let data = collect(&model, dir.path());
    // What is probed is losses alone, losses and answers, and nothing; the second ends early.
    let kinds = [
        ("losses", true, false, None),
        ("both", true, true, None),
        ("adapters", false, true, Some(LoraConfig::default())),
    ];
    for (name, trajectories, prompts, lora) in kinds {
        let path = |wanted: bool, path: std::path::PathBuf| wanted.then_some(path);
        let run = |name: String| Settings {
            init: None,
            lora: lora.clone(),
            model: Some(model.display().to_string()),
            objective: Objective::Consistency,
            datasets: vec![data.clone()],
            max_batch_tokens: 256,
            max_example_tokens: 256,
            epochs: 4,
            consistency: ConsistencySettings {
                anchor_weight: 1.0,
                local_weight: 0.5,
                ..ConsistencySettings::default()
            },
            validation: ValidationSettings {
                trajectories: path(trajectories, data.clone()),
                prompts: path(prompts, dir.path().join("prompts.jsonl")),
                every: 1,
                n: N,
                max_new_tokens: 8,
                patience: (name == "both").then_some(2),
                ..ValidationSettings::default()
            },
            ..settings(dir.path(), &name)
        };
        let (one, two) = (format!("{name}-one"), format!("{name}-two"));
        cllm_train::trainer::run(run(one.clone())).unwrap();
        succeed(&written(dir.path(), &run(two.clone())), 2);
        near(&dir.path().join(&one), &dir.path().join(&two));
        let early = |name: &str| summary(&dir.path().join(name))["stopped_early"].clone();
        assert_eq!(early(&one), early(&two));
        let probes = |name: &str| {
            let text = fs::read_to_string(dir.path().join(name).join("metrics.jsonl")).unwrap();
            text.lines().filter(|line| line.contains("held_out") || line.contains("probe_")).count()
        };
        assert!(probes(&one) > 1 && probes(&one) == probes(&two), "{name}");
    }
}

#[test]
fn where_one_process_is_killed_the_other_says_so() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let run = Settings { epochs: 100_000, ..settings(dir.path(), "killed") };
    let mut processes = start(&written(dir.path(), &run), 2);
    while curve_so_far(&dir.path().join("killed")) < 3 {
        std::thread::yield_now();
    }
    processes[0].kill().unwrap();
    let (codes, said) = ended(processes);
    assert_eq!(codes[1], Some(1), "{said}");
    assert!(said.contains("one of them has ended or hangs"), "{said}");
}

/// Lines of metrics.jsonl.
fn curve_so_far(run: &Path) -> usize {
    fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default().lines().count()
}

fn signal(process: &Child, name: &str) {
    let id = process.id().to_string();
    assert!(Command::new("kill").args([&format!("-{name}"), &id]).status().unwrap().success());
}
