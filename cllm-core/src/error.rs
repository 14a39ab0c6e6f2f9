//! The one error type of the toolkit. A message names the file, row or key, says what was expected
//! and what is there, and ends with what to do about it.

use std::any::Any;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Errors, grouped by who can fix them. The group decides the exit code of a program.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line or the configuration is wrong.
    #[error("{0}")]
    Usage(String),
    /// An input file or folder does not have the expected content.
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, message: String },
    /// The operating system refused to open or read a file.
    #[error("{}: {}", path.display(), read_failure(source))]
    Io { path: PathBuf, source: std::io::Error },
    /// The operating system refused to create or write a file.
    #[error("{}: cannot be written: {}: {}", path.display(), io_reason(source), write_advice(source))]
    Write { path: PathBuf, source: std::io::Error },
    /// The machine lacks something: a device, memory, a library.
    #[error("{0}")]
    Environment(String),
    /// An operation of libtorch failed.
    #[error("{}", torch_message(.0))]
    Torch(#[from] tch::TchError),
    /// The work ran, but its result is negative: rows failed, or a threshold was missed.
    #[error("{0}")]
    Negative(String),
    /// Another process of the run has failed, with this exit code, or cannot be reached.
    #[error("{message}")]
    Peer { exit_code: u8, message: String },
    /// A bug in the toolkit: something that no input should be able to cause.
    #[error(
        "internal error: {0}: this is a bug in the toolkit; please report it, with the command line, the version ({version}) \
         and this message",
        version = crate::VERSION
    )]
    Internal(String),
    /// A signal asked to stop; everything worth keeping was saved.
    #[error("interrupted ({}); run the same command again", signal_name(*.0))]
    Interrupted(i32),
}

impl Error {
    /// Creates an [`Error::Usage`].
    pub fn usage(message: impl Into<String>) -> Self {
        Error::Usage(message.into())
    }

    /// Creates an [`Error::File`].
    pub fn file(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::File { path: path.as_ref().to_owned(), message: message.into() }
    }

    /// Says which file an error is about that names none. Other errors stay as they are.
    pub fn in_file(self, path: impl AsRef<Path>) -> Self {
        match self {
            Error::Usage(message) => Error::file(path, message),
            other => other,
        }
    }

    /// Says which row of a file of prompts an error is about. Errors of the machine stay as they are.
    pub fn in_row(self, path: impl AsRef<Path>, id: &str) -> Self {
        match self {
            Error::Usage(_) | Error::File { .. } => Error::file(path, format!("row `{id}`: {self}")),
            other => other,
        }
    }

    /// Creates an [`Error::Environment`].
    pub fn environment(message: impl Into<String>) -> Self {
        Error::Environment(message.into())
    }

    /// Creates an [`Error::Negative`].
    pub fn negative(message: impl Into<String>) -> Self {
        Error::Negative(message.into())
    }

    /// Creates an [`Error::Internal`]. The message says what happened; the request to report it is
    /// added.
    pub fn internal(message: impl Into<String>) -> Self {
        Error::Internal(message.into())
    }

    /// For `map_err`: an operating-system error in reading `path`.
    pub fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Error::Io { path, source }
    }

    /// For `map_err`: an operating-system error in writing `path`.
    pub fn write(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |source| Error::Write { path, source }
    }

    /// Adds to the error of a full disk what is kept of the work. Others stay as they are.
    pub fn with_kept_work(self, kept: &str) -> Self {
        use ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        match &self {
            Error::Write { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded | FileTooLarge) => {
                Error::Environment(format!("{self}; {kept}"))
            }
            _ => self,
        }
    }

    /// For `map_err`: a value of our own types that cannot be serialized, which is a bug.
    pub fn serialization(error: impl std::fmt::Display) -> Self {
        Error::Internal(format!("a value cannot be serialized: {error}"))
    }

    /// Exit code of a program that ends with this error: 1 for a negative result, 2 for usage,
    /// configuration or bad input, 3 for the environment, 70 (`EX_SOFTWARE` of sysexits.h) for a
    /// bug in the toolkit, 128 + signal when interrupted; that of another process that failed.
    pub fn exit_code(&self) -> u8 {
        use ErrorKind::{InvalidData, InvalidInput, IsADirectory, NotADirectory, NotFound};
        match self {
            Error::Negative(_) => 1,
            Error::Usage(_) | Error::File { .. } => 2,
            Error::Io { source, .. } => match source.kind() {
                NotFound | InvalidData | InvalidInput | IsADirectory | NotADirectory => 2,
                _ => 3,
            },
            Error::Write { source, .. } if source.kind() == IsADirectory => 2,
            Error::Write { .. } | Error::Environment(_) | Error::Torch(_) => 3,
            Error::Peer { exit_code, .. } => *exit_code,
            Error::Internal(_) => 70,
            Error::Interrupted(signal) => 128 + u8::try_from(*signal).unwrap_or(2),
        }
    }
}

/// What a panic said.
pub(crate) fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// Why a file cannot be read. Replaces the system's own message where that would not help.
fn read_failure(source: &std::io::Error) -> String {
    match source.kind() {
        ErrorKind::NotFound => "there is no such file or folder".to_owned(),
        ErrorKind::NotADirectory => "a part of this path is a file, not a folder".to_owned(),
        ErrorKind::IsADirectory => "is a folder: name a file in it".to_owned(),
        ErrorKind::PermissionDenied => format!("{}: change its permissions", io_reason(source)),
        _ => io_reason(source),
    }
}

/// The system's message without the number of the error.
pub fn io_reason(source: &std::io::Error) -> String {
    let text = source.to_string();
    text.split(" (os error ").next().unwrap_or_default().to_owned()
}

fn write_advice(source: &std::io::Error) -> &'static str {
    match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => "make room, then run the same command again",
        ErrorKind::FileTooLarge => "raise the limit of file sizes (`ulimit -f`), then run the same command again",
        ErrorKind::IsADirectory => "name a file in it",
        _ => "choose another path, or change its permissions",
    }
}

/// The first line of libtorch's message, without its C++ backtrace, and what to do when memory ran
/// out.
fn torch_message(error: &tch::TchError) -> String {
    let text = error.to_string();
    let first_line = text.lines().next().unwrap_or_default();
    // Of a GPU, and of the CPU.
    if text.contains("out of memory") || text.contains("can't allocate memory") {
        format!(
            "{first_line}: lower the batch size or the length limits; training also needs less memory with more \
             `checkpointed_layers`, with `optimizer.state_dtype=bfloat16` or with `lora` (`cllm-train plan` shows how much)"
        )
    } else {
        format!("libtorch: {first_line}")
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        1 => "SIGHUP",
        2 => "SIGINT",
        15 => "SIGTERM",
        _ => "signal",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_internal_error_asks_for_a_report_and_has_its_own_exit_code() {
        let error = Error::internal("the scheduler lost a sequence");
        assert_eq!(error.exit_code(), 70);
        let message = error.to_string();
        for part in ["the scheduler lost a sequence", "bug", "report", "command line", crate::VERSION] {
            assert!(message.contains(part), "{message}");
        }
    }

    #[test]
    fn an_interruption_does_not_promise_that_the_work_continues() {
        assert_eq!(Error::Interrupted(2).to_string(), "interrupted (SIGINT); run the same command again");
    }

    #[test]
    fn a_missing_file_is_named_in_plain_words() {
        let error = std::fs::read("/nowhere/data.json").map_err(Error::io("/nowhere/data.json")).unwrap_err();
        assert_eq!(error.to_string(), "/nowhere/data.json: there is no such file or folder");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn the_number_of_a_system_error_is_left_out() {
        let message = Error::write("run/model")(std::io::Error::from_raw_os_error(13)).to_string();
        assert!(message.starts_with("run/model: cannot be written: Permission denied: choose"), "{message}");
        assert_eq!(io_reason(&std::io::Error::from_raw_os_error(98)), "Address already in use");
    }

    #[test]
    fn a_full_disk_says_that_work_is_kept_only_where_some_is() {
        let error = |kind: ErrorKind| Error::write("run/model")(kind.into());
        for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded, ErrorKind::FileTooLarge] {
            let message = error(kind).to_string();
            assert!(message.ends_with("run the same command again"), "{message}");
            let kept = error(kind).with_kept_work("the last checkpoint is kept");
            assert_eq!(kept.to_string(), format!("{message}; the last checkpoint is kept"));
            assert_eq!(kept.exit_code(), error(kind).exit_code());
        }
        let denied = error(ErrorKind::PermissionDenied);
        let message = denied.to_string();
        assert_eq!(denied.with_kept_work("the last checkpoint is kept").to_string(), message);
    }
}
