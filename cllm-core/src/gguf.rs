//! Import of GGUF files: dequantised weights, config and tokenizer as a Hugging Face folder.

use std::path::Path;

use crate::Result;

/// Writes the model of a GGUF file as a Hugging Face folder (bf16 safetensors, config, generation_config, tokenizer).
///
/// # Errors
/// When the file is cut off, of an unsupported type or architecture.
pub fn convert(gguf: &Path, folder: &Path) -> Result<()> {
    let _ = (gguf, folder);
    todo!()
}
