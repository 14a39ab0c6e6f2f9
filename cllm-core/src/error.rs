//! The one error type: each message names the file, row or key, what was expected and found, and what to do.

use std::path::{Path, PathBuf};

/// Result with [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong, grouped by who can mend it; the group decides the exit code of a program.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line or the configuration is wrong.
    #[error("{0}")]
    Usage(String),
    /// An input file is not what it should be.
    #[error("{}: {message}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What was expected, what was found, what to do.
        message: String,
    },
    /// The operating system refused to open or read something.
    #[error("{}: {source}{}", path.display(), read_advice(source))]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The operating system refused to make or write something.
    #[error("{}: cannot be written: {source}{}", path.display(), write_advice(source))]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The machine lacks something: a device, memory, a library.
    #[error("{0}")]
    Environment(String),
    /// An operation of libtorch failed.
    #[error("{}", torch_message(.0))]
    Torch(#[from] tch::TchError),
    /// The work ran, but what came of it is no good.
    #[error("{0}")]
    Negative(String),
    /// A signal asked to stop; everything worth keeping was saved.
    #[error("interrupted ({}); run the same command again", signal_name(*.0))]
    Interrupted(i32),
}

impl Error {
    /// A wrong command line or configuration.
    pub fn usage(message: impl Into<String>) -> Self {
        Error::Usage(message.into())
    }

    /// A bad input file.
    pub fn file(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::File { path: path.as_ref().to_owned(), message: message.into() }
    }

    /// Something that the machine lacks.
    pub fn environment(message: impl Into<String>) -> Self {
        Error::Environment(message.into())
    }

    /// Work that ran without a good result.
    pub fn negative(message: impl Into<String>) -> Self {
        Error::Negative(message.into())
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

    /// Exit code of a program that ends with this error: 1 a negative result, 2 usage, configuration or bad input,
    /// 3 environment, 128 + signal when interrupted.
    pub fn exit_code(&self) -> u8 {
        use std::io::ErrorKind::{InvalidData, InvalidInput, IsADirectory, NotADirectory, NotFound};
        match self {
            Error::Negative(_) => 1,
            Error::Usage(_) | Error::File { .. } => 2,
            Error::Io { source, .. } => match source.kind() {
                NotFound | InvalidData | InvalidInput | IsADirectory | NotADirectory => 2,
                _ => 3,
            },
            Error::Write { source, .. } if source.kind() == IsADirectory => 2,
            Error::Write { .. } | Error::Environment(_) | Error::Torch(_) => 3,
            Error::Interrupted(signal) => 128 + u8::try_from(*signal).unwrap_or(2),
        }
    }
}

fn read_advice(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => ": check the path",
        std::io::ErrorKind::PermissionDenied => ": change its permissions",
        std::io::ErrorKind::IsADirectory => ": name a file in it",
        _ => "",
    }
}

fn write_advice(source: &std::io::Error) -> &'static str {
    use std::io::ErrorKind::{FileTooLarge, IsADirectory, QuotaExceeded, StorageFull};
    match source.kind() {
        StorageFull | QuotaExceeded => ": make room, then run the same command again; what was finished is kept",
        FileTooLarge => {
            ": raise the limit of file sizes (`ulimit -f`), then run the same command again; what was finished is kept"
        }
        IsADirectory => ": name a file in it",
        _ => ": choose another place, or change its permissions",
    }
}

/// The first line of libtorch's message, without its C++ backtrace, and what to do when memory ran out.
fn torch_message(error: &tch::TchError) -> String {
    let text = error.to_string();
    let first = text.lines().next().unwrap_or_default().to_owned();
    if text.contains("out of memory") {
        format!(
            "{first}: give a batch fewer tokens or rows, or lower the length limits; training also takes less with a larger \
             `recompute`, `optimizer.state: bfloat16` or `lora` (`cllm-train plan` tells how much)"
        )
    } else {
        format!("libtorch: {first}")
    }
}

fn signal_name(signal: i32) -> &'static str {
    match signal {
        2 => "SIGINT",
        15 => "SIGTERM",
        _ => "signal",
    }
}
