//! Reads whole text files. The error for a file that is not UTF-8 names the line, since editors do
//! not show byte offsets.

use std::path::Path;

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Reads a text file.
///
/// # Errors
/// When it cannot be read, or is not UTF-8.
pub fn read(path: &Path) -> Result<String> {
    decode(path, 1, std::fs::read(path).map_err(Error::io(path))?)
}

/// Reads a JSON file.
///
/// # Errors
/// When it cannot be read, or does not hold such a value.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    serde_json::from_str(&read(path)?).map_err(|error| Error::file(path, error.to_string()))
}

/// Decodes bytes that begin in `line` (from 1) of the file `path`.
///
/// # Errors
/// Names the line that is not UTF-8.
pub(crate) fn decode(path: &Path, line: usize, bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let valid = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = line + valid.iter().filter(|&&byte| byte == b'\n').count();
        Error::file(path, format!("line {line} is not UTF-8: save the file as UTF-8 text, or name another"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_not_utf8_is_refused_with_the_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.yaml");
        std::fs::write(&path, "a: 1\nb: ü\n").unwrap();
        assert_eq!(read(&path).unwrap(), "a: 1\nb: ü\n");
        std::fs::write(&path, b"a: 1\nb: \xfc\n").unwrap();
        let error = read(&path).unwrap_err();
        assert!(error.exit_code() == 2 && error.to_string().contains("run.yaml: line 2 is not UTF-8"), "{error}");
    }
}
