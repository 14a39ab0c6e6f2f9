//! Arguments that the command lines of the three programs have in common.

use std::path::PathBuf;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use garde::Validate;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::print;
use crate::printable::to_printable;
use crate::{Error, Result, progress, settings};

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

/// Reads the command line, or ends the program with a message.
pub fn parse<P: clap::Parser>() -> P {
    P::try_parse().unwrap_or_else(|error| match setting_as_option(&error) {
        Some(message) => {
            progress::log_error(message);
            std::process::exit(2)
        }
        // An argument may hold control characters.
        None if to_printable(&error.to_string()) != error.to_string() => {
            progress::write_stderr(&to_printable(&error.to_string()));
            std::process::exit(error.exit_code())
        }
        None => error.exit(),
    })
}

/// What to write instead of `--lr 1e-4` where a verb has settings.
fn setting_as_option(error: &clap::Error) -> Option<String> {
    let (Some(ContextValue::String(option)), Some(ContextValue::StyledStr(usage))) =
        (error.get(ContextKind::InvalidArg), error.get(ContextKind::Usage))
    else {
        return None;
    };
    let takes_settings = error.kind() == ErrorKind::UnknownArgument && usage.to_string().contains("KEY=VALUE");
    let key = option.strip_prefix("--").filter(|_| takes_settings)?.split('=').next()?.replace('-', "_");
    // A key without its section would not be one.
    let example = if key.contains('.') { format!("{key}=…") } else { "seed=1".to_owned() };
    Some(format!(
        "there is no option {option}: settings are written KEY=VALUE, such as {example}; the verb `settings` lists them"
    ))
}

/// Prints the reference of a program's settings, or the part of one verb. `reference` has a section
/// `### PROGRAM VERB, VERB` for each.
///
/// # Errors
/// [`Error::Usage`] for a verb without settings; when stdout cannot be written.
pub fn print_settings(reference: &str, verb: Option<&str>) -> Result<()> {
    let Some(verb) = verb else { return print(reference) };
    let sections = || reference.split("### ").skip(1);
    let verbs = |section: &str| -> Vec<String> {
        let heading = section.lines().next().unwrap_or_default();
        heading.split_whitespace().skip(1).map(|word| word.trim_end_matches(',').to_owned()).collect()
    };
    match sections().find(|section| verbs(section).iter().any(|other| other == verb)) {
        Some(section) => print(&format!("### {}\n", section.trim_end())),
        None => {
            let all: Vec<String> = sections().flat_map(verbs).collect();
            let hint = settings::did_you_mean(verb, &all);
            Err(Error::usage(format!("`{verb}` has no settings{hint}; the verbs that have are {}", all.join(", "))))
        }
    }
}
