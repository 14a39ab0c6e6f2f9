//! The operations by which files appear, change and go. Everything that must survive a crash is
//! written with them, so that tests can put a fault in the place of any of them ([`FAULT`]).

use std::fs::{self, File};
use std::io::{Result, Write};
use std::path::Path;

/// The variable that asks for a fault, where debug assertions are on: `kill=K` kills the process before
/// its K-th operation other than a write, counted from 1, `lose=K` also loses what was not synced, as a
/// loss of power may; `tear=K` kills it within its K-th write, and `full=K` fails that write for lack of
/// space. `log=FILE` fails nothing and writes a line for each operation.
pub const FAULT: &str = "CLLM_FAULT";

/// Writes bytes, as [`Write::write`] does.
///
/// # Errors
/// Those of the operating system, here and below.
pub fn write(target: &mut impl Write, bytes: &[u8]) -> Result<usize> {
    #[cfg(debug_assertions)]
    faults::before_write(target, bytes)?;
    target.write(bytes)
}

/// Waits until a file is on disk.
pub fn sync_file(file: &File, path: &Path) -> Result<()> {
    step("fsync", path)?;
    file.sync_all()?;
    #[cfg(debug_assertions)]
    faults::synced(path);
    Ok(())
}

/// Waits until a file, or the names in a folder, are on disk.
pub fn sync(path: &Path) -> Result<()> {
    sync_file(&File::open(path)?, path)
}

/// Gives a file or folder another name.
pub fn rename(from: &Path, to: &Path) -> Result<()> {
    step("rename", to)?;
    #[cfg(debug_assertions)]
    faults::before_rename(from, to)?;
    fs::rename(from, to)
}

/// Makes a folder, and those around it.
pub fn create_folder(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    step("mkdir", path)?;
    fs::create_dir_all(path)
}

pub fn remove_file(path: &Path) -> Result<()> {
    step("unlink", path)?;
    fs::remove_file(path)
}

/// Removes a folder with all that it holds.
pub fn remove_folder(path: &Path) -> Result<()> {
    step("rmdir", path)?;
    fs::remove_dir_all(path)
}

#[cfg(debug_assertions)]
fn step(operation: &str, path: &Path) -> Result<()> {
    faults::before_step(operation, path)
}

#[cfg(not(debug_assertions))]
fn step(_: &str, _: &Path) -> Result<()> {
    Ok(())
}

/// Says that a file was begun: until it is synced, a loss of power may cut it.
pub fn began(_path: &Path) {
    #[cfg(debug_assertions)]
    faults::began(_path);
}

/// Says that a file on disk is about to get more at its end: until it is synced, a loss of power may take
/// that away.
pub fn appends(_file: &File, _path: &Path) {
    #[cfg(debug_assertions)]
    faults::appends(_file, _path);
}

/// Faults for tests. Builds without debug assertions have none.
#[cfg(debug_assertions)]
mod faults {
    use std::collections::BTreeMap;
    use std::fs::{self, File, OpenOptions};
    use std::io::{ErrorKind, Result, Write};
    use std::path::{Path, PathBuf};
    use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;

    use super::FAULT;

    static FAULTS: LazyLock<Option<Mutex<Faults>>> = LazyLock::new(|| {
        let text = std::env::var(FAULT).ok()?;
        let (kind, argument) = text.split_once('=')?;
        let number = || argument.parse().ok();
        let kind = match kind {
            "kill" => Kind::Kill(number()?),
            "lose" => Kind::Lose(number()?),
            "tear" => Kind::Tear(number()?),
            "full" => Kind::Full(number()?),
            _ => Kind::Log(argument.into()),
        };
        let (unsynced, appended, renames) = (Vec::new(), BTreeMap::new(), Vec::new());
        Some(Mutex::new(Faults { kind, num_steps: 0, num_writes: 0, unsynced, appended, renames }))
    });

    enum Kind {
        Kill(usize),
        Lose(usize),
        Tear(usize),
        Full(usize),
        Log(PathBuf),
    }

    struct Faults {
        kind: Kind,
        num_steps: usize,
        num_writes: usize,
        /// Files that were written and not synced.
        unsynced: Vec<PathBuf>,
        /// The bytes on disk of files that got more since.
        appended: BTreeMap<PathBuf, u64>,
        /// Renames in folders that were not synced since.
        renames: Vec<Rename>,
    }

    struct Rename {
        from: PathBuf,
        to: PathBuf,
        /// A second name of the file that had this name before.
        replaced: Option<PathBuf>,
    }

    fn faults() -> Option<MutexGuard<'static, Faults>> {
        Some(FAULTS.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn before_step(operation: &str, path: &Path) -> Result<()> {
        let Some(mut faults) = faults() else { return Ok(()) };
        faults.num_steps += 1;
        match faults.kind {
            Kind::Kill(at) if at == faults.num_steps => die(),
            Kind::Lose(at) if at == faults.num_steps => faults.lose(),
            _ => faults.log(operation, path),
        }
    }

    pub(super) fn before_write(target: &mut impl Write, bytes: &[u8]) -> Result<()> {
        let Some(mut faults) = faults() else { return Ok(()) };
        faults.num_writes += 1;
        match faults.kind {
            Kind::Full(at) if at == faults.num_writes => Err(ErrorKind::StorageFull.into()),
            Kind::Tear(at) if at == faults.num_writes => {
                target.write_all(&bytes[..bytes.len() / 2])?;
                die()
            }
            _ => faults.log("write", Path::new("")),
        }
    }

    pub(super) fn began(path: &Path) {
        if let Some(mut faults) = faults() {
            faults.unsynced.push(path.to_owned());
        }
    }

    pub(super) fn appends(file: &File, path: &Path) {
        if let (Some(mut faults), Ok(metadata)) = (faults(), file.metadata()) {
            faults.appended.entry(path.to_owned()).or_insert(metadata.len());
        }
    }

    pub(super) fn synced(path: &Path) {
        let Some(mut faults) = faults() else { return };
        faults.unsynced.retain(|other| other != path);
        faults.appended.remove(path);
        let (kept, durable): (Vec<Rename>, Vec<Rename>) =
            std::mem::take(&mut faults.renames).into_iter().partition(|rename| rename.to.parent() != Some(path));
        faults.renames = kept;
        for replaced in durable.into_iter().filter_map(|rename| rename.replaced) {
            let _ = fs::remove_file(replaced);
        }
    }

    pub(super) fn before_rename(from: &Path, to: &Path) -> Result<()> {
        let Some(mut faults) = faults() else { return Ok(()) };
        if !matches!(faults.kind, Kind::Lose(_)) {
            return Ok(());
        }
        for path in &mut faults.unsynced {
            if let Ok(inside) = path.strip_prefix(from) {
                *path = if inside == Path::new("") { to.to_owned() } else { to.join(inside) };
            }
        }
        let replaced = to.symlink_metadata().is_ok_and(|metadata| !metadata.is_dir()).then(|| {
            let name = format!(".writing-replaced-{}", faults.num_steps);
            to.with_file_name(name)
        });
        if let Some(replaced) = &replaced {
            fs::hard_link(to, replaced)?;
        }
        faults.renames.push(Rename { from: from.to_owned(), to: to.to_owned(), replaced });
        Ok(())
    }

    impl Faults {
        /// Cuts files and undoes renames that were not synced, and dies.
        fn lose(&self) -> ! {
            for path in &self.unsynced {
                if let Ok(file) = OpenOptions::new().write(true).open(path) {
                    let _ = file.metadata().and_then(|metadata| file.set_len(metadata.len() / 2));
                }
            }
            for (path, num_bytes) in &self.appended {
                let _ = OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(*num_bytes));
            }
            for Rename { from, to, replaced } in self.renames.iter().rev() {
                let _ = fs::rename(to, from);
                let _ = replaced.as_ref().map(|replaced| fs::rename(replaced, to));
            }
            die()
        }

        fn log(&self, operation: &str, path: &Path) -> Result<()> {
            let Kind::Log(file) = &self.kind else { return Ok(()) };
            let mut file: File = OpenOptions::new().create(true).append(true).open(file)?;
            writeln!(file, "{operation} {}", path.display())
        }
    }

    fn die() -> ! {
        let _ = kill(Pid::this(), Signal::SIGKILL);
        std::process::abort()
    }
}
