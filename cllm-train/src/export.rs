//! `export`: converts a checkpoint to a model folder with weights of another type, adapters merged.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use cllm_core::checkpoint::{self, base_folder, hub, is_adapter};
use cllm_core::{Error, Result, atomic_file, checksum, output_folder, progress, tokenizer};
use tch::{Device, Kind};

use crate::custom_generate;
use crate::model_card::ModelCard;
use crate::run_folder::{FINAL, checkpoints_folder};
use crate::summary::SUMMARY_FILE;

/// Arguments of `export`.
#[derive(Args)]
pub struct ExportArgs {
    /// The checkpoint, model or adapter: a folder, or an id in the Hugging Face cache.
    model: String,
    /// Type of the weights.
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: ExportDtype,
    /// Add custom_generate/generate.py, with which `transformers` decodes several tokens per forward,
    /// and a README.md that shows how.
    #[arg(long)]
    custom_generate: bool,
    /// Folder to write; it must not exist yet.
    #[arg(long, short)]
    output: PathBuf,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ExportDtype {
    /// float32.
    #[value(alias = "float32")]
    F32,
    /// bfloat16.
    #[value(alias = "bfloat16")]
    Bf16,
    /// float16.
    #[value(alias = "float16")]
    F16,
}

impl From<ExportDtype> for Kind {
    fn from(dtype: ExportDtype) -> Self {
        match dtype {
            ExportDtype::F32 => Kind::Float,
            ExportDtype::Bf16 => Kind::BFloat16,
            ExportDtype::F16 => Kind::Half,
        }
    }
}

/// Writes the folder.
///
/// # Errors
/// A bad model, an output folder that exists, file-system errors.
pub fn run(args: &ExportArgs) -> Result<()> {
    export(&hub::locate(&args.model)?, args.dtype.into(), &args.output, args.custom_generate)?;
    let name = args.dtype.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned());
    progress::log(format!("the model is in {}, as {name} (--dtype)", args.output.display()));
    Ok(())
}

/// Writes the model in `source` with weights of another type into a new folder, adapters merged.
///
/// # Errors
/// A bad model, an output folder that exists, file-system errors.
pub fn export(source: &Path, kind: Kind, output: &Path, with_custom_generate: bool) -> Result<()> {
    let _lock = output_folder::lock_new(output)?;
    if source.join(SUMMARY_FILE).exists() || checkpoints_folder(source).is_dir() {
        let run = source.display();
        let message = format!("is the folder of a run, not a model: name {run}/{FINAL} or one of {run}/checkpoints/");
        return Err(Error::file(source, message));
    }
    checksum::check_folder(source, checksum::MODEL_ADVICE)?;
    if is_adapter(source) {
        checksum::check_folder(&base_folder(source)?, checksum::MODEL_ADVICE)?;
    }
    // Loaded in float32, so that the weights are rounded only once, whatever type they have.
    let model = checkpoint::load(source, Device::Cpu, Kind::Float)?;
    if model.adapts_drafts() {
        return Err(Error::file(
            source,
            "holds adapters that act on draft tokens alone; merged into the model, they would change its answers: use the \
             folder as it is, with strategy `gated`",
        ));
    }
    atomic_file::write_folder_with(output, |folder| {
        checkpoint::save(&model, folder, kind)?;
        tokenizer::copy_files(source, folder)?;
        if with_custom_generate {
            custom_generate::write(folder)?;
            ModelCard::of_student().write(folder)?;
        }
        Ok(())
    })
}
