//! Turns the failures of the `parquet` crate into errors that name the file.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::errors::ParquetError;
use parquet::file::metadata::ParquetMetaDataReader;

use crate::{Error, Result};

/// Runs code that reads Parquet. The `parquet` crate panics on some files whose header and footer
/// are intact but whose contents are damaged.
pub(crate) fn catch_panic<T>(path: &Path, read: impl FnOnce() -> Result<T>) -> Result<T> {
    let damaged = |_| Err(Error::file(path, "is damaged: copy it again, or regenerate it"));
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(damaged)
}

/// Number of rows that the footer of a file names.
pub(crate) fn num_rows(path: &Path) -> Result<usize> {
    let file = File::open(path).map_err(Error::io(path))?;
    catch_panic(path, || {
        let metadata = ParquetMetaDataReader::new().parse_and_finish(&file);
        let metadata =
            metadata.map_err(|error| Error::file(path, format!("is not a complete Parquet file: {error}")))?;
        Ok(metadata.file_metadata().num_rows() as usize)
    })
}

/// Unwraps the operating-system error behind a failed write, so that a full disk is reported as
/// one.
pub(crate) fn write_error(path: &Path, error: ParquetError) -> Error {
    match error {
        ParquetError::External(inner) => match inner.downcast::<std::io::Error>() {
            Ok(source) => Error::Write { path: path.to_owned(), source: *source },
            Err(inner) => Error::file(path, inner.to_string()),
        },
        other => Error::file(path, other.to_string()),
    }
}
