//! What a model folder has so that `transformers` decodes with it as the strategy `rolling` does: a
//! method for `model.generate(..., custom_generate=FOLDER)`.

use std::path::Path;

use cllm_core::{Error, Result};

/// Writes `custom_generate/generate.py` into the folder of a model.
///
/// # Errors
/// File-system errors.
pub fn write(model: &Path) -> Result<()> {
    let folder = model.join("custom_generate");
    std::fs::create_dir_all(&folder).map_err(Error::write(&folder))?;
    let path = folder.join("generate.py");
    std::fs::write(&path, include_str!("generate.py")).map_err(Error::write(path))
}
