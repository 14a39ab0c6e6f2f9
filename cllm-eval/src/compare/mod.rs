//! `compare`: pairs two results by example, and shows beside each difference how far chance alone
//! could explain it.

mod comparison;
mod selection;
mod selector;
mod text;

use std::path::Path;

use cllm_core::{Error, Result};

use selection::Selection;
use selector::DefaultChoice;

pub use comparison::{Comparison, Side, SpeedComparison};

/// Compares B with A, or the student of one folder with its teacher. A selector names a role, a
/// strategy or both: `student/rolling`, `teacher`, `jacobi n=16`.
///
/// # Errors
/// When a run is missing or broken, a selector matches nothing, or the two answered different
/// prompts.
pub fn compare(a: &Path, b: Option<&Path>, select_a: Option<&str>, select_b: Option<&str>) -> Result<Comparison> {
    let default_a = if b.is_some() { DefaultChoice::Fastest } else { DefaultChoice::Baseline };
    let a_selection = Selection::read(a, select_a, "--a", default_a)?;
    let b_selection = Selection::read(b.unwrap_or(a), select_b, "--b", DefaultChoice::Fastest)?;
    if a_selection.is_same_as(&b_selection) {
        let name = a_selection.name();
        return Err(Error::usage(format!("both sides are {name}: select others with --a and --b, or name two runs")));
    }
    a_selection.expect_comparable(&b_selection)?;
    Comparison::new(&a_selection, &b_selection)
}
