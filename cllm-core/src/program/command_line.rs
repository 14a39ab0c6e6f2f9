//! The words that the command lines of the three programs have in common.

use std::path::PathBuf;

use garde::Validate;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::print;
use crate::{Error, Result, settings};

/// A YAML file and `section.key=value` over it.
#[derive(Debug, clap::Args)]
pub struct Configured {
    /// Settings in YAML.
    #[arg(long, short)]
    config: Option<PathBuf>,
    /// Settings that win over the file: `section.key=value`; `settings` lists them.
    overrides: Vec<String>,
    /// Print what was found as one JSON document on stdout.
    #[arg(long)]
    pub json: bool,
}

impl Configured {
    /// Reads the settings.
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

/// Prints the completions of a shell for a program.
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
