//! Finds a model by its folder, or by an id in the Hugging Face cache.

use std::path::PathBuf;

use crate::Result;

/// The folder of the model that `name` means: a folder, or an id such as `HuggingFaceTB/SmolLM2-135M-Instruct`
/// found in the Hugging Face cache (`HF_HUB_CACHE`, `HF_HOME`), downloaded first where the feature `hub` is built in.
///
/// # Errors
/// When there is no such folder and no such cached model; says where it looked.
pub fn locate(name: &str) -> Result<PathBuf> {
    let _ = name;
    todo!()
}
