//! Files and folders that appear whole or not at all: written beside, synced, renamed.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Writes a file through `fill`; it appears under `path` only once it is complete and on disk.
///
/// # Errors
/// What `fill` returns, and file-system errors with the path.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut BufWriter<&mut File>) -> Result<()>) -> Result<()> {
    let folder = parent(path);
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let mut file = tempfile::Builder::new()
        .prefix(".writing-")
        .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
        .tempfile_in(folder)
        .map_err(Error::io(folder))?;
    let mut buffer = BufWriter::new(file.as_file_mut());
    fill(&mut buffer)?;
    buffer.flush().map_err(Error::io(path))?;
    drop(buffer);
    file.as_file().sync_all().map_err(Error::io(path))?;
    file.persist(path).map_err(|error| Error::Io { path: path.to_owned(), source: error.error })?;
    sync_folder(folder)
}

/// Writes `bytes` as a file that appears whole or not at all.
///
/// # Errors
/// File-system errors with the path.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes).map_err(Error::io(path)))
}

/// Writes a value as indented JSON with a final newline.
///
/// # Errors
/// File-system errors with the path.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value)
        .map_err(|error| Error::file(path, format!("cannot be written as JSON: {error}")))?;
    text.push('\n');
    write(path, text.as_bytes())
}

/// Makes a folder through `fill`, which gets a temporary folder beside it; an existing folder of that name is replaced.
///
/// # Errors
/// What `fill` returns, and file-system errors with the path.
pub fn folder_with(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let beside = parent(path);
    fs::create_dir_all(beside).map_err(Error::io(beside))?;
    let work = tempfile::Builder::new().prefix(".writing-").tempdir_in(beside).map_err(Error::io(beside))?;
    fill(work.path())?;
    for entry in fs::read_dir(work.path()).map_err(Error::io(work.path()))? {
        let entry = entry.map_err(Error::io(work.path()))?.path();
        File::open(&entry).and_then(|file| file.sync_all()).map_err(Error::io(&entry))?;
    }
    sync_folder(work.path())?;
    fs::set_permissions(work.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .map_err(Error::io(work.path()))?;
    let old = path.exists().then(|| hidden_beside(path));
    if let Some(old) = &old {
        fs::rename(path, old).map_err(Error::io(path))?;
    }
    let work = work.keep();
    fs::rename(&work, path).map_err(Error::io(path))?;
    if let Some(old) = old {
        fs::remove_dir_all(&old).map_err(Error::io(&old))?;
    }
    sync_folder(beside)
}

fn hidden_beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    parent(path).join(format!(".old-{}-{name}", std::process::id()))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|handle| handle.sync_all()).map_err(Error::io(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("numbers.json");
        write(&path, b"old").unwrap();
        let failed = write_with(&path, |file| {
            file.write_all(b"half of the ne").unwrap();
            Err(Error::usage("stop"))
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("step-1");
        for content in ["a", "b"] {
            folder_with(&path, |work| write(&work.join(content), b"x")).unwrap();
        }
        assert!(!path.join("a").exists() && path.join("b").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
