//! Stops programs at their operations on files, starts them again, and compares what they make with
//! what they make undisturbed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use cllm_core::disk::FAULT;

use crate::programs::Program;

/// Number of cases of each kind: `CLLM_TORTURE`, which `scripts/torture` sets, or a few.
fn num_cases() -> usize {
    std::env::var("CLLM_TORTURE").map_or(5, |text| text.parse().unwrap())
}

/// A way to stop a program.
#[derive(Debug, Clone, Copy)]
enum Stop {
    /// Kill it at an operation on files, counted from 1; with `loss`, what it did not sync is lost.
    AtStep { step: usize, loss: bool },
    /// Kill it within a write.
    InWrite(usize),
    /// A write meets a full disk.
    FullDisk(usize),
    /// Kill it after a time.
    After(Duration),
}

/// What one undisturbed run did.
struct Course {
    num_steps: usize,
    num_writes: usize,
    duration: Duration,
}

/// Stops a command at its operations on files in every way, a number of times each, and starts it
/// again until it succeeds. `outcome` reads what the command made in `output`; it must be that of
/// an undisturbed run each time, and nothing half-written may be left.
pub fn torture<T: PartialEq + Debug>(
    program: &Program,
    arguments: &[String],
    output: &Path,
    outcome: impl Fn(&Path) -> T,
) {
    let course = undisturbed(program, arguments, output);
    let expected = outcome(output);
    let mut num_stopped = BTreeMap::<&str, usize>::new();
    for stop in stops(&course) {
        remove(output);
        // The second time, it is stopped while it resumes.
        for _ in 0..2 {
            let status = run_with(program, arguments, stop);
            *num_stopped.entry(stop.name()).or_default() += usize::from(was_stopped(status, stop));
        }
        let resumed = program.run(arguments);
        assert_eq!(resumed.code, Some(0), "{arguments:?} does not resume after {stop:?}: {}", resumed.stderr);
        assert!(outcome(output) == expected, "{arguments:?} makes something else after {stop:?}");
        assert_eq!(leftovers(output), BTreeSet::new(), "{arguments:?} leaves something after {stop:?}");
    }
    println!("{}: {} steps, {} writes; stopped {num_stopped:?}", arguments[0], course.num_steps, course.num_writes);
    for kind in ["at a step", "with a loss", "in a write", "by a full disk"] {
        assert!(num_stopped.get(kind).is_some_and(|&number| number > 0), "{arguments:?} was never stopped {kind}");
    }
}

impl Stop {
    fn name(self) -> &'static str {
        match self {
            Stop::AtStep { loss: false, .. } => "at a step",
            Stop::AtStep { loss: true, .. } => "with a loss",
            Stop::InWrite(_) => "in a write",
            Stop::FullDisk(_) => "by a full disk",
            Stop::After(_) => "after a time",
        }
    }

    fn variable(self) -> Option<String> {
        match self {
            Stop::AtStep { step, loss } => Some(format!("{}={step}", if loss { "lose" } else { "kill" })),
            Stop::InWrite(write) => Some(format!("tear={write}")),
            Stop::FullDisk(write) => Some(format!("full={write}")),
            Stop::After(_) => None,
        }
    }
}

/// Runs the command undisturbed, and counts its operations on files.
fn undisturbed(program: &Program, arguments: &[String], output: &Path) -> Course {
    remove(output);
    let log = output.with_extension("operations");
    let started = Instant::now();
    let run = program.command(&[]).args(arguments).env(FAULT, format!("log={}", log.display())).output().unwrap();
    assert!(run.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&run.stderr));
    let duration = started.elapsed();
    let log = fs::read_to_string(log).unwrap();
    let num_writes = log.lines().filter(|line| line.starts_with("write ")).count();
    Course { num_steps: log.lines().count() - num_writes, num_writes, duration }
}

/// All stops, spread evenly over the run.
fn stops(course: &Course) -> Vec<Stop> {
    let number = num_cases();
    let spread = |total: usize| (0..number.min(total)).map(move |case| 1 + case * total / number.min(total));
    let steps = [false, true].into_iter().flat_map(|loss| spread(course.num_steps).map(move |step| (step, loss)));
    let mut stops: Vec<Stop> = steps.map(|(step, loss)| Stop::AtStep { step, loss }).collect();
    stops.extend(spread(course.num_writes).map(Stop::InWrite));
    stops.extend(spread(course.num_writes).map(Stop::FullDisk));
    stops.extend((0..number).map(|case| Stop::After(course.duration * case as u32 / number as u32)));
    stops
}

fn run_with(program: &Program, arguments: &[String], stop: Stop) -> ExitStatus {
    let mut command = program.command(&[]);
    command.args(arguments).stdout(Stdio::null()).stderr(Stdio::null());
    if let Some(variable) = stop.variable() {
        command.env(FAULT, variable);
    }
    let mut child = command.spawn().unwrap();
    if let Stop::After(time) = stop {
        let started = Instant::now();
        while started.elapsed() < time && child.try_wait().unwrap().is_none() {
            std::thread::yield_now();
        }
        child.kill().unwrap();
    }
    child.wait().unwrap()
}

/// Whether a run was stopped. What it did in the background may have been less than before, and a
/// run that resumes has less to do: then it ended by itself, with success.
fn was_stopped(status: ExitStatus, stop: Stop) -> bool {
    match (status.signal(), status.code()) {
        (Some(9), _) => true,
        (_, Some(3)) if matches!(stop, Stop::FullDisk(_)) => true,
        (_, Some(0)) => false,
        _ => panic!("{stop:?} ended with {status}"),
    }
}

fn remove(output: &Path) {
    if output.exists() {
        fs::remove_dir_all(output).unwrap();
    }
}

/// What is half-written in a folder and below.
fn leftovers(folder: &Path) -> BTreeSet<PathBuf> {
    let is_leftover = |name: &str| name.starts_with(".writing-") || name.starts_with(".old-") || name == ".lock";
    let paths = files_below(folder).into_keys();
    paths.filter(|path| path.components().any(|part| is_leftover(&part.as_os_str().to_string_lossy()))).collect()
}

/// The files below a folder, by their paths in it. Links are left out.
pub fn files_below(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(inside) = folders.pop() {
        for entry in fs::read_dir(&inside).unwrap() {
            let path = entry.unwrap().path();
            if path.is_symlink() {
                continue;
            }
            if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(path.strip_prefix(folder).unwrap().to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    files
}
