//! What the three programs have in common: command-line arguments, signal handlers, the error line
//! and the exit code. No other module of this crate knows about command lines.

use std::any::Any;
use std::io::{IsTerminal, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use crate::error::panic_message;
use crate::printable::to_printable;
use crate::{Error, Result, interrupt, progress};

mod command_line;
mod completions;

pub use command_line::{SettingsArgs, parse, print_settings};
pub use completions::print_completions;

/// Source location of the last panic. Only the panic hook sees it; the payload does not contain it.
static PANIC_LOCATION: Mutex<String> = Mutex::new(String::new());

/// The outcome of a program that ran to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Exit code 0.
    Done,
    /// The work ran, but rows failed or a threshold was missed: exit code 1.
    Negative,
}

/// Runs a program: installs the signal handlers, prints an error as one line on stderr, and returns
/// the exit code.
pub fn main(body: impl FnOnce() -> Result<Outcome>) -> ExitCode {
    std::panic::set_hook(Box::new(|panic| {
        let location = panic.location().map(ToString::to_string).unwrap_or_default();
        *PANIC_LOCATION.lock().unwrap_or_else(PoisonError::into_inner) = location;
    }));
    let result = interrupt::install().and_then(|()| catch_panics(body));
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Negative) => ExitCode::from(1),
        Err(error) => {
            progress::log_error(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

/// Runs `body` and returns a panic in it as an error: tch's plain operations panic where libtorch
/// fails (for lack of memory, say), and any other panic is a bug.
///
/// # Errors
/// The error of `body`, [`Error::Torch`], or [`Error::Internal`].
pub fn catch_panics<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| Err(error_of_panic(&*payload)))
}

/// tch unwraps a `Result<_, TchError>` in its plain operations, so that only the formatted text of
/// the error reaches the panic's payload: its `Debug` form, with escaped line ends. There is no
/// other way to tell it from a bug of ours.
fn error_of_panic(payload: &(dyn Any + Send)) -> Error {
    let text = panic_message(payload);
    match text.split_once("`Err` value: Torch(\"") {
        Some((_, message)) => {
            let message = message.trim_end_matches("\")").replace("\\n", "\n").replace("\\\"", "\"");
            Error::Torch(tch::TchError::Torch(message))
        }
        None => {
            let location = PANIC_LOCATION.lock().unwrap_or_else(PoisonError::into_inner);
            Error::internal(format!("{text} ({location})"))
        }
    }
}

/// Prints data on stdout; a terminal gets no control characters. A reader that has closed the pipe
/// (`| head`) is not an error.
///
/// # Errors
/// When stdout cannot be written for another reason.
pub fn print(text: &str) -> Result<()> {
    if std::io::stdout().is_terminal() { print_as_is(&to_printable(text)) } else { print_as_is(text) }
}

/// Prints a text that has escape sequences of ours.
///
/// # Errors
/// As [`print()`].
pub fn print_as_is(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let end = if text.ends_with('\n') { "" } else { "\n" };
    match write!(out, "{text}{end}").and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(Error::write("stdout")),
    }
}

/// Prints one JSON document on stdout.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    print(&serde_json::to_string_pretty(value).map_err(Error::serialization)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If this fails after an update of tch, its panic message has changed: adapt `error_of_panic`
    /// to the new form.
    #[test]
    fn a_panic_of_libtorch_is_told_apart_from_a_bug_of_ours() {
        let caught = |body: fn()| error_of_panic(&*catch_unwind(body).unwrap_err());
        let torch = caught(|| {
            let _ = tch::Tensor::from_slice(&[1f32, 2.0]).matmul(&tch::Tensor::from_slice(&[1f32]));
        });
        let message = torch.to_string();
        assert!(message.starts_with("libtorch: ") && !message.contains("Exception raised"), "{message}");
        assert_eq!(torch.exit_code(), 3);
        let bug = caught(|| assert_eq!(1, 2, "no"));
        assert!(bug.exit_code() == 70 && bug.to_string().contains("internal error"), "{bug}");
    }
}
