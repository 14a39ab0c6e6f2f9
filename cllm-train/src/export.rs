//! `export`: a checkpoint as a model folder with weights of another type, adapters merged.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use cllm_core::checkpoint::hub;
use cllm_core::{Error, Result, atomic_file, progress, tokenizer};
use tch::{Device, Kind};

/// What to write.
#[derive(Args)]
pub struct Arguments {
    /// The checkpoint, model or adapter: a folder, or an id in the Hugging Face cache.
    model: String,
    /// Type of the weights.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: Dtype,
    /// Folder to write; must not exist yet.
    #[arg(long, short)]
    output: PathBuf,
}

/// Types of weights.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Dtype {
    /// 32-bit floats.
    F32,
    /// Brain floats.
    Bf16,
    /// 16-bit floats.
    F16,
}

/// Writes the folder.
pub fn run(arguments: &Arguments) -> Result<()> {
    let from = hub::locate(&arguments.model)?;
    if arguments.output.exists() {
        return Err(Error::file(&arguments.output, "exists already: choose another output folder, or delete it"));
    }
    let kind = match arguments.dtype {
        Dtype::F32 => Kind::Float,
        Dtype::Bf16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
    };
    // Read in float32, so that whatever the source holds is rounded once.
    let model = cllm_core::checkpoint::load(&from, Device::Cpu, Kind::Float)?;
    atomic_file::write_folder_with(&arguments.output, |folder| {
        cllm_core::checkpoint::save(&model, folder, kind)?;
        tokenizer::copy_files(&from, folder)
    })?;
    progress::log(format!("the model is in {}", arguments.output.display()));
    Ok(())
}
