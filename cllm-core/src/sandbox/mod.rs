//! Runs Python programs that a model wrote, so that they harm nothing. docs/sandbox.md says what protects.

mod launcher;
mod private_root;
mod system_calls;
mod watch;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};
use launcher::Order;

/// The first argument that makes a program the launcher.
const VERB: &str = "__sandbox";
/// Where Linux has its libraries and a Python of its own.
const SYSTEM: [&str; 5] = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"];

/// What one program may take.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    /// From start to end.
    pub time: Duration,
    /// Of computing.
    pub cpu_seconds: u64,
    /// Of address space.
    pub memory_bytes: u64,
    /// Of all of its files together.
    pub disk_bytes: u64,
    /// Of what it prints.
    pub output_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            time: Duration::from_secs(20),
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
    /// It ran through to its end.
    Passed,
    /// An assertion failed.
    AssertionFailed,
    /// Another exception, by its name; or it left before its end.
    Exception(String),
    /// It took too long.
    TimedOut,
    /// It took too much memory.
    OutOfMemory,
    /// A signal ended it.
    Killed(i32),
    /// It printed too much.
    TooMuchOutput,
    /// It wrote too much.
    TooMuchDisk,
}

/// Where programs run.
#[derive(Debug)]
pub struct Sandbox {
    program: PathBuf,
    python: PathBuf,
    readable: Vec<PathBuf>,
    limits: Limits,
    layers: Vec<String>,
}

/// In `main`, before anything else: where this process was started as the launcher of a sandbox it becomes Python, and
/// returns only if it cannot.
pub fn launch_if_requested() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    (arguments.next()? == VERB).then(|| launcher::launch(arguments.next()))
}

impl Sandbox {
    /// Finds Python and tries the sandbox out. The running program must call [`launch_if_requested`].
    ///
    /// # Errors
    /// When there is no Python, or nothing here keeps files apart: then no code is run.
    pub fn open() -> Result<Self> {
        Self::with_launcher(Path::new("/proc/self/exe"), Limits::default())
    }

    /// The same with another program as the launcher, and other limits.
    ///
    /// # Errors
    /// As [`Sandbox::open`].
    pub fn with_launcher(program: &Path, limits: Limits) -> Result<Self> {
        let mut first = None;
        // One that is installed in a home folder may be out of reach for the user that code runs as.
        for python in ["python3", "/usr/bin/python3"] {
            match Self::with_python(Path::new(python), program, limits.clone()) {
                Ok(sandbox) => return Ok(sandbox),
                Err(error @ Error::Interrupted(_)) => return Err(error),
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first.unwrap_or_else(|| Error::environment("python3 is needed to run code")))
    }

    fn with_python(python: &Path, program: &Path, limits: Limits) -> Result<Self> {
        let (python, prefix) = find_python(python)?;
        let mut readable: Vec<PathBuf> = SYSTEM.iter().map(PathBuf::from).filter(|path| path.exists()).collect();
        if !readable.iter().any(|path| prefix.starts_with(path)) {
            readable.push(prefix);
        }
        let program = program.to_owned();
        let mut sandbox = Sandbox { program, python, readable, limits, layers: Vec::new() };
        let (ending, layers) = sandbox.attempt("import math")?;
        if ending != ProgramOutcome::Passed {
            let python = sandbox.python.display();
            return Err(Error::environment(format!(
                "{python} does not run in the sandbox ({ending:?}): install another python3"
            )));
        }
        sandbox.layers = layers;
        Ok(sandbox)
    }

    /// The layers that protect here, by name.
    pub fn layers(&self) -> &[String] {
        &self.layers
    }

    /// The Python that runs the programs.
    pub fn python(&self) -> &Path {
        &self.python
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// When it cannot be started, or a signal asked this process to stop.
    pub fn run(&self, program: &str) -> Result<ProgramOutcome> {
        Ok(self.attempt(program)?.0)
    }

    fn attempt(&self, program: &str) -> Result<(ProgramOutcome, Vec<String>)> {
        let folder = tempfile::Builder::new().prefix("cllm-sandbox-").tempdir();
        let folder = folder.map_err(Error::write(std::env::temp_dir()))?;
        let order = Order {
            python: self.python.clone(),
            readable: self.readable.clone(),
            folder: folder.path().to_owned(),
            limits: self.limits.clone(),
        };
        let order = serde_json::to_string(&order).map_err(|error| Error::usage(format!("as JSON: {error}")))?;
        let child = Command::new(&self.program)
            .args([VERB, &order])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(Error::io(&self.program))?;
        watch::to_the_end(child, program, folder.path(), &self.limits)
    }
}

/// The interpreter behind a command, and the folder that it was installed into.
fn find_python(command: &Path) -> Result<(PathBuf, PathBuf)> {
    let ask = "import os, sys\nprint(os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix), sep='\\n')";
    let lacking = |why: &str| {
        Error::environment(format!("python3 is needed to run code: {why}; install it or put it on the PATH"))
    };
    let found = Command::new(command).args(["-I", "-c", ask]).output().map_err(|error| lacking(&error.to_string()))?;
    let text = String::from_utf8_lossy(&found.stdout).into_owned();
    match text.lines().collect::<Vec<_>>()[..] {
        [python, prefix] if !python.is_empty() => {
            let (python, prefix) = (PathBuf::from(python), PathBuf::from(prefix));
            let home = std::env::home_dir().unwrap_or_default();
            if home.starts_with(&prefix) {
                return Err(lacking(&format!("{} holds the home folder, which code must not read", prefix.display())));
            }
            Ok((python, prefix))
        }
        _ => Err(lacking(String::from_utf8_lossy(&found.stderr).trim())),
    }
}
