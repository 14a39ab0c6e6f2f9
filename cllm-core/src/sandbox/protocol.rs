//! Messages between the toolkit and the launcher, and the limits and outcome of a program's run.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Why no code can run on this machine, in words.
pub(super) type Problem = String;

/// Limits of one program.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    pub wall_time: Duration,
    pub cpu_seconds: u64,
    /// Size of the address space of each process.
    pub memory_bytes: u64,
    /// All files of the program together.
    pub disk_bytes: u64,
    /// Everything that the program prints.
    pub output_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            wall_time: Duration::from_secs(20),
            cpu_seconds: 10,
            memory_bytes: 1 << 30,
            disk_bytes: 64 << 20,
            output_bytes: 8 << 20,
        }
    }
}

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProgramOutcome {
    /// It ran to its end.
    Passed,
    AssertionFailed,
    /// The name of another exception, or a message that it exited before its end.
    Exception(String),
    TimedOut,
    OutOfMemory,
    /// A signal ended it.
    Killed(i32),
    TooMuchOutput,
    TooMuchDisk,
}

/// The launcher's argument.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LaunchOrder {
    /// Path of the Python interpreter.
    pub(super) python: PathBuf,
    /// Files and folders that the program may read and execute.
    pub(super) readable: Vec<PathBuf>,
    /// An empty folder that the program may write to.
    pub(super) folder: PathBuf,
    pub(super) limits: Limits,
}

/// The line that the launcher writes to stdout before it becomes Python.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Greeting {
    /// The names of the layers in force.
    Layers(Vec<String>),
    /// Why nothing can run.
    Problem(Problem),
}
