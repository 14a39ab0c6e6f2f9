//! Arguments that the command lines of the three programs have in common.

use std::path::PathBuf;

use garde::Validate;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::print;
use crate::{Error, Result, settings};

/// Arguments of a verb that is driven by settings.
#[derive(Debug, clap::Args)]
pub struct SettingsArgs {
    /// Read settings from a YAML file.
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Settings as KEY=VALUE; they override the file (the verb `settings` lists them).
    #[arg(value_name = "KEY=VALUE")]
    overrides: Vec<String>,
    /// Print the result as one JSON document on stdout.
    #[arg(long)]
    pub json: bool,
}

impl SettingsArgs {
    /// Reads the settings of a verb.
    ///
    /// # Errors
    /// As [`settings::load`].
    pub fn load<T>(&self) -> Result<T>
    where
        T: Serialize + DeserializeOwned + Default + Validate<Context = ()>,
    {
        settings::load(self.config.as_deref(), &self.overrides)
    }
}

/// Prints a program's completions for a shell.
///
/// # Errors
/// When stdout cannot be written.
pub fn print_completions(shell: clap_complete::Shell, mut program: clap::Command) -> Result<()> {
    use clap_complete::Generator;
    let name = program.get_name().to_owned();
    program.set_bin_name(name);
    program.build();
    let mut script = Vec::new();
    shell.try_generate(&program, &mut script).map_err(Error::write("stdout"))?;
    print(&String::from_utf8_lossy(&script))
}
