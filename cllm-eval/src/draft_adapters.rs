//! Adapters for draft tokens in a model's folder, and the strategies that use them.

use std::path::Path;

use cllm_core::decode::{NO_DRAFT_ADAPTERS, Strategy};
use cllm_core::{Error, Result, checkpoint, progress};

/// Checks that a model has adapters for draft tokens if one of its strategies needs them, and says so
/// if a strategy leaves those that it has unused: it drafts as if there were none. `setting` is one
/// that uses them.
///
/// # Errors
/// [`Error::File`] for a model without them, and for broken files.
pub(crate) fn check(folder: &Path, strategies: &[Strategy], setting: &str) -> Result<()> {
    let are_used = strategies.iter().any(|strategy| strategy.needs_draft_adapters());
    match (checkpoint::adapts_drafts(folder)?, are_used) {
        (false, true) => return Err(Error::file(folder, NO_DRAFT_ADAPTERS)),
        (false, false) => {}
        (true, false) => {
            let folder = folder.display();
            progress::log(format!("{folder}: no strategy uses its adapters for draft tokens; set {setting}"));
        }
        (true, true) => {
            for strategy in strategies.iter().filter(|strategy| strategy.needs_draft_model()) {
                let folder = folder.display();
                progress::log(format!("{folder}: `{strategy}` does not use its adapters for draft tokens"));
            }
        }
    }
    Ok(())
}
