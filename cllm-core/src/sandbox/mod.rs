//! Runs Python programs that a model wrote, so that they can do no harm. The program that uses the
//! sandbox starts itself again as a launcher, which gives up everything that Python does not need
//! and then becomes Python; this process feeds it the program, watches its limits and reads how it
//! ended. docs/sandbox.md says what each layer protects from.

mod launcher;
mod monitor;
mod private_root;
mod protocol;
mod system_calls;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use crate::{Error, Result};
use protocol::LaunchOrder;
pub use protocol::{Limits, ProgramOutcome};

/// The first argument that makes a program the launcher.
const LAUNCHER_VERB: &str = "__sandbox";
/// Where Linux has its libraries and the system's Python.
const SYSTEM_PATHS: [&str; 5] = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"];

/// Runs programs, one process each.
#[derive(Debug)]
pub struct Sandbox {
    launcher: PathBuf,
    python: PathBuf,
    readable: Vec<PathBuf>,
    limits: Limits,
    layers: Vec<String>,
}

/// Becomes Python if this process was started as the launcher of a sandbox, and returns only if it
/// was not or cannot. Call it in `main` before anything else.
pub fn launch_if_requested() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    (arguments.next()? == LAUNCHER_VERB).then(|| launcher::launch(arguments.next()))
}

impl Sandbox {
    /// Finds Python and tries the sandbox out. The running program must call
    /// [`launch_if_requested`].
    ///
    /// # Errors
    /// When there is no Python, or when no layer that protects files is available. No code runs
    /// then.
    pub fn open() -> Result<Self> {
        Self::with_launcher(Path::new("/proc/self/exe"), Limits::default())
    }

    /// Like [`Sandbox::open`], but with another program as the launcher, and other limits.
    ///
    /// # Errors
    /// As [`Sandbox::open`].
    pub fn with_launcher(launcher: &Path, limits: Limits) -> Result<Self> {
        let mut first_error = None;
        // A Python in a home folder may be out of reach for the user that code runs as; then the
        // system's own is used.
        for python in ["python3", "/usr/bin/python3"] {
            match Self::with_python(Path::new(python), launcher, limits.clone()) {
                Ok(sandbox) => return Ok(sandbox),
                Err(error @ Error::Interrupted(_)) => return Err(error),
                Err(error) => first_error = first_error.or(Some(error)),
            }
        }
        Err(first_error.expect("two were tried"))
    }

    fn with_python(python: &Path, launcher: &Path, limits: Limits) -> Result<Self> {
        let (python, prefix) = find_python(python)?;
        let mut readable: Vec<PathBuf> = SYSTEM_PATHS.iter().map(PathBuf::from).filter(|path| path.exists()).collect();
        if !readable.iter().any(|path| prefix.starts_with(path)) {
            readable.push(prefix);
        }
        let launcher = launcher.to_owned();
        let mut sandbox = Sandbox { launcher, python, readable, limits, layers: Vec::new() };
        let (outcome, layers) = sandbox.run_with_layers("import math")?;
        if outcome != ProgramOutcome::Passed {
            let python = sandbox.python.display();
            return Err(Error::environment(format!(
                "{python} does not run in the sandbox ({outcome:?}): install another python3"
            )));
        }
        sandbox.layers = layers;
        Ok(sandbox)
    }

    /// The names of the layers that are in force on this machine.
    pub fn layers(&self) -> &[String] {
        &self.layers
    }

    /// Path of the Python interpreter.
    pub fn python(&self) -> &Path {
        &self.python
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// When it cannot be started, or a signal asked this process to stop.
    pub fn run(&self, program: &str) -> Result<ProgramOutcome> {
        Ok(self.run_with_layers(program)?.0)
    }

    fn run_with_layers(&self, program: &str) -> Result<(ProgramOutcome, Vec<String>)> {
        let folder = tempfile::Builder::new().prefix("cllm-sandbox-").tempdir();
        let folder = folder.map_err(Error::write(std::env::temp_dir()))?;
        let order = LaunchOrder {
            python: self.python.clone(),
            readable: self.readable.clone(),
            folder: folder.path().to_owned(),
            limits: self.limits.clone(),
        };
        let order = serde_json::to_string(&order).map_err(Error::serialization)?;
        let child = Command::new(&self.launcher)
            .args([LAUNCHER_VERB, &order])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(Error::io(&self.launcher))?;
        monitor::watch(child, program, folder.path(), &self.limits)
    }
}

/// The path of the interpreter behind a command, and the folder that it was installed into.
fn find_python(command: &Path) -> Result<(PathBuf, PathBuf)> {
    let script =
        "import os, sys\nprint(os.path.realpath(sys.executable), os.path.realpath(sys.base_prefix), sep='\\n')";
    let missing = |why: &str| {
        Error::environment(format!("python3 is needed to run code: {why}; install it, or add it to the PATH"))
    };
    let output =
        Command::new(command).args(["-I", "-c", script]).output().map_err(|error| missing(&error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match text.lines().collect::<Vec<_>>()[..] {
        [python, prefix] if !python.is_empty() => {
            let (python, prefix) = (PathBuf::from(python), PathBuf::from(prefix));
            let home = std::env::home_dir().unwrap_or_default();
            if home.starts_with(&prefix) {
                return Err(missing(&format!("{} holds the home folder, which code must not read", prefix.display())));
            }
            Ok((python, prefix))
        }
        _ => Err(missing(String::from_utf8_lossy(&output.stderr).trim())),
    }
}
