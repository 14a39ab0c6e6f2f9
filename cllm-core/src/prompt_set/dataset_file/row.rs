//! A row as a file holds it, whatever the format of the file.

use std::fmt::{self, Display};

use serde_json::{Map, Value};

/// One row of a file, with the reason if it cannot be read.
pub(crate) struct FileRow {
    pub(crate) location: Location,
    pub(crate) object: Result<Map<String, Value>, RowError>,
}

/// Where a row stands in its file, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Location {
    /// Of a file with a row on each line.
    Line(usize),
    /// Of a JSON list or a Parquet file.
    Row(usize),
}

impl Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Line(number) => write!(f, "line {number}"),
            Location::Row(number) => write!(f, "row {number}"),
        }
    }
}

/// Why a row cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RowError {
    /// What many rows may have in common, as what is said of the row: `is not JSON`.
    pub(crate) reason: &'static str,
    /// What is particular to this row. Empty if there is nothing to add.
    pub(crate) detail: String,
}

impl RowError {
    pub(crate) fn new(reason: &'static str, detail: impl Into<String>) -> Self {
        RowError { reason, detail: detail.into() }
    }
}

impl Display for RowError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.detail.as_str() {
            "" => write!(f, "{}", self.reason),
            detail => write!(f, "{}: {detail}", self.reason),
        }
    }
}
