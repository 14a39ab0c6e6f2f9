//! Draws `report.md` and `report.html` from results and their samples.
use cllm_core::{Error, Result};
use std::path::{Path, PathBuf};
/// Draws the reports.
///
/// # Errors
/// None yet.
pub fn report(_: &[PathBuf], _: Option<&Path>) -> Result<Vec<PathBuf>> {
    Err(Error::usage("not yet"))
}
