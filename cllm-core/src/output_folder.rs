//! The rules for the output folder of every command, and the settings that a command saves there.
//!
//! A command writes into a folder that is empty, or that it wrote itself. Anything else is the
//! user's, and files in it may have the names that the command would write. While it writes, it holds
//! the folder with a lock, so that no other command writes there.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::{Error, Result, atomic_file, settings, text_file};

/// Name of the file with the settings of a run.
pub const CONFIG: &str = "config.yaml";

/// Number of files that a refusal names.
const MAX_NAMES: usize = 3;

/// Name of the file with whose lock a process holds a folder.
const LOCK_FILE: &str = ".lock";

/// Holds an output folder until it is dropped, or its process has ended in any way.
#[must_use]
pub struct FolderLock {
    /// `None` where nothing can be written or the file system has no locks.
    file: Option<(File, PathBuf)>,
    /// Folders that were made for the lock, innermost first.
    made: Vec<PathBuf>,
}

/// Holds a folder in which files will be written, and makes it if there is none.
///
/// # Errors
/// [`Error::File`] if another process holds it; file-system errors.
pub fn lock(folder: &Path) -> Result<FolderLock> {
    FolderLock::take(&folder.join(LOCK_FILE), folder)
}

/// Holds the path of a folder that will appear whole, and checks that it holds nothing yet.
///
/// # Errors
/// As [`lock`], and [`Error::File`] if it holds something.
pub fn lock_new(folder: &Path) -> Result<FolderLock> {
    let name = folder.file_name().ok_or_else(|| Error::file(folder, "is not the path of a new folder"))?;
    let lock = FolderLock::take(&folder.with_file_name(format!("{LOCK_FILE}-{}", name.to_string_lossy())), folder)?;
    atomic_file::refuse_nonempty(folder)?;
    Ok(lock)
}

impl FolderLock {
    /// Locks the file `path`, which holds `folder`.
    fn take(path: &Path, folder: &Path) -> Result<Self> {
        let mut made = Vec::new();
        loop {
            let inside = path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
            if inside.exists() && !inside.is_dir() {
                // The command says what its output must be.
                return Ok(FolderLock { file: None, made });
            }
            made.extend(inside.ancestors().take_while(|ancestor| !ancestor.exists()).map(Path::to_owned));
            std::fs::create_dir_all(inside).map_err(Error::write(inside))?;
            let mut file = match OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path) {
                Ok(file) => file,
                // Its holder has just removed the empty folder.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                // Whatever the command would write is refused as well.
                Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
                    return Ok(FolderLock { file: None, made });
                }
                Err(error) => return Err(Error::write(path)(error)),
            };
            match file.try_lock() {
                Ok(()) if is_at(&file, path) => {
                    let id = std::process::id().to_string();
                    let written = file.set_len(0).and_then(|()| file.write_all(id.as_bytes()));
                    let lock = FolderLock { file: Some((file, path.to_owned())), made };
                    return written.map(|()| lock).map_err(Error::write(path));
                }
                // Its holder has removed the file since it was opened.
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut id = String::new();
                    let _ = file.read_to_string(&mut id);
                    return Err(Error::file(folder, held_by(&id)));
                }
                // Not every file system has locks.
                Err(TryLockError::Error(_)) => return Ok(FolderLock { file: None, made }),
            }
        }
    }
}

fn held_by(process: &str) -> String {
    let process = if process.is_empty() { String::new() } else { format!(" (process {process})") };
    format!(
        "another command{process} is writing into this folder: wait until it has ended, or choose another output folder"
    )
}

/// Whether a path still leads to an open file.
fn is_at(file: &File, path: &Path) -> bool {
    let inode = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    file.metadata().map(inode).ok().is_some_and(|open| path.metadata().map(inode).is_ok_and(|there| there == open))
}

/// Removes the file, and the folders that were made for it and are still empty.
impl Drop for FolderLock {
    fn drop(&mut self) {
        // What cannot be removed is in nobody's way: it has no lock.
        if let Some((file, path)) = &self.file
            && is_at(file, path)
        {
            let _ = std::fs::remove_file(path);
        }
        for folder in &self.made {
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// Checks that a command may write into a folder: that the folder is missing or empty, or `is_own`
/// says that the command wrote it. Hidden files do not count.
///
/// # Errors
/// [`Error::File`] that names some of the files; file-system errors.
pub fn expect_own(folder: &Path, is_own: impl FnOnce() -> bool) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    let entries = std::fs::read_dir(folder).map_err(Error::io(folder))?;
    let mut names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(|name| !name.starts_with('.'));
    if names.is_empty() || is_own() {
        return Ok(());
    }
    names.sort();
    let more = if names.len() > MAX_NAMES { ", …" } else { "" };
    names.truncate(MAX_NAMES);
    let names = names.join(", ");
    Err(Error::file(
        folder,
        format!(
            "holds files that this command did not write ({names}{more}): choose another output folder, or an empty one"
        ),
    ))
}

/// Saves the settings of a run with a first line that names its command, such as `cllm-train run`.
///
/// # Errors
/// File-system errors.
pub fn save_settings(folder: &Path, command: &str, settings: &impl Serialize) -> Result<()> {
    let text = format!("{}\n{}", first_line(command), settings::to_yaml(settings)?);
    atomic_file::write(&folder.join(CONFIG), text.as_bytes())
}

fn first_line(command: &str) -> String {
    format!("# The settings of `{command}`, which wrote this folder.")
}

/// Whether a folder has settings that this command saved.
pub fn has_settings_of(folder: &Path, command: &str) -> bool {
    let Ok(file) = File::open(folder.join(CONFIG)) else { return false };
    BufReader::new(file).lines().next().is_some_and(|line| line.is_ok_and(|line| line == first_line(command)))
}

/// The first setting that differs from those saved in a folder, as a clause: `was started with
/// fraction=0.5; this command says 0.7`. The keys in `ignored` may differ.
///
/// # Errors
/// Settings that cannot be read.
pub fn changed_setting(folder: &Path, settings: &impl Serialize, ignored: &[&str]) -> Result<Option<String>> {
    let path = folder.join(CONFIG);
    if !path.exists() {
        return Ok(None);
    }
    let saved: Value = serde_saphyr::from_str(&text_file::read(&path)?)
        .map_err(|error| Error::file(&path, format!("is not YAML: {error}")))?;
    let now = serde_json::to_value(settings).map_err(Error::serialization)?;
    let keys = now.as_object().into_iter().flatten().filter(|(key, _)| !ignored.contains(&key.as_str()));
    Ok(keys.into_iter().find_map(|(key, now)| difference(key, &saved[key.as_str()], now)))
}

fn difference(key: &str, saved: &Value, now: &Value) -> Option<String> {
    match (saved, now) {
        (Value::Object(saved), Value::Object(now)) => {
            let null = Value::Null;
            let keys = saved.keys().chain(now.keys());
            let of =
                |settings: &serde_json::Map<String, Value>, name: &str| settings.get(name).unwrap_or(&null).clone();
            keys.into_iter().find_map(|name| difference(&format!("{key}.{name}"), &of(saved, name), &of(now, name)))
        }
        // YAML does not tell 1 from 1.0.
        (Value::Number(saved), Value::Number(now)) if saved.as_f64() == now.as_f64() => None,
        (saved, now) if saved == now => None,
        (saved, now) => Some(settings::change("was started", key, saved, now)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_folder_with_files_of_others_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        expect_own(&folder.join("missing"), || false).unwrap();
        std::fs::write(folder.join(".hidden"), "").unwrap();
        expect_own(folder, || false).unwrap();
        for name in ["README.md", "a", "b", "c"] {
            std::fs::write(folder.join(name), "mine").unwrap();
        }
        let message = expect_own(folder, || false).unwrap_err().to_string();
        assert!(message.contains("(README.md, a, b, …)"), "{message}");
        expect_own(folder, || true).unwrap();
    }

    #[test]
    fn a_folder_is_held_by_one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, model) = (dir.path().join("runs/a"), dir.path().join("models/b"));
        let (held, held_new) = (lock(&folder).unwrap(), lock_new(&model).unwrap());
        for refused in [lock(&folder).err().unwrap(), lock_new(&model).err().unwrap()] {
            let (message, id) = (refused.to_string(), std::process::id());
            assert!(
                message.contains(&format!("another command (process {id}) is writing into this folder")),
                "{message}"
            );
        }
        expect_own(&folder, || false).unwrap();
        drop((held, held_new));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left");
        let held = lock(&folder).unwrap();
        std::fs::write(folder.join("result"), "").unwrap();
        drop(held);
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        // The file that a killed process left is not locked.
        std::fs::write(folder.join(LOCK_FILE), "77").unwrap();
        drop(lock(&folder).unwrap());
        std::fs::write(model.with_file_name("x"), "").unwrap_err();
        std::fs::create_dir_all(&model).unwrap();
        std::fs::write(model.join("weights"), "").unwrap();
        assert!(lock_new(&model).err().unwrap().to_string().contains("already exists"));
    }

    #[test]
    fn saved_settings_name_their_command_and_tell_what_changed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        std::fs::write(folder.join(CONFIG), "lr: 1\n").unwrap();
        assert!(!has_settings_of(folder, "cllm-train run"));
        let settings =
            |lr: f64, rank: usize| json!({ "optimizer": { "lr": lr }, "lora": { "rank": rank }, "output": "x" });
        save_settings(folder, "cllm-train run", &settings(1.0, 4)).unwrap();
        assert!(has_settings_of(folder, "cllm-train run") && !has_settings_of(folder, "cllm-train rounds"));
        let changed = |settings: Value| changed_setting(folder, &settings, &["output"]).unwrap();
        assert_eq!(changed(settings(1.0, 4)), None);
        let mut elsewhere = settings(1.0, 4);
        elsewhere["output"] = "y".into();
        assert_eq!(changed(elsewhere), None);
        let message = "was started with optimizer.lr=1; this command says 0.5";
        assert_eq!(changed(settings(0.5, 4)).unwrap().replace("1.0;", "1;"), message);
        let mut without = settings(1.0, 4);
        without["lora"] = Value::Null;
        assert!(changed(without).unwrap().ends_with("this command says null"));
    }
}
