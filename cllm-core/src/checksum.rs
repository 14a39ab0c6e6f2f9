//! Checksums of whole files: BLAKE3, with which a file that was damaged, cut or exchanged after it was
//! written is told from the one that was written.
//!
//! The manifest of a data set holds those of its shards. A folder that appears whole, such as a model
//! or a checkpoint, holds those of its files in `checksums.json`. JSON that is written again and again,
//! or grows by a line at a time, holds its own, so that a kill cannot part the two. All of these are
//! read without checksums, as earlier versions wrote them.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Result, atomic_file, fingerprint, interrupt, text_file};

/// Name of the file with the checksums of a folder.
pub const CHECKSUMS: &str = "checksums.json";

/// Whether the toolkit reads a file of a model, by the end of its name.
pub fn is_read(file: &Path) -> bool {
    file.extension().is_some_and(|extension| ["json", "safetensors", "jinja"].iter().any(|read| extension == *read))
}

/// The checksum of a file's contents; 64 hex digits in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Checksum(blake3::Hash);

impl Checksum {
    /// # Errors
    /// When the file cannot be read.
    pub fn of_file(path: &Path) -> Result<Self> {
        fingerprint::contents_hash(path).map(Checksum)
    }

    /// Checks that a file still has the contents of this checksum. `list` names the file that holds the
    /// checksum, `advice` says what to do if the two differ.
    ///
    /// # Errors
    /// [`Error::File`] if they differ; a file that cannot be read.
    pub fn check(self, path: &Path, list: &str, advice: &str) -> Result<()> {
        self.expect(Checksum::of_file(path)?, path, list, advice)
    }

    /// As [`Self::check`], on the calling thread alone. A thread of a pool that waits for others to hash
    /// may take up work that waits for the same file.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn check_on_one_thread(self, path: &Path, list: &str, advice: &str) -> Result<()> {
        let mut hasher = blake3::Hasher::new();
        File::open(path).and_then(|file| hasher.update_reader(file).map(drop)).map_err(Error::io(path))?;
        self.expect(hasher.finalize().into(), path, list, advice)
    }

    fn expect(self, found: Checksum, path: &Path, list: &str, advice: &str) -> Result<()> {
        match found == self {
            true => Ok(()),
            false => {
                Err(Error::file(path, format!("is damaged, or was changed: {list} has another checksum; {advice}")))
            }
        }
    }
}

impl From<blake3::Hash> for Checksum {
    fn from(hash: blake3::Hash) -> Self {
        Checksum(hash)
    }
}

impl From<Checksum> for String {
    fn from(checksum: Checksum) -> Self {
        checksum.to_string()
    }
}

impl TryFrom<String> for Checksum {
    type Error = blake3::HexError;

    fn try_from(hex: String) -> std::result::Result<Self, Self::Error> {
        blake3::Hash::from_hex(hex).map(Checksum)
    }
}

impl fmt::Display for Checksum {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.0.to_hex().as_str())
    }
}

/// How the last member of a JSON object begins that holds the checksum of all before it. No text in the
/// object has these characters, since quotes in texts are escaped.
const JSON_MEMBER: &str = "\"checksum\":";

/// Adds its checksum to the JSON text of an object.
///
/// # Errors
/// [`Error::Internal`] for a text that is no object.
pub fn add_to_json(json: &str) -> Result<String> {
    let members = json.strip_suffix('}').ok_or_else(|| Error::internal("a checksum is added to an object"))?;
    let (members, newline, indent) = match members.strip_suffix('\n') {
        Some(members) => (members, "\n", "\n  "),
        None => (members, "", ""),
    };
    let checked = format!("{members},{indent}");
    let checksum = Checksum(blake3::hash(checked.as_bytes()));
    Ok(format!("{checked}{JSON_MEMBER} \"{checksum}\"{newline}}}"))
}

/// The JSON text of an object that was read, if it still has the contents of its checksum. One without
/// a checksum passes; what is not UTF-8 is damaged, since JSON is written in UTF-8.
pub fn whole_json(bytes: &[u8]) -> Option<&str> {
    str::from_utf8(bytes).ok().filter(|json| is_whole_json(json))
}

fn is_whole_json(json: &str) -> bool {
    let Some((checked, rest)) = json.rfind(JSON_MEMBER).map(|at| json.split_at(at)) else { return true };
    let value = rest[JSON_MEMBER.len()..].trim_end().strip_suffix('}').map(str::trim);
    match value.and_then(|value| value.strip_prefix('"')?.strip_suffix('"')) {
        Some(checksum) if !checksum.contains('"') => {
            checksum == Checksum::from(blake3::hash(checked.as_bytes())).to_string()
        }
        // The member of an object in the object.
        _ => true,
    }
}

/// Writes an object as indented JSON that holds its own checksum.
///
/// # Errors
/// File-system errors with the path.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(Error::serialization)?;
    atomic_file::write(path, format!("{}\n", add_to_json(&text)?).as_bytes())
}

/// A file that was just written, with its checksum.
pub type WrittenFile = (PathBuf, Checksum);

/// The checksums of the files in a folder and below it that the toolkit reads, by their paths relative
/// to it. Texts such as a model's card are for their owner to change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checksums {
    schema_version: u32,
    files: BTreeMap<PathBuf, Checksum>,
}

impl Checksums {
    /// Those of the files below `folder`. Files in `known` are not read again.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub fn of_folder(folder: &Path, known: &[WrittenFile]) -> Result<Self> {
        let mut files: BTreeMap<PathBuf, Checksum> = BTreeMap::new();
        for path in atomic_file::files_below(folder)?.into_iter().filter(|path| is_read(path)) {
            let checksum = match known.iter().find(|(known, _)| *known == path) {
                Some((_, checksum)) => *checksum,
                None => Checksum::of_file(&path)?,
            };
            let name = path.strip_prefix(folder).map_err(|_| Error::internal("a file is outside of its folder"))?;
            files.insert(name.to_owned(), checksum);
        }
        files.remove(Path::new(CHECKSUMS));
        Ok(Checksums { schema_version: 1, files })
    }

    /// Those that a folder holds; `None` for one that was written without.
    ///
    /// # Errors
    /// [`Error::File`] for a list that is damaged or names files outside of the folder.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(CHECKSUMS);
        if !path.exists() {
            return Ok(None);
        }
        let unreadable = |problem: &dyn fmt::Display| {
            Error::file(&path, format!("is not a list of checksums: {problem}; remove it to use the folder unchecked"))
        };
        let list: Checksums = serde_json::from_str(&text_file::read(&path)?).map_err(|error| unreadable(&error))?;
        if list.schema_version != 1 {
            return Err(unreadable(&format!("its schema_version is {}, expected 1", list.schema_version)));
        }
        match list.files.keys().find(|name| !is_inside(name)) {
            Some(outside) => Err(unreadable(&format!("`{}` is outside of the folder", outside.display()))),
            None => Ok(Some(list)),
        }
    }

    /// Those of a folder in another one whose list has its files, such as `final/adapter`.
    fn read_around(folder: &Path) -> Option<Self> {
        let (around, name) = (folder.parent()?, folder.file_name()?);
        // The user may have another file of this name there.
        let Checksums { schema_version, files } = Checksums::read(around).ok()??;
        let inside =
            files.into_iter().filter_map(|(file, checksum)| Some((file.strip_prefix(name).ok()?.into(), checksum)));
        Some(Checksums { schema_version, files: inside.collect() })
    }

    /// Writes `checksums.json` into the folder.
    ///
    /// # Errors
    /// File-system errors.
    pub fn write(&self, folder: &Path) -> Result<()> {
        atomic_file::write_json(&folder.join(CHECKSUMS), self)
    }
}

/// What to do about a file of a model that differs from its checksum.
pub const MODEL_ADVICE: &str = "copy the folder again, or remove the file's line from checksums.json if you changed it";

/// Checks that the files of a folder are as they were written, by its own list or that of the folder
/// around it. A folder without checksums passes, and so does one without the folders in it, which a
/// download of the model leaves out. `advice` says what to do about a file that differs.
///
/// # Errors
/// [`Error::File`] that names the first file that is missing or differs.
pub fn check_folder(folder: &Path, advice: &str) -> Result<()> {
    let Some(list) = Checksums::read(folder)?.or_else(|| Checksums::read_around(folder)) else { return Ok(()) };
    for (name, checksum) in &list.files {
        interrupt::check()?;
        let path = folder.join(name);
        if path.exists() {
            checksum.check(&path, CHECKSUMS, advice)?;
        } else if name.components().count() == 1 {
            return Err(Error::file(&path, format!("is missing, although {CHECKSUMS} lists it; {advice}")));
        }
    }
    Ok(())
}

/// Removes files from the list of a folder, before they are removed themselves.
///
/// # Errors
/// A damaged list; file-system errors.
pub fn forget(folder: &Path, files: &[PathBuf]) -> Result<()> {
    let Some(mut list) = Checksums::read(folder)? else { return Ok(()) };
    list.files.retain(|name, _| !files.contains(&folder.join(name)));
    list.write(folder)
}

/// Whether a path in a file leads to something inside of the folder that it is relative to.
pub fn is_inside(path: &Path) -> bool {
    path.components().next().is_some() && path.components().all(|part| matches!(part, Component::Normal(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_that_holds_its_checksum_is_found_changed() {
        let value = serde_json::json!({"text": "a \"checksum\": \"b\"}", "inner": {"checksum": "c"}});
        let compact = add_to_json(&value.to_string()).unwrap();
        let indented = add_to_json(&serde_json::to_string_pretty(&value).unwrap()).unwrap();
        for json in [compact, indented] {
            assert!(is_whole_json(&json) && is_whole_json(&format!("{json}\n")), "{json}");
            let mut read: serde_json::Value = serde_json::from_str(&json).unwrap();
            read.as_object_mut().unwrap().remove("checksum").unwrap();
            assert_eq!(read, value);
            for changed in [json.replace("a \\", "b \\"), json.replace("\"c\"", "\"d\""), json.replace("text", "test")]
            {
                assert!(!is_whole_json(&changed), "{changed}");
            }
        }
        // Objects without a checksum of their own.
        let inner = ["{}", "{\"inner\":{\"checksum\":\"c\"}}", "{\"inner\":{\"checksum\":\"c\"},\"text\":\"d\"}"];
        for json in inner.map(str::to_owned).into_iter().chain([value.to_string()]) {
            assert_eq!(whole_json(json.as_bytes()), Some(&json[..]));
        }
        assert_eq!(whole_json(b"{\"text\":\"\xfc\"}"), None);
    }

    #[test]
    fn a_folder_is_checked_against_its_list() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path();
        atomic_file::write(&folder.join("weights.safetensors"), b"12345").unwrap();
        atomic_file::write(&folder.join("adapter/config.json"), b"{}").unwrap();
        atomic_file::write(&folder.join("README.md"), b"a card").unwrap();
        check_folder(folder, "").unwrap();
        Checksums::of_folder(folder, &[]).unwrap().write(folder).unwrap();
        assert_eq!(Checksums::of_folder(folder, &[]).unwrap(), Checksums::read(folder).unwrap().unwrap());
        check_folder(folder, "").unwrap();
        let refused = |parts: &[&str]| {
            let message = check_folder(folder, MODEL_ADVICE).unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        };
        atomic_file::write(&folder.join("adapter/config.json"), b"{ ").unwrap();
        refused(&["adapter/config.json: is damaged, or was changed", "checksums.json", "copy the folder again"]);
        let message = check_folder(&folder.join("adapter"), MODEL_ADVICE).unwrap_err().to_string();
        assert!(message.contains("adapter/config.json: is damaged"), "{message}");
        // A download of the model has no folders in it, and its card is for people to change.
        std::fs::remove_file(folder.join("adapter/config.json")).unwrap();
        atomic_file::write(&folder.join("README.md"), b"changed").unwrap();
        check_folder(folder, "").unwrap();
        std::fs::remove_file(folder.join("weights.safetensors")).unwrap();
        refused(&["weights.safetensors: is missing"]);
        forget(folder, &[folder.join("weights.safetensors")]).unwrap();
        check_folder(folder, "").unwrap();
        for outside in ["../weights", "/etc/passwd", "a/../../b"] {
            let list = format!("{{\"schema_version\": 1, \"files\": {{\"{outside}\": \"{}\"}}}}", "0".repeat(64));
            atomic_file::write(&folder.join(CHECKSUMS), list.as_bytes()).unwrap();
            refused(&["checksums.json: is not a list", outside, "outside of the folder"]);
        }
        atomic_file::write(&folder.join(CHECKSUMS), b"{\"schema_version\": 99, \"files\": {}}").unwrap();
        refused(&["schema_version is 99"]);
    }
}
