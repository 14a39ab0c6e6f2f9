//! How each program starts and ends: signals, one error line, exit codes.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use crate::{Error, Result, interrupt};

/// How a program that ran to its end went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done: exit code 0.
    Done,
    /// It ran, but the result is negative (rows failed, a threshold was missed): exit code 1.
    Negative,
}

/// Runs a program: installs the signal handlers, prints an error as one line on stderr, and gives the exit code. libtorch's
/// operations panic in tch's plain form; that too ends as an error line.
pub fn main(body: impl FnOnce() -> Result<Outcome>) -> ExitCode {
    std::panic::set_hook(Box::new(|_| {}));
    let result = interrupt::install().and_then(|()| {
        catch_unwind(AssertUnwindSafe(body))
            .unwrap_or_else(|panic| Err(Error::Torch(tch::TchError::Torch(text(&*panic)))))
    });
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Negative) => ExitCode::from(1),
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn text(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Prints data on stdout; a reader that has gone away is no error.
///
/// # Errors
/// When stdout cannot be written for another reason.
pub fn print(text: &str) -> Result<()> {
    match writeln!(std::io::stdout().lock(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Error::io("stdout")),
    }
}

/// Prints one JSON document on stdout.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    print(&serde_json::to_string_pretty(value).map_err(|error| Error::usage(format!("as JSON: {error}")))?)
}
