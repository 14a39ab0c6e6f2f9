//! Finds the Python interpreter behind a command, and the folders that it and its packages are in.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

use crate::{Error, Result};

/// Prints the fields of [`Description`]. An interpreter may be a chain of links, which code needs
/// whole: a virtual environment's leads to the one that it was made with.
const DESCRIBE: &str = r"
import json, os, site, sys

def links(path):
    while path not in found:
        found.append(path)
        if os.path.islink(path):
            path = os.path.join(os.path.dirname(path), os.readlink(path))

found = []
links(sys.executable)
for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix):
    links(prefix)
    found.append(os.path.realpath(prefix))
user = site.getusersitepackages() if sys.prefix == sys.base_prefix else ''
is_filled = lambda path: os.path.isdir(path) and os.access(path, os.R_OK) and os.listdir(path)
packages = filter(is_filled, [*sys.path, user])
print(json.dumps({
    'executable': sys.executable,
    'folders': [os.path.normpath(path) for path in found],
    'packages': [os.path.normpath(path) for path in packages],
}))
";

/// Compiles what stdin says, which takes longer than most programs that it is compiled for run.
const COMPILE: &str = "import marshal, sys\n\
                       print(marshal.dumps(compile(sys.stdin.read(), '<harness>', 'exec')).hex(), end='')";

#[derive(Deserialize)]
struct Description {
    executable: PathBuf,
    /// The executable and its folders, with every link on the way to them.
    folders: Vec<PathBuf>,
    /// The folders that it imports from.
    packages: Vec<PathBuf>,
}

pub(super) struct Interpreter {
    /// As it is called: a virtual environment knows itself by the path of its link.
    pub(super) path: PathBuf,
    /// What it reads, besides the folders of the system.
    pub(super) folders: Vec<PathBuf>,
    /// The packages that lie elsewhere, where code must not read.
    pub(super) lost_packages: Vec<String>,
}

impl Interpreter {
    pub(super) fn find(command: &Path) -> Result<Self> {
        let Description { executable, folders, packages } = describe(command)?;
        let home = std::env::home_dir().unwrap_or_default();
        if let Some(folder) = folders.iter().find(|folder| home.starts_with(folder)) {
            return Err(missing(&format!("{} holds the home folder, which code must not read", folder.display())));
        }
        let is_readable =
            |path: &PathBuf| path.starts_with("/usr") || folders.iter().any(|folder| path.starts_with(folder));
        let lost = packages.iter().filter(|path| !is_readable(path));
        let lost_packages = lost.map(|path| format!("those in {}, outside of its installation", path.display()));
        Ok(Interpreter { path: executable, lost_packages: lost_packages.collect(), folders })
    }
}

/// Compiles trusted code for the interpreter at `path`, in hexadecimal digits.
pub(super) fn compile(path: &Path, source: &str) -> Result<String> {
    let failed = |why: String| missing(&format!("{} does not compile code: {why}", path.display()));
    let mut child = Command::new(path)
        .args(["-I", "-X", "utf8", "-c", COMPILE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(source.as_bytes()));
    let output = written.and_then(|()| child.wait_with_output()).map_err(|error| failed(error.to_string()))?;
    match String::from_utf8(output.stdout) {
        Ok(code) if output.status.success() => Ok(code),
        _ => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

fn describe(command: &Path) -> Result<Description> {
    let output = Command::new(command).args(["-I", "-c", DESCRIBE]).output();
    let output = output.map_err(|error| missing(&error.to_string()))?;
    serde_json::from_slice(&output.stdout).map_err(|_| missing(String::from_utf8_lossy(&output.stderr).trim()))
}

fn missing(why: &str) -> Error {
    Error::environment(format!("python3 is needed to run code: {why}; install it, or add it to the PATH"))
}
