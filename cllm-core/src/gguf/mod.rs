//! Import of GGUF files: dequantised weights, config and tokenizer as a Hugging Face folder.

mod blocks;
mod config;
mod file;
mod tokenizer;
mod weights;

use std::path::Path;

use crate::{Error, Result, atomic_file, torch_ext};

/// Writes the model of a GGUF file as a Hugging Face folder (bf16 safetensors, config, generation_config, tokenizer).
/// The folder appears whole or not at all; one of that name is replaced if it holds a model or nothing.
///
/// # Errors
/// When the file is cut off, of an unsupported type or architecture.
pub fn convert(gguf: &Path, folder: &Path) -> Result<()> {
    refuse_foreign(folder)?;
    let map = torch_ext::map_file(gguf)?;
    let bad = |message: String| Error::file(gguf, message);
    let file = file::Gguf::parse(&map).map_err(bad)?;
    let config = config::read(&file).map_err(bad)?;
    let sources = weights::sources(&file, &config).map_err(bad)?;
    let tokenizer = tokenizer::read(&file, config.vocab_size).map_err(bad)?;
    atomic_file::folder_with(folder, |work| {
        atomic_file::write_json(&work.join("config.json"), &config.to_json("bfloat16"))?;
        tokenizer.write(work)?;
        weights::write(&work.join("model.safetensors"), &sources)
    })
}

/// The output replaces a folder whole, so it must not be one that holds something else.
fn refuse_foreign(folder: &Path) -> Result<()> {
    if !folder.exists() || folder.join("config.json").exists() {
        return Ok(());
    }
    let empty = folder.is_dir() && std::fs::read_dir(folder).map_err(Error::io(folder))?.next().is_none();
    if empty { Ok(()) } else { Err(Error::file(folder, "exists and holds no model: name a new folder")) }
}
