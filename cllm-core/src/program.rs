//! The frame that the three programs share: what their command lines have in common, signals, one error line, exit codes.
//! Nothing else in this crate knows a command line.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use crate::{Error, Result, interrupt, progress};

mod command_line;

pub use command_line::{Configured, print_completions};

/// Where the last panic came from.
static PANIC_PLACE: Mutex<String> = Mutex::new(String::new());

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
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        *PANIC_PLACE.lock().unwrap_or_else(PoisonError::into_inner) = place;
    }));
    let result = interrupt::install().and_then(|()| guarded(body));
    match result {
        Ok(Outcome::Done) => ExitCode::SUCCESS,
        Ok(Outcome::Negative) => ExitCode::from(1),
        Err(error) => {
            progress::show(&format!("error: {error}\n"));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Runs what may panic inside libtorch, such as for lack of memory, and gives that as the error it is.
///
/// # Errors
/// The body's own, or its panic.
pub fn guarded<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| Err(panicked(&*panic)))
}

/// What a panic tells: an error of libtorch, or else a fault of this program.
fn panicked(panic: &(dyn std::any::Any + Send)) -> Error {
    let text = panic.downcast_ref::<String>().cloned();
    let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default();
    match text.split_once("`Err` value: Torch(\"") {
        // What tch unwraps is the message as a debug string: its lines are escaped.
        Some((_, message)) => {
            let message = message.trim_end_matches("\")").replace("\\n", "\n").replace("\\\"", "\"");
            Error::Torch(tch::TchError::Torch(message))
        }
        None => {
            let place = PANIC_PLACE.lock().unwrap_or_else(PoisonError::into_inner);
            Error::environment(format!("a fault of this program, please report it: {text} ({place})"))
        }
    }
}

/// Prints data on stdout; a reader that has gone away is no error.
///
/// # Errors
/// When stdout cannot be written for another reason.
pub fn print(text: &str) -> Result<()> {
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
    print(&serde_json::to_string_pretty(value).map_err(|error| Error::usage(format!("as JSON: {error}")))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_of_libtorch_is_told_from_a_fault_of_the_program() {
        let caught = |body: fn()| panicked(&*catch_unwind(body).unwrap_err());
        let shapes = caught(|| {
            let _ = tch::Tensor::from_slice(&[1f32, 2.0]).matmul(&tch::Tensor::from_slice(&[1f32]));
        });
        let message = shapes.to_string();
        assert!(message.starts_with("libtorch: ") && !message.contains("Exception raised"), "{message}");
        let fault = caught(|| assert_eq!(1, 2, "no"));
        assert!(fault.exit_code() == 3 && fault.to_string().contains("a fault of this program"), "{fault}");
    }
}
