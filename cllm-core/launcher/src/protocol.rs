//! Messages between the toolkit and the launcher, and the limits of a program's run.

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
            memory_bytes: 2 << 30,
            disk_bytes: 64 << 20,
            output_bytes: 8 << 20,
        }
    }
}

/// The launcher's argument.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LaunchOrder {
    /// Path of the Python interpreter.
    pub python: PathBuf,
    /// Files and folders that the program may read and execute.
    pub readable: Vec<PathBuf>,
    /// An empty folder that the program may write to.
    pub folder: PathBuf,
    pub limits: Limits,
}

/// The line that the launcher writes to stdout before it becomes Python.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Greeting {
    /// The names of the layers in force.
    Layers(Vec<String>),
    /// Why nothing can run.
    Problem(Problem),
}
