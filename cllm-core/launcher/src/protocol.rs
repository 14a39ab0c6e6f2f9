//! Messages between the toolkit and the launcher, and the limits of a program's run and of queries.

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
pub enum LaunchOrder {
    /// Become Python.
    Python(PythonOrder),
    /// Run queries.
    Queries(QueryLimits),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PythonOrder {
    /// Path of the Python interpreter.
    pub python: PathBuf,
    /// What Python runs. Its argument is a filter of system calls.
    pub code: String,
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

/// Limits of each query.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct QueryLimits {
    pub time: Duration,
    /// Size of the address space of the process. SQLite may allocate half of it.
    pub memory_bytes: u64,
    /// A reference with more rows is not run to its end.
    pub max_rows: usize,
}

/// A database that queries run on. The launcher reads a list of them, a line of JSON, from stdin.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum DatabaseSource {
    /// Path of a file.
    File(String),
    /// The statements that make it, in memory.
    Script(String),
}

/// A line of JSON that the launcher reads after the databases. `database` is an index in their list.
#[derive(Debug, Serialize, Deserialize)]
pub enum QueryRequest {
    /// Whether SQLite can run the query, and it only reads.
    Accepts { database: usize, query: String },
    /// Runs a reference and keeps its result. Whether it ran.
    Expect { database: usize, query: String },
    /// Whether the query has the result that is kept.
    Matches { query: String, is_ordered: bool },
}

/// The line of JSON that answers the list of databases, and each request.
#[derive(Debug, Serialize, Deserialize)]
pub enum QueryReply {
    Answer(bool),
    BadDatabase {
        index: usize,
        problem: String,
    },
    /// Why nothing can run.
    Problem(Problem),
}
