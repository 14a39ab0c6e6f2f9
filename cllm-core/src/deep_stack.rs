//! Work on files that anyone may have made, whose nesting decides how deep functions call each other.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use crate::{Error, Result, interrupt};

/// Enough for what the limits on templates and tokenizers let through. The system provides memory
/// only for the part that is used.
const STACK_BYTES: usize = 512 << 20;
/// How often signals are checked.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Runs `work` in a thread with a deep stack. A signal that asks this process to stop abandons it.
///
/// # Errors
/// [`Error::Interrupted`], or when there can be no more threads.
///
/// # Panics
/// When `work` does.
pub(crate) fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new()
        .stack_size(STACK_BYTES)
        .spawn(move || {
            // If nobody receives it, the work was abandoned.
            let _ = sender.send(work());
        })
        .map_err(|error| {
            let num_mib = STACK_BYTES >> 20;
            Error::environment(format!(
                "reading a chat template or tokenizer needs a thread with {num_mib} MiB of address space for its stack, \
                 which the system refuses ({error}): raise the limits of address space (`ulimit -v`) and threads \
                 (`ulimit -u`)"
            ))
        })?;
    loop {
        interrupt::check()?;
        match receiver.recv_timeout(POLL_INTERVAL) {
            Ok(result) => return Ok(result),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => match thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => return Err(Error::internal("a thread ended without its result")),
            },
        }
    }
}
