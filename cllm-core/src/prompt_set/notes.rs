//! What reading a prompt set left out or moved. It is counted, and told once on stderr.

use std::fmt::Write;
use std::path::Path;

use super::dataset_file::{Location, NOT_JSON, RowError};
use super::form::RowSamples;
use super::sample::Sample;
use crate::progress::{self, count};
use crate::{Error, Result};

/// Counts of one file.
#[derive(Debug, Default)]
pub(super) struct Notes {
    /// Rows that gave samples.
    num_read: usize,
    set_aside: Vec<SetAside>,
    meta_fields: Vec<String>,
    lost_keys: Vec<String>,
    /// Turns that are no prompts of their own, because they call a tool.
    num_calling: usize,
    /// Prompts whose answer is empty.
    num_empty: usize,
}

/// The rows that are set aside for one reason.
#[derive(Debug)]
struct SetAside {
    first: (Location, RowError),
    num_rows: usize,
}

impl Notes {
    /// Counts a row that was read, and returns its samples.
    pub(super) fn add_read(&mut self, row: RowSamples) -> Vec<Sample> {
        self.num_read += 1;
        self.num_calling += row.num_calling;
        self.num_empty += row.num_empty;
        extend_unique(&mut self.meta_fields, row.meta_fields);
        extend_unique(&mut self.lost_keys, row.lost_keys);
        row.samples
    }

    /// Counts a row that cannot be read.
    pub(super) fn add_set_aside(&mut self, location: Location, error: RowError) {
        match self.set_aside.iter_mut().find(|known| known.first.1.reason == error.reason) {
            Some(known) => known.num_rows += 1,
            None => self.set_aside.push(SetAside { first: (location, error), num_rows: 1 }),
        }
    }

    /// Tells on stderr what was left out or moved, and returns the number of rows set aside.
    ///
    /// # Errors
    /// When no row could be read; when not all of `num_rows` have been counted.
    pub(super) fn finish(self, path: &Path, num_rows: usize) -> Result<usize> {
        let num_set_aside: usize = self.set_aside.iter().map(|reason| reason.num_rows).sum();
        if self.num_read + num_set_aside != num_rows {
            let counts = format!("{} of {num_rows} rows read, {num_set_aside} set aside", self.num_read);
            return Err(Error::internal(format!("{}: {counts}", path.display())));
        }
        if num_rows == 0 {
            return Err(Error::file(path, "holds no prompts: name another file, or create it again"));
        }
        if self.num_read == 0 {
            let is_not_json = self.set_aside.iter().all(|reason| reason.first.1.reason == NOT_JSON);
            let formats = if is_not_json { "\nFiles are JSON Lines, a JSON list or Parquet" } else { "" };
            let rows = count(num_rows, "row");
            return Err(Error::file(path, format!("none of {rows} can be read:{}{formats}", self.reasons())));
        }
        let file = path.display();
        if num_set_aside > 0 {
            progress::log(format!(
                "{file}: set aside {num_set_aside} of {}:{}",
                count(num_rows, "row"),
                self.reasons()
            ));
        }
        if !self.meta_fields.is_empty() {
            progress::log(format!("{file}: kept in meta: {}", self.meta_fields.join(", ")));
        }
        if !self.lost_keys.is_empty() {
            let keys = self.lost_keys.join(", ");
            progress::log(format!("{file}: left out of the answers' messages, which are text alone: {keys}"));
        }
        if self.num_calling > 0 {
            let turns = count(self.num_calling, "turn");
            progress::log(format!("{file}: no prompts for {turns} that call a tool: a reference is text alone"));
        }
        if self.num_empty > 0 {
            let prompts = count(self.num_empty, "prompt");
            progress::log(format!("{file}: no reference for {prompts} with an empty answer"));
        }
        Ok(num_set_aside)
    }

    /// Each reason with the first row that has it, on a line of its own.
    fn reasons(&self) -> String {
        let mut text = String::new();
        for SetAside { first: (location, error), num_rows } in &self.set_aside {
            let others = match num_rows - 1 {
                0 => String::new(),
                others => format!(" (and {} like it)", count(others, "row")),
            };
            let _ = write!(text, "\n  {location} {error}{others}");
        }
        text
    }
}

fn extend_unique(names: &mut Vec<String>, more: Vec<String>) {
    for name in more {
        if !names.contains(&name) {
            names.push(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_that_is_neither_read_nor_set_aside_is_an_internal_error() {
        let counted = || {
            let mut notes = Notes::default();
            notes.add_read(RowSamples::default());
            notes.add_set_aside(Location::Line(2), RowError::new("is not JSON", ""));
            notes
        };
        let path = Path::new("rows.jsonl");
        assert_eq!(counted().finish(path, 2).unwrap(), 1);
        let error = counted().finish(path, 3).unwrap_err();
        assert!(error.exit_code() == 70 && error.to_string().contains("1 of 3 rows read, 1 set aside"), "{error}");
    }
}
