//! Sorts the records of a reference file on disk, so that those of one response come together
//! however the file orders them, in memory that does not grow with the file.

use std::path::{Path, PathBuf};

use cllm_core::{Error, Result};
use rusqlite::{Connection, params};

use crate::reference_format::Record;

/// The sorted records, in a temporary database that is gone when the program ends.
pub(crate) struct RecordStore {
    connection: Connection,
    /// The file that the records come from, for error messages.
    file: PathBuf,
}

impl RecordStore {
    pub(crate) fn create(file: &Path) -> Result<Self> {
        // An empty name is a temporary file that SQLite removes.
        let connection = Connection::open("").map_err(failure)?;
        let schema = "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE records (position INTEGER, number INTEGER, data_id TEXT, block INTEGER, record BLOB); BEGIN";
        connection.execute_batch(schema).map_err(failure)?;
        Ok(RecordStore { connection, file: file.to_owned() })
    }

    pub(crate) fn add(&self, record: &Record) -> Result<()> {
        let block = record.block_index().ok_or_else(|| {
            let message = format!("data_id `{}`: jacobian_itr_id does not have the form itr_0", record.data_id);
            Error::file(&self.file, message)
        })?;
        let bytes = serde_json::to_vec(record).map_err(Error::serialization)?;
        let row = params![record.row, number_at_end(&record.data_id), record.data_id, block as i64, bytes];
        let insert = "INSERT INTO records VALUES (?, ?, ?, ?, ?)";
        self.connection.execute(insert, row).map(drop).map_err(failure)
    }

    /// Calls `on_response` with the records of each response in the order of their blocks. The
    /// responses come in the order of the exported rows, or else of their ids: `data_2` before
    /// `data_10`.
    pub(crate) fn for_each_response(&self, mut on_response: impl FnMut(Vec<Record>) -> Result<()>) -> Result<()> {
        let sorted = "SELECT record FROM records
            ORDER BY position IS NULL, position, number IS NULL, number, data_id, block";
        let mut query = self.connection.prepare(sorted).map_err(failure)?;
        let mut found = query.query([]).map_err(failure)?;
        let mut records: Vec<Record> = Vec::new();
        while let Some(row) = found.next().map_err(failure)? {
            let bytes: Vec<u8> = row.get(0).map_err(failure)?;
            let record: Record = serde_json::from_slice(&bytes).map_err(Error::serialization)?;
            if records.first().is_some_and(|first| !first.is_of_same_response(&record)) {
                on_response(std::mem::take(&mut records))?;
            }
            records.push(record);
        }
        if records.is_empty() { Ok(()) } else { on_response(records) }
    }
}

/// The 17 of `data_17`.
fn number_at_end(id: &str) -> Option<i64> {
    let digits = id.len() - id.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    id[id.len() - digits..].parse().ok()
}

fn failure(error: rusqlite::Error) -> Error {
    Error::environment(format!(
        "the records cannot be sorted in a temporary file: {error}: make room in the folder for temporary files, or name \
         another one in SQLITE_TMPDIR"
    ))
}
