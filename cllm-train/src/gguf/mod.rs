//! Import of GGUF files: dequantised weights, config and tokenizer as a Hugging Face folder.

mod blocks;
mod config;
mod file;
mod tokenizer;
mod weights;

use std::path::Path;

use cllm_core::cuda::libtorch;
use cllm_core::{Error, Result, atomic_file};

/// Writes the model of a GGUF file as a Hugging Face folder (bf16 safetensors, config, generation_config, tokenizer).
/// The folder appears whole or not at all.
///
/// # Errors
/// When the file is cut off, of an unsupported type or architecture, or the folder holds something already.
pub fn convert(gguf: &Path, folder: &Path) -> Result<()> {
    refuse_full(folder)?;
    if gguf.is_dir() {
        return Err(Error::file(gguf, "is a folder: name the .gguf file in it"));
    }
    let map = libtorch::map_file(gguf)?;
    let bad = |message: String| Error::file(gguf, message);
    let file = file::Gguf::parse(&map).map_err(bad)?;
    let config = config::read(&file).map_err(bad)?;
    let sources = weights::sources(&file, &config).map_err(bad)?;
    let tokenizer = tokenizer::read(&file, config.vocab_size).map_err(bad)?;
    atomic_file::write_folder_with(folder, |work| {
        atomic_file::write_json(&work.join("config.json"), &config.to_json("bfloat16"))?;
        tokenizer.write(work)?;
        weights::write(&work.join("model.safetensors"), &sources)
    })
}

/// The output takes the place of the whole folder, so there must be nothing in it to lose.
fn refuse_full(folder: &Path) -> Result<()> {
    let empty = folder.is_dir() && std::fs::read_dir(folder).map_err(Error::io(folder))?.next().is_none();
    if empty || !folder.exists() {
        return Ok(());
    }
    Err(Error::file(folder, "exists already: choose another output folder, or delete it"))
}
