//! Runs Python programs that a model wrote, so that they can do no harm. Each program gets a process
//! of the launcher (crate `cllm-launcher`), which gives up everything that Python does not need and
//! then becomes Python; this process feeds it the program, watches its limits and reads how it
//! ended. docs/sandbox.md says what each layer protects from.

mod interpreter;
mod launcher_file;
mod monitor;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cllm_launcher::LaunchOrder;
pub use cllm_launcher::Limits;
pub use monitor::ProgramOutcome;

use crate::{Error, Result};
use interpreter::Interpreter;
use launcher_file::LauncherFile;

/// Where Linux has its libraries and the system's Python.
const SYSTEM_PATHS: [&str; 5] = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"];
const SYSTEM_PYTHON: &str = "/usr/bin/python3";

/// Runs programs, one process each.
#[derive(Debug)]
pub struct Sandbox {
    launcher: LauncherFile,
    /// A command that starts the launcher; it is given the launcher's path and argument.
    wrapper: Option<PathBuf>,
    python: PathBuf,
    readable: Vec<PathBuf>,
    limits: Limits,
    layers: Vec<String>,
    lost_packages: Vec<String>,
}

impl Sandbox {
    /// Finds Python and tries the sandbox out.
    ///
    /// # Errors
    /// When there is no Python, or when no layer that protects files is available. No code runs
    /// then.
    pub fn open() -> Result<Self> {
        Self::open_with(Path::new("python3"), Limits::default(), None)
    }

    /// Like [`Sandbox::open`], but with another Python, other limits, and a command that starts the
    /// launcher.
    ///
    /// # Errors
    /// As [`Sandbox::open`].
    pub fn open_with(python: &Path, limits: Limits, wrapper: Option<&Path>) -> Result<Self> {
        let open = |python: &Path| Self::with_python(python, limits.clone(), wrapper);
        let refusal = match open(python) {
            Err(error) if !matches!(error, Error::Interrupted(_)) => error,
            result => return result,
        };
        // A Python in a home folder may be out of reach for the user that code runs as; then the
        // system's own is used.
        let Ok(mut sandbox) = open(Path::new(SYSTEM_PYTHON)) else { return Err(refusal) };
        sandbox.lost_packages.insert(0, format!("those of {}, which cannot run here: {refusal}", python.display()));
        Ok(sandbox)
    }

    fn with_python(python: &Path, limits: Limits, wrapper: Option<&Path>) -> Result<Self> {
        let Interpreter { path, folders, lost_packages } = Interpreter::find(python)?;
        let system = SYSTEM_PATHS.iter().map(PathBuf::from).filter(|path| path.exists());
        let mut sandbox = Sandbox {
            launcher: LauncherFile::create()?,
            wrapper: wrapper.map(Path::to_owned),
            python: path,
            readable: without_nested(system.chain(folders)),
            limits,
            layers: Vec::new(),
            lost_packages,
        };
        let (outcome, layers) = sandbox.run_with_layers("", "import math")?;
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

    /// Packages that the Python of the command line can import and programs in here cannot, in
    /// words.
    pub fn lost_packages(&self) -> &[String] {
        &self.lost_packages
    }

    /// Runs a program to its end.
    ///
    /// # Errors
    /// When it cannot be started, or a signal asked this process to stop.
    pub fn run(&self, program: &str) -> Result<ProgramOutcome> {
        Ok(self.run_with_layers("", program)?.0)
    }

    /// Runs the program that trusted Python code makes: its function `prepare` gets `input` and
    /// returns what Python executes.
    ///
    /// # Errors
    /// As [`Sandbox::run`].
    pub fn run_prepared(&self, preparation: &str, input: &str) -> Result<ProgramOutcome> {
        Ok(self.run_with_layers(preparation, input)?.0)
    }

    fn run_with_layers(&self, preparation: &str, program: &str) -> Result<(ProgramOutcome, Vec<String>)> {
        let folder = tempfile::Builder::new().prefix("cllm-sandbox-").tempdir();
        let folder = folder.map_err(Error::write(std::env::temp_dir()))?;
        let order = LaunchOrder {
            python: self.python.clone(),
            readable: self.readable.clone(),
            folder: folder.path().to_owned(),
            limits: self.limits.clone(),
        };
        let order = serde_json::to_string(&order).map_err(Error::serialization)?;
        let launcher = self.launcher.path();
        let mut command = match &self.wrapper {
            Some(wrapper) => Command::new(wrapper),
            None => Command::new(&launcher),
        };
        let child = command
            .args(self.wrapper.is_some().then_some(&launcher))
            .arg(order)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| Error::environment(format!("the launcher of the sandbox cannot be started: {error}")))?;
        monitor::watch(child, [preparation, program], folder.path(), &self.limits)
    }
}

/// The paths without those inside another one.
fn without_nested(paths: impl Iterator<Item = PathBuf>) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = paths.collect();
    // A folder comes before what it holds.
    paths.sort();
    let mut kept: Vec<PathBuf> = Vec::new();
    for path in paths {
        if !kept.iter().any(|outer| path.starts_with(outer)) {
            kept.push(path);
        }
    }
    kept
}
