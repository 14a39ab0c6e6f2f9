//! Converts GGUF files (llama.cpp's format) to Hugging Face folders: dequantized weights, config
//! and tokenizer.
//!
//! `file` parses the container, `blocks` the number formats in it; `config`, `tokenizer` and
//! `weights` translate one part each. Their errors are the rest of a sentence that begins with the
//! path of the file.

mod blocks;
mod config;
mod file;
mod tokenizer;
mod weights;

use std::path::Path;

use cllm_core::cuda::libtorch;
use cllm_core::{Error, Result, atomic_file, output_folder};

/// Writes the model of a GGUF file as a Hugging Face folder (bfloat16 safetensors, config,
/// generation_config, tokenizer). The folder appears whole or not at all.
///
/// # Errors
/// If the file is cut off or of an unsupported type or architecture, or if the folder holds
/// something already.
pub fn convert(gguf: &Path, folder: &Path) -> Result<()> {
    let _lock = output_folder::lock_new(folder)?;
    if gguf.is_dir() {
        return Err(Error::file(gguf, "is a folder: name the .gguf file in it"));
    }
    let map = libtorch::map_file(gguf)?;
    let bad = |message: String| Error::file(gguf, message);
    let file = file::GgufFile::parse(&map).map_err(bad)?;
    let config = config::read(&file).map_err(bad)?;
    let sources = weights::find_sources(&file, &config).map_err(bad)?;
    let tokenizer = tokenizer::read(&file, config.vocab_size).map_err(bad)?;
    atomic_file::write_folder_with(folder, |work| {
        atomic_file::write_json(&work.join("config.json"), &config.to_json("bfloat16"))?;
        tokenizer.write(work).map_err(|error| error.in_file(gguf))?;
        weights::write(&work.join("model.safetensors"), &sources)
    })
}
