//! Files and folders that appear whole or not at all. They are written under a temporary name in
//! the same folder, synced to disk, and renamed, so a crash at any moment leaves either the old
//! content or the new.

use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

use crate::checksum::{Checksum, Checksums, WrittenFile};
use crate::{Error, Result, disk};

/// Prefix of the names of incomplete files and folders, which the final name follows. A killed
/// process leaves them behind; the next one that writes the same removes them, since nobody holds a
/// lock on them.
const UNFINISHED_PREFIX: &str = ".writing-";
/// Characters of the final name in that of an incomplete file, so that it is not too long.
const MAX_NAME_CHARS: usize = 50;
/// Prefix of the name that a folder has while another replaces it. The process id and the folder's
/// own name follow.
const REPLACED_PREFIX: &str = ".old-";

/// A file that is being written. It appears under its path only in [`UnfinishedFile::finish`];
/// dropped before that, it leaves nothing behind.
pub struct UnfinishedFile {
    file: Hashing<tempfile::NamedTempFile>,
    path: PathBuf,
}

/// Hashes what is written.
struct Hashing<W> {
    inner: W,
    hasher: blake3::Hasher,
}

impl<W> Hashing<W> {
    fn new(inner: W) -> Self {
        Hashing { inner, hasher: blake3::Hasher::new() }
    }

    fn checksum(&self) -> Checksum {
        self.hasher.finalize().into()
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let num_written = disk::write(&mut self.inner, bytes)?;
        self.hasher.update(&bytes[..num_written]);
        Ok(num_written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

impl UnfinishedFile {
    /// Begins a file, and makes its folder if there is none.
    ///
    /// # Errors
    /// File-system errors with the path.
    pub fn create(path: &Path) -> Result<Self> {
        let folder = parent(path);
        disk::create_folder(folder).map_err(Error::write(folder))?;
        let prefix = remove_abandoned(path)?;
        loop {
            let file = tempfile::Builder::new()
                .prefix(&prefix)
                .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o644))
                .tempfile_in(folder)
                .map_err(Error::write(folder))?;
            // Not every file system has locks. Before it had one, another process may have removed it.
            let _ = file.as_file().lock();
            if file.path().exists() {
                disk::began(file.path());
                return Ok(UnfinishedFile { file: Hashing::new(file), path: path.to_owned() });
            }
        }
    }

    /// Adds bytes at the end.
    ///
    /// # Errors
    /// File-system errors with the path, here and below.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::write(&self.path))
    }

    /// Syncs the file to disk, gives it its name, and returns its checksum.
    pub fn finish(self) -> Result<Checksum> {
        let UnfinishedFile { file, path } = self;
        let checksum = file.checksum();
        let (file, temporary) = file.inner.into_parts();
        disk::sync_file(&file, &temporary).map_err(Error::write(&path))?;
        disk::rename(&temporary, &path).map_err(Error::write(&path))?;
        // It was renamed: there is nothing left to remove.
        let _ = temporary.keep();
        sync(parent(&path))?;
        Ok(checksum)
    }
}

/// Writes a file through `fill`, and returns its checksum. It appears under `path` only once it is
/// complete and on disk.
///
/// # Errors
/// The error of `fill`, or a file-system error with the path.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut (dyn Write + Send)) -> Result<()>) -> Result<Checksum> {
    // A device or a pipe is written directly: renaming a file to its path would replace it.
    if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file() && !metadata.is_dir()) {
        let mut device = Hashing::new(fs::OpenOptions::new().write(true).open(path).map_err(Error::write(path))?);
        fill_buffered(path, &mut device, fill)?;
        return Ok(device.checksum());
    }
    let mut unfinished = UnfinishedFile::create(path)?;
    fill_buffered(path, &mut unfinished.file, fill)?;
    unfinished.finish()
}

fn fill_buffered(
    path: &Path,
    target: &mut (impl Write + Send),
    fill: impl FnOnce(&mut (dyn Write + Send)) -> Result<()>,
) -> Result<()> {
    let mut buffer = BufWriter::new(target);
    fill(&mut buffer)?;
    buffer.flush().map_err(Error::write(path))
}

/// Writes `bytes` as a file that appears whole or not at all.
///
/// # Errors
/// File-system errors with the path.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes).map_err(Error::write(path))).map(drop)
}

/// Writes a value as indented JSON with a final newline.
///
/// # Errors
/// File-system errors with the path.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(Error::serialization)?;
    text.push('\n');
    write(path, text.as_bytes())
}

/// A folder that is being written under a temporary path. It appears under its own path only in
/// [`UnfinishedFolder::finish`]; dropped before that, it leaves nothing behind.
pub struct UnfinishedFolder {
    work: tempfile::TempDir,
    /// Holds the lock.
    _handle: File,
    path: PathBuf,
}

impl UnfinishedFolder {
    /// Begins a folder, and makes its parents if there are none.
    ///
    /// # Errors
    /// File-system errors with the path, here and below.
    pub fn create(path: &Path) -> Result<Self> {
        let parent = parent(path);
        disk::create_folder(parent).map_err(Error::write(parent))?;
        let prefix = remove_abandoned(path)?;
        loop {
            let work = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent).map_err(Error::write(parent))?;
            let Ok(handle) = File::open(work.path()) else { continue };
            let _ = handle.lock();
            if work.path().exists() {
                return Ok(UnfinishedFolder { work, _handle: handle, path: path.to_owned() });
            }
        }
    }

    /// The temporary path, where this and other processes put the files of the folder.
    pub fn work(&self) -> &Path {
        self.work.path()
    }

    /// Adds the checksums of all files, syncs the folder and everything below it to disk, and gives it
    /// its name. A folder that has it is replaced. Files in `known` are not read for their checksums.
    pub fn finish(self, known: &[WrittenFile]) -> Result<()> {
        let UnfinishedFolder { work, path, _handle } = self;
        let listed = Checksums::of_folder(work.path(), known).and_then(|list| list.write(work.path()));
        listed.map_err(|error| with_final_path(error, work.path(), &path))?;
        tree(work.path())?.iter().try_for_each(|path| sync(path))?;
        fs::set_permissions(work.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .map_err(Error::write(work.path()))?;
        let old = path.exists().then(|| replaced_path(&path));
        if let Some(old) = &old {
            disk::rename(&path, old).map_err(Error::write(&path))?;
        }
        if let Err(error) = disk::rename(work.path(), &path) {
            // Put the old folder back.
            old.iter().try_for_each(|old| disk::rename(old, &path)).map_err(Error::write(&path))?;
            return Err(Error::write(&path)(error));
        }
        // The temporary folder was renamed: there is nothing left to remove.
        let _ = work.keep();
        // On disk before the old one goes.
        sync(parent(&path))?;
        old.map_or(Ok(()), |old| disk::remove_folder(&old).map_err(Error::write(&old)))
    }
}

/// Writes a folder through `fill`, which gets the path of a temporary folder. An existing folder
/// `path` is replaced.
///
/// # Errors
/// The error of `fill`, or a file-system error with the path.
pub fn write_folder_with(path: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let folder = UnfinishedFolder::create(path)?;
    fill(folder.work()).map_err(|error| with_final_path(error, folder.work(), path))?;
    folder.finish(&[])
}

/// Removes a folder, of which nothing is left under its path if the process is killed meanwhile.
///
/// # Errors
/// File-system errors with the path.
pub fn remove_folder(path: &Path) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let removed = parent(path).join(format!("{UNFINISHED_PREFIX}{}-{name}", std::process::id()));
    disk::rename(path, &removed).map_err(Error::write(path))?;
    disk::remove_folder(&removed).map_err(Error::write(path))
}

/// Adds bytes to the end of a file. They are on disk once [`disk::sync_file`] returns.
///
/// # Errors
/// File-system errors with the path.
pub fn append(file: &mut File, path: &Path, mut bytes: &[u8]) -> Result<()> {
    disk::appends(file, path);
    while !bytes.is_empty() {
        let num_written = disk::write(file, bytes).map_err(Error::write(path))?;
        bytes = &bytes[num_written..];
    }
    Ok(())
}

/// Makes the link `path` point to `target`, in one step, on disk when this returns.
///
/// # Errors
/// File-system errors with the path.
pub fn replace_link(path: &Path, target: &str) -> Result<()> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = path.with_file_name(format!("{UNFINISHED_PREFIX}{name}"));
    let _ = fs::remove_file(&new);
    std::os::unix::fs::symlink(target, &new).map_err(Error::write(&new))?;
    disk::rename(&new, path).map_err(Error::write(path))?;
    sync(parent(path))
}

/// Refuses an output folder that holds something, before work that would replace it as a whole.
///
/// # Errors
/// If it holds something; file-system errors.
pub fn refuse_nonempty(folder: &Path) -> Result<()> {
    let is_empty = folder.is_dir() && fs::read_dir(folder).map_err(Error::io(folder))?.next().is_none();
    if is_empty || !folder.exists() {
        return Ok(());
    }
    Err(Error::file(folder, "already exists: choose another output folder, or delete it"))
}

/// Removes what killed processes began under a path. Returns the prefix of the names for it.
fn remove_abandoned(path: &Path) -> Result<String> {
    let name: String = path.file_name().unwrap_or_default().to_string_lossy().chars().take(MAX_NAME_CHARS).collect();
    let prefix = format!("{UNFINISHED_PREFIX}{name}-");
    for entry in fs::read_dir(parent(path)).map_err(Error::write(parent(path)))?.flatten() {
        let is_ours = entry.file_name().to_string_lossy().strip_prefix(&prefix).is_some_and(|rest| rest.len() == 6);
        if !is_ours {
            continue;
        }
        // The lock is held until the file is gone, so that nobody takes it for their own.
        let Ok(file) = File::open(entry.path()) else { continue };
        if file.try_lock().is_ok() {
            remove(&entry.path())?;
        }
    }
    Ok(prefix)
}

fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { disk::remove_folder(path) } else { disk::remove_file(path) };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::write(path)(error)),
        _ => Ok(()),
    }
}

/// Cleans up a folder in which a killed process was writing: unfinished files are removed, and a
/// folder that was about to be replaced gets its name back. No other process may be writing there.
///
/// # Errors
/// File-system errors with the path.
pub fn recover(folder: &Path) -> Result<()> {
    let entries = match fs::read_dir(folder) {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(()),
        other => other.map_err(Error::io(folder))?,
    };
    for entry in entries {
        let entry = entry.map_err(Error::io(folder))?;
        let (path, name) = (entry.path(), entry.file_name().to_string_lossy().into_owned());
        let replaced = name.strip_prefix(REPLACED_PREFIX).and_then(|rest| Some(folder.join(rest.split_once('-')?.1)));
        match replaced {
            Some(target) if !target.exists() => disk::rename(&path, &target).map_err(Error::write(&target))?,
            None if !name.starts_with(UNFINISHED_PREFIX) => {}
            _ => remove(&path)?,
        }
    }
    Ok(())
}

/// The unfinished files and folders that a killed process left in a folder, which [`recover`]
/// removes.
///
/// # Errors
/// File-system errors with the path.
pub fn unfinished(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(folder).map_err(Error::io(folder))?;
    let paths = entries.map(|entry| Ok(entry.map_err(Error::io(folder))?.path())).collect::<Result<Vec<_>>>()?;
    let is_unfinished =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(UNFINISHED_PREFIX));
    Ok(paths.into_iter().filter(is_unfinished).collect())
}

/// Replaces the temporary path in an error by the path that the user knows.
pub fn with_final_path(error: Error, work: &Path, path: &Path) -> Error {
    match error {
        Error::Write { path: failed, source } => {
            let path = failed.strip_prefix(work).map(|inside| path.join(inside)).unwrap_or(failed);
            Error::Write { path, source }
        }
        other => other,
    }
}

/// The name that a folder has while another replaces it.
fn replaced_path(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    parent(path).join(format!("{REPLACED_PREFIX}{}-{name}", std::process::id()))
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// The files in a folder and below it.
///
/// # Errors
/// File-system errors with the path.
pub fn files_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = tree(folder)?;
    paths.retain(|path| path.is_file());
    Ok(paths)
}

/// A folder with everything in it and below, each folder after what it holds.
fn tree(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(Error::write(folder))? {
        let path = entry.map_err(Error::write(folder))?.path();
        if path.is_dir() { paths.extend(tree(&path)?) } else { paths.push(path) }
    }
    paths.push(folder.to_owned());
    Ok(paths)
}

/// Waits until a file, or the names in a folder, are on disk.
fn sync(path: &Path) -> Result<()> {
    disk::sync(path).map_err(Error::write(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checksum;

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
    fn a_device_is_written_directly_and_stays_a_device() {
        let dir = tempfile::tempdir().unwrap();
        // The test writes through links, so that a failure does not replace the device itself.
        let link = |device: &str| {
            let link = dir.path().join(device);
            std::os::unix::fs::symlink(Path::new("/dev").join(device), &link).unwrap();
            link
        };
        let null = link("null");
        write(&null, b"x").unwrap();
        assert!(null.is_symlink());
        let full = write(&link("full"), b"x").unwrap_err();
        assert!(full.exit_code() == 3 && full.to_string().contains("make room"), "{full}");
    }

    #[test]
    fn a_path_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let path = dir.path().join("file/run/numbers.json");
        for error in [write(&path, b"x").unwrap_err(), write_folder_with(&path, |_| Ok(())).unwrap_err()] {
            assert!(error.exit_code() == 3 && error.to_string().contains("file/run: cannot be written"), "{error}");
        }
        let folder = write(dir.path(), b"x").unwrap_err();
        assert!(folder.exit_code() == 2 && folder.to_string().contains("name a file"), "{folder}");
    }

    #[test]
    fn an_error_in_a_folder_names_the_final_path() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("step-1");
        let full = |work: &Path| Err(Error::write(work.join("weights"))(ErrorKind::StorageFull.into()));
        let error = write_folder_with(&path, full).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{}: cannot be written", path.join("weights").display())), "{error}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn leftovers_of_a_killed_process_are_cleaned_up() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str| write(&dir.path().join(name).join("weights"), name.as_bytes()).unwrap();
        // One process was killed before it renamed the new folder, another before it removed the
        // old one.
        ["step-1", ".old-77-step-1", ".old-77-my-final", ".writing-abc"].into_iter().for_each(put);
        write(&dir.path().join(".writing-def"), b"half").unwrap();
        write(&dir.path().join("mine.txt"), b"x").unwrap();
        recover(dir.path()).unwrap();
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, ["mine.txt", "my-final", "step-1"]);
        let content = |name: &str| fs::read_to_string(dir.path().join(name).join("weights")).unwrap();
        assert_eq!((content("my-final"), content("step-1")), (".old-77-my-final".into(), "step-1".into()));
        recover(&dir.path().join("nowhere")).unwrap();
    }

    #[test]
    fn what_a_killed_process_began_is_removed_when_the_same_is_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in [".writing-model-aaaaaa", ".writing-model-bbbbbb", ".writing-other-aaaaaa"] {
            fs::create_dir(at(name)).unwrap();
            fs::write(at(name).join("weights"), "half").unwrap();
        }
        // A process that lives holds a lock.
        let alive = File::open(at(".writing-model-bbbbbb")).unwrap();
        alive.lock().unwrap();
        fs::write(at(".writing-report.md-aaaaaa"), "half").unwrap();
        let unfinished = UnfinishedFolder::create(&at("model")).unwrap();
        // Neither do two that write the same at once remove each other's.
        write_folder_with(&at("model"), |work| write(&work.join("weights"), b"x")).unwrap();
        assert!(unfinished.work().exists());
        drop(unfinished);
        let file = UnfinishedFile::create(&at("report.md")).unwrap();
        write(&at("report.md"), b"x").unwrap();
        file.finish().unwrap();
        let mut names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(names, [".writing-model-bbbbbb", ".writing-other-aaaaaa", "model", "report.md"]);
    }

    #[test]
    fn files_below_a_folder_reach_the_disk_before_it_has_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["run/adapter/inner/a", "run/adapter/inner", "run/adapter", "run"];
        let expected = names.map(|name| dir.path().join(name));
        fs::create_dir_all(&expected[1]).unwrap();
        fs::write(&expected[0], b"x").unwrap();
        assert_eq!(tree(&dir.path().join("run")).unwrap(), expected);
    }

    #[test]
    fn a_folder_is_replaced_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("step-1");
        for content in ["a", "b"] {
            write_folder_with(&path, |work| write(&work.join(content), b"x")).unwrap();
        }
        assert!(!path.join("a").exists() && path.join("b").exists());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        checksum::check_folder(&path, "").unwrap();
        assert!(path.join(checksum::CHECKSUMS).exists());
    }
}
