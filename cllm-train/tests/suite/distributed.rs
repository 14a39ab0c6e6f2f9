//! Several processes on the CPU, over Gloo: they train as one does, the main one writes, and a run
//! resumes with any number of processes.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use cllm_core::checkpoint;
use cllm_core::model::{AdaptedTokens, LoraConfig};
use cllm_testing::programs::handles_signal;
use cllm_train::settings::{ConsistencySettings, OptimizerSettings, Settings, ValidationSettings};
use cllm_train::trainer;
use tch::{Device, Kind};

use crate::setup::{
    N, TRAIN, assert_checkpoints_are_whole, consistency, have_same_weights, loss_curve, metrics, num_metrics,
    plain_consistency, plain_optimizer, prepare, rewind_to, settings_file, sft, summary, wait_for_a_save,
};

/// Runs `cllm-train run -c FILE ...` in the folder beside the file that is named after the rank.
const IN_OWN_FOLDER: [&str; 4] = ["sh", "-c", "cd \"${4%/*}/$RANK\"; exec \"$@\"", "sh"];

/// Starts the processes of a run as torchrun does.
fn start(file: &str, world_size: usize) -> Vec<Child> {
    start_each(world_size, |_| (Vec::new(), vec!["run".to_owned(), "-c".to_owned(), file.to_owned()]))
}

/// Starts processes whose commands differ: for each rank, the command before the program and its
/// arguments.
fn start_each(world_size: usize, words: impl Fn(usize) -> (Vec<&'static str>, Vec<String>)) -> Vec<Child> {
    // The process that serves the store starts last.
    let ranks: Vec<usize> = (0..world_size).rev().collect();
    start_ranks(&ranks, world_size, words)
}

fn start_ranks(
    ranks: &[usize],
    world_size: usize,
    words: impl Fn(usize) -> (Vec<&'static str>, Vec<String>),
) -> Vec<Child> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let process = |&rank: &usize| {
        let variables =
            [("WORLD_SIZE", world_size), ("RANK", rank), ("LOCAL_RANK", rank), ("MASTER_PORT", usize::from(port))];
        let (prefix, arguments) = words(rank);
        let mut command = TRAIN.command(&prefix);
        command.args(arguments).env("MASTER_ADDR", "127.0.0.1");
        command.envs(variables.map(|(name, value)| (name, value.to_string())));
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    ranks.iter().map(process).collect()
}

/// Starts one of two processes. The other never comes.
fn start_alone(file: &str, rank: usize) -> Child {
    start_ranks(&[rank], 2, |_| (Vec::new(), vec!["run".to_owned(), "-c".to_owned(), file.to_owned()])).swap_remove(0)
}

/// Exit codes of the processes, and everything they wrote to stderr.
fn wait(processes: Vec<Child>) -> (Vec<Option<i32>>, String) {
    let outputs: Vec<_> = processes.into_iter().map(|process| process.wait_with_output().unwrap()).collect();
    let stderr = outputs.iter().map(|output| String::from_utf8_lossy(&output.stderr).into_owned()).collect();
    (outputs.iter().map(|output| output.status.code()).collect(), stderr)
}

#[track_caller]
fn run_processes(file: &str, world_size: usize) {
    let (codes, stderr) = wait(start(file, world_size));
    assert!(codes.iter().all(|code| *code == Some(0)), "{stderr}");
}

fn settings(folder: &Path, output: &str) -> Settings {
    let optimizer = OptimizerSettings { lr: 3e-3, weight_decay: 0.1, ema_decay: Some(0.5), ..plain_optimizer() };
    Settings { accumulation: 4, max_batch_tokens: 64, max_example_tokens: 64, optimizer, ..sft(folder, output) }
}

/// Two runs have the same losses and final weights up to the order in which numbers are added.
#[track_caller]
fn assert_close(a: &Path, b: &Path) {
    let (losses_a, losses_b) = (loss_curve(a), loss_curve(b));
    assert_eq!(losses_a.len(), losses_b.len());
    for (a, b) in losses_a.iter().zip(&losses_b) {
        assert!((a.ar - b.ar).abs() < 1e-5 * a.ar.max(1.0), "{a:?} {b:?}");
    }
    let [a, b] = [a, b].map(|run| checkpoint::load(&run.join("final"), Device::Cpu, Kind::Float).unwrap());
    let difference = (a.weights().buffer() - b.weights().buffer()).abs().max().double_value(&[]);
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn two_and_three_processes_train_as_one_does() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    trainer::run(settings(dir.path(), "one")).unwrap();
    let one = dir.path().join("one");
    for world_size in [2, 3] {
        let run = dir.path().join(format!("of-{world_size}"));
        let settings = Settings { output: run.clone(), ..settings(dir.path(), "") };
        run_processes(&settings_file(dir.path(), &settings), world_size);
        assert_close(&one, &run);
        let file_names = |run: &Path| {
            let mut names: Vec<_> = fs::read_dir(run).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            names
        };
        assert_eq!(file_names(&run), file_names(&one));
    }
    let too_few = Settings { accumulation: 1, ..settings(dir.path(), "too-few") };
    let (codes, stderr) = wait(start(&settings_file(dir.path(), &too_few), 2));
    assert_eq!(codes, [Some(2), Some(2)]);
    assert!(stderr.contains("accumulation=1 is too few for 2 processes"), "{stderr}");
}

#[test]
fn a_signal_ends_a_process_that_waits_for_another_to_start() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let file = settings_file(dir.path(), &settings(dir.path(), "run"));
    for (rank, signal, code) in [(0, "INT", 130), (1, "TERM", 143)] {
        let process = start_alone(&file, rank);
        while !handles_signal(process.id(), signal) {
            std::thread::yield_now();
        }
        send_signal(&process, signal);
        let (codes, stderr) = wait(vec![process]);
        assert_eq!(codes, [Some(code)], "{stderr}");
        assert!(stderr.starts_with("error: interrupted") && stderr.lines().count() == 1, "{stderr}");
    }
}

/// Matrices of the last layer belong to more than one process, and in the last step of an epoch some
/// of three processes have no batch.
#[test]
fn gradients_are_sharded_where_each_process_has_one_batch() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let prompts = fs::read_to_string(dir.path().join("prompts.jsonl")).unwrap();
    let ten = dir.path().join("ten.jsonl");
    fs::write(&ten, prompts.lines().take(10).map(|line| format!("{line}\n")).collect::<String>()).unwrap();
    for (world_size, checkpointed_layers, num_steps) in [(2, 0, 10), (3, 1, 8)] {
        let run = |name: &str| {
            let mut settings = settings(dir.path(), &format!("{name}-{world_size}"));
            settings.datasets = vec![ten.clone()];
            (settings.accumulation, settings.checkpointed_layers, settings.epochs) =
                (world_size, checkpointed_layers, 2);
            // One example in each batch.
            (settings.max_batch_tokens, settings.max_example_tokens) = (40, 40);
            if let Some(init) = &mut settings.init {
                (init.hidden_size, init.intermediate_size, init.num_layers) = (128, 256, 3);
            }
            settings
        };
        let (one, many, again) = (run("one"), run("many"), run("again"));
        trainer::run(one.clone()).unwrap();
        assert_eq!(loss_curve(&one.output).len(), num_steps);
        for settings in [&many, &again] {
            run_processes(&settings_file(dir.path(), settings), world_size);
        }
        assert_close(&one.output, &many.output);
        assert!(have_same_weights(&many.output.join("final"), &again.output.join("final")));
    }
}

#[test]
fn an_interrupted_run_of_two_resumes_exactly_with_two_and_closely_with_one() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = |output: &str| Settings { epochs: 60, save_every: None, ..settings(dir.path(), output) };
    run_processes(&settings_file(dir.path(), &settings("whole")), 2);
    let file = settings_file(dir.path(), &settings("interrupted"));
    let (whole, interrupted) = (dir.path().join("whole"), dir.path().join("interrupted"));
    let processes = start(&file, 2);
    while num_metrics(&interrupted) < 3 {
        std::thread::yield_now();
    }
    // One process gets the signal, and both stop.
    send_signal(&processes[0], "TERM");
    let (codes, stderr) = wait(processes);
    assert_eq!(codes, [Some(143), Some(143)], "{stderr}");
    let steps = loss_curve(&interrupted).len();
    assert!((3..loss_curve(&whole).len()).contains(&steps), "{steps}");
    run_processes(&file, 2);
    assert_eq!(loss_curve(&interrupted), loss_curve(&whole));
    assert!(have_same_weights(&interrupted.join("final"), &whole.join("final")));
    rewind_to(&interrupted, steps);
    trainer::run(settings("interrupted")).unwrap();
    assert_close(&interrupted, &whole);
}

/// Two processes that are killed at some moments of their saves resume to the curve and the weights
/// of a run that is not.
#[track_caller]
fn assert_killed_runs_resume(accumulation: usize, num_kills: usize) {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = |output: &str| Settings {
        accumulation,
        epochs: 1000,
        max_steps: Some(16 * num_kills),
        save_every: Some(1),
        max_checkpoints: 2,
        ..settings(dir.path(), output)
    };
    run_processes(&settings_file(dir.path(), &Settings { save_every: None, ..settings("whole") }), 2);
    let file = settings_file(dir.path(), &settings("killed"));
    let (whole, killed) = (dir.path().join("whole"), dir.path().join("killed"));
    for kill in 0..num_kills {
        let mut processes = start(&file, 2);
        wait_for_a_save(&killed, kill, &mut processes[1]);
        // Either dies first, and the other may get a little further.
        processes.rotate_left(kill % 2);
        processes.iter_mut().for_each(|process| process.kill().unwrap());
        wait(processes);
        assert_checkpoints_are_whole(&killed, 2);
    }
    run_processes(&file, 2);
    assert_eq!(loss_curve(&killed), loss_curve(&whole));
    assert!(have_same_weights(&killed.join("final"), &whole.join("final")));
}

#[test]
fn two_processes_killed_while_they_save_resume_to_the_same_curve() {
    assert_killed_runs_resume(4, 6);
}

#[test]
fn two_processes_with_sharded_gradients_killed_while_they_save_resume_to_the_same_curve() {
    assert!(Settings { accumulation: 2, ..Settings::default() }.shards_gradients(2));
    assert_killed_runs_resume(2, 3);
}

#[test]
fn two_processes_validate_with_an_anchor_and_adapters_as_one_does() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    trainer::run(sft(dir.path(), "teacher")).unwrap();
    let student = consistency(dir.path(), &dir.path().join("teacher/final"), "student");
    let prompts = Some(dir.path().join("prompts.jsonl"));
    let trajectories = Some(student.datasets[0].clone());
    let validation = ValidationSettings { every: 1, n: N, max_new_tokens: 8, ..ValidationSettings::default() };
    let losses_only = ValidationSettings { trajectories: trajectories.clone(), ..validation.clone() };
    let both = ValidationSettings { trajectories, prompts: prompts.clone(), patience: Some(2), ..validation.clone() };
    let answers_only = ValidationSettings { prompts, ..validation };
    let adapters = Some(LoraConfig::default());
    let for_drafts = Some(LoraConfig { on: AdaptedTokens::Drafts, first_layer: 1, ..LoraConfig::default() });
    let anchored = ConsistencySettings { anchor_weight: 1.0, local_weight: 0.5, ..plain_consistency() };
    let proposing = ConsistencySettings { ar_weight: 0.0, anchor_weight: 0.0, ..plain_consistency() };
    for (name, validation, lora, consistency) in [
        ("losses", losses_only.clone(), None, &anchored),
        ("both", both, None, &anchored),
        ("adapters", answers_only, adapters, &anchored),
        ("adapters for drafts", losses_only, for_drafts, &proposing),
    ] {
        let run = |output: &str| Settings {
            output: dir.path().join(output),
            lora: lora.clone(),
            max_batch_tokens: 256,
            max_example_tokens: 256,
            epochs: 4,
            accumulation: 4,
            optimizer: settings(dir.path(), "").optimizer,
            consistency: consistency.clone(),
            validation: validation.clone(),
            ..student.clone()
        };
        let (one, two) = (run(&format!("{name}-one")), run(&format!("{name}-two")));
        trainer::run(one.clone()).unwrap();
        run_processes(&settings_file(dir.path(), &two), 2);
        assert_close(&one.output, &two.output);
        assert_eq!(summary(&one.output)["stopped_early"], summary(&two.output)["stopped_early"]);
        let num_validations = [&one, &two].map(|run| {
            let is_validation = |line: &&serde_json::Value| line.to_string().contains("validation_");
            metrics(&run.output).iter().filter(is_validation).count()
        });
        assert!(num_validations[0] > 1 && num_validations[0] == num_validations[1], "{name}: {num_validations:?}");
    }
}

/// Waits for processes of which the one of this rank fails, and asserts that all end with this exit
/// code and say why that one failed.
#[track_caller]
fn assert_all_end(processes: Vec<Child>, failed: usize, code: i32, message: &str) {
    let world_size = processes.len();
    let outputs = processes.into_iter().map(|process| process.wait_with_output().unwrap());
    for (rank, output) in (0..world_size).rev().zip(outputs) {
        let stderr = String::from_utf8_lossy(&output.stderr);
        if rank != failed {
            assert!(stderr.contains(&format!("error: process {failed} of {world_size} failed: ")), "{rank}: {stderr}");
        }
        assert!(stderr.contains(message) && !stderr.contains("internal error"), "{rank}: {stderr}");
        assert_eq!(output.status.code(), Some(code), "{rank}: {stderr}");
    }
}

#[test]
fn an_error_of_one_process_before_the_first_step_ends_all() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let file = settings_file(dir.path(), &settings(dir.path(), "run"));
    let run = |failed: usize, argument: &str| {
        start_each(2, |rank| {
            let own = if rank == failed { argument } else { "seed=1" };
            (Vec::new(), ["run", "-c", &file, own].map(str::to_owned).into())
        })
    };
    for failed in [0, 1] {
        assert_all_end(run(failed, "optimizer.lr=-1"), failed, 2, "optimizer.lr");
        // The settings are the same, but one process has no such folder.
        for rank in [0, 1] {
            fs::create_dir_all(dir.path().join(format!("{rank}"))).unwrap();
        }
        let tokenizer = dir.path().join(format!("{}/tokenizer", 1 - failed));
        std::os::unix::fs::symlink(dir.path().join("tokenizer"), &tokenizer).unwrap();
        let arguments = ["run", "-c", &file, "init.tokenizer=tokenizer"].map(str::to_owned);
        let processes = start_each(2, |_| (IN_OWN_FOLDER.into(), arguments.clone().into()));
        assert_all_end(processes, failed, 2, "tokenizer");
        fs::remove_file(tokenizer).unwrap();
    }
}

#[test]
fn processes_with_other_settings_or_data_are_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let settings = settings(dir.path(), "run");
    let file = settings_file(dir.path(), &settings);
    let other = dir.path().join("other");
    let output = format!("output={}", other.display());
    for (argument, values) in
        [("seed=5", "seed=0 and seed=5"), ("log_every=7", "log_every=1 and log_every=7"), (&output, "output=")]
    {
        let processes = start_each(2, |rank| {
            let own = if rank == 1 { argument } else { "seed=0" };
            (Vec::new(), ["run", "-c", &file, own].map(str::to_owned).into())
        });
        assert_all_end(processes, 1, 2, &format!("processes 0 and 1 have different settings: {values}"));
    }
    let prompts = fs::read_to_string(dir.path().join("prompts.jsonl")).unwrap();
    for (rank, text) in [("0", prompts.clone()), ("1", prompts.replace("It is 3.", "It is 4."))] {
        fs::create_dir(dir.path().join(rank)).unwrap();
        fs::write(dir.path().join(rank).join("prompts.jsonl"), text).unwrap();
    }
    let arguments = ["run", "-c", &file, "datasets=[prompts.jsonl]"].map(str::to_owned);
    let processes = start_each(2, |_| (IN_OWN_FOLDER.into(), arguments.clone().into()));
    assert_all_end(processes, 1, 2, "processes 0 and 1 have different versions of the data set prompts.jsonl");
    // A process that another one ends leaves its lock, which nobody holds.
    let written = fs::read_dir(&settings.output).into_iter().flatten().map(|entry| entry.unwrap().file_name());
    assert!(written.into_iter().all(|name| name == ".lock") && !other.exists());
}

#[test]
fn a_full_disk_ends_all_processes() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    let file = settings_file(dir.path(), &settings(dir.path(), "full"));
    let processes = start_each(3, |rank| {
        let prefix = if rank == 0 { vec!["sh", "-c", "ulimit -f 64; exec \"$@\"", "sh"] } else { Vec::new() };
        (prefix, ["run", "-c", &file].map(str::to_owned).into())
    });
    assert_all_end(processes, 0, 3, "cannot be written");
}

#[test]
fn a_killed_process_ends_all() {
    let dir = tempfile::tempdir().unwrap();
    prepare(dir.path());
    for killed in [0, 2] {
        let settings = Settings { epochs: 100_000, ..settings(dir.path(), &format!("killed-{killed}")) };
        let mut processes = start(&settings_file(dir.path(), &settings), 3);
        while num_metrics(&settings.output) < 3 {
            std::thread::yield_now();
        }
        let mut process = processes.remove(2 - killed);
        process.kill().unwrap();
        process.wait().unwrap();
        let (codes, stderr) = wait(processes);
        assert_eq!(codes, [Some(3), Some(3)], "{stderr}");
        assert_eq!(stderr.matches(&format!("error: process {killed} of 3 failed: it ")).count(), 2, "{stderr}");
        assert_eq!(stderr.matches("ended without a message").count(), 2, "{stderr}");
        assert!(!stderr.contains("frame #"), "{stderr}");
    }
}

fn send_signal(process: &Child, name: &str) {
    let id = process.id().to_string();
    assert!(Command::new("kill").args([&format!("-{name}"), &id]).status().unwrap().success());
}
