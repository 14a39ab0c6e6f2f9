//! Runs Python programs that a model wrote, so that they can do no harm. Each program gets a process
//! of the launcher (crate `cllm-launcher`), which gives up everything that Python does not need and
//! then becomes Python; this process feeds it the program, watches its limits and reads how it
//! ended. In Python, harness.py keeps the program apart from what judges it. docs/sandbox.md says
//! what each layer protects from.

mod interpreter;
mod launcher_file;
mod monitor;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

pub use cllm_launcher::Limits;
use cllm_launcher::{LaunchOrder, PythonOrder};
pub use monitor::ProgramOutcome;

use crate::{Error, Result};
use interpreter::Interpreter;
pub(crate) use launcher_file::LauncherFile;

/// Where Linux has its libraries and the system's Python.
const SYSTEM_PATHS: [&str; 5] = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime"];
const SYSTEM_PYTHON: &str = "/usr/bin/python3";
/// Runs in Python before and beside a program.
const HARNESS: &str = include_str!("harness.py");
/// Every process that runs a program has this in its command line.
const COMMAND: &str = "# Runs a program that a model wrote.";

/// Runs programs, one process each.
#[derive(Debug)]
pub struct Sandbox {
    launcher: &'static LauncherFile,
    /// A command that starts the launcher; it is given the launcher's path and argument.
    wrapper: Option<PathBuf>,
    python: PathBuf,
    /// The harness, as `python -c` runs it.
    code: String,
    /// Compiled preparations by their source.
    preparations: Mutex<HashMap<&'static str, Arc<str>>>,
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
            launcher: LauncherFile::shared()?,
            wrapper: wrapper.map(Path::to_owned),
            code: format!(
                "{COMMAND}\nimport marshal\nexec(marshal.loads(bytes.fromhex('{}')))",
                interpreter::compile(&path, HARNESS)?
            ),
            preparations: Mutex::default(),
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
    /// returns the program and the tests that judge it from another process, as harness.py reads
    /// them. Before, its function `guard` prepares both processes.
    ///
    /// # Errors
    /// As [`Sandbox::run`].
    pub fn run_prepared(&self, preparation: &'static str, input: &str) -> Result<ProgramOutcome> {
        let compiled = self.compiled(preparation)?;
        Ok(self.run_with_layers(&compiled, input)?.0)
    }

    fn compiled(&self, preparation: &'static str) -> Result<Arc<str>> {
        let mut known = self.preparations.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(compiled) = known.get(preparation) {
            return Ok(Arc::clone(compiled));
        }
        let compiled: Arc<str> = interpreter::compile(&self.python, preparation)?.into();
        known.insert(preparation, Arc::clone(&compiled));
        Ok(compiled)
    }

    fn run_with_layers(&self, preparation: &str, program: &str) -> Result<(ProgramOutcome, Vec<String>)> {
        let folder = tempfile::Builder::new().prefix("cllm-sandbox-").tempdir();
        let folder = folder.map_err(Error::write(std::env::temp_dir()))?;
        let order = PythonOrder {
            python: self.python.clone(),
            code: self.code.clone(),
            readable: self.readable.clone(),
            folder: folder.path().to_owned(),
            limits: self.limits.clone(),
        };
        let order = serde_json::to_string(&LaunchOrder::Python(order)).map_err(Error::serialization)?;
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
