//! What a model folder has so that `transformers` decodes with it as the strategy `rolling` does: a
//! method for `model.generate(..., custom_generate=FOLDER)`, and a page that shows how to call it.

use std::path::Path;

use cllm_core::{Error, Result};

/// Writes `custom_generate/generate.py` and `README.md` into the folder of a model.
///
/// # Errors
/// File-system errors.
pub fn write(model: &Path) -> Result<()> {
    let folder = model.join("custom_generate");
    std::fs::create_dir_all(&folder).map_err(Error::write(&folder))?;
    let files = [
        (folder.join("generate.py"), include_str!("generate.py")),
        (model.join("README.md"), include_str!("README.md")),
    ];
    files.iter().try_for_each(|(path, text)| std::fs::write(path, text).map_err(Error::write(path)))
}
