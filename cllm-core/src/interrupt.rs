//! Signals: the first SIGINT or SIGTERM asks to stop after the work in hand is saved, the second stops at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

pub use signal_hook::consts::SIGTERM;
use signal_hook::consts::{SIGINT, SIGXFSZ};

use crate::{Error, Result};

static REQUESTED: std::sync::LazyLock<Arc<AtomicUsize>> = std::sync::LazyLock::new(Default::default);
/// Whether a SIGINT came already: the next ends the process.
static SECOND: std::sync::LazyLock<Arc<AtomicBool>> = std::sync::LazyLock::new(Default::default);

/// Installs the handlers; call once, first thing in `main`. A file that grows past the limit of the process is an error
/// of the write then, and no longer kills the process without a word.
///
/// # Errors
/// When the system refuses a handler.
pub fn install() -> Result<()> {
    let refused = |signal| move |error| Error::environment(format!("cannot handle signal {signal}: {error}"));
    for signal in [SIGINT, SIGTERM] {
        let second = if signal == SIGINT { Arc::clone(&SECOND) } else { Arc::default() };
        let code = 128 + signal;
        signal_hook::flag::register_conditional_shutdown(signal, code, Arc::clone(&second))
            .and_then(|_| signal_hook::flag::register(signal, second))
            .and_then(|_| signal_hook::flag::register_usize(signal, Arc::clone(&REQUESTED), signal as usize))
            .map_err(refused(signal))?;
    }
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map(drop).map_err(refused(SIGXFSZ))
}

/// The signal that asked to stop, if one did.
pub fn requested() -> Option<i32> {
    match REQUESTED.load(Ordering::Relaxed) {
        0 => None,
        signal => i32::try_from(signal).ok(),
    }
}

/// Goes on after a SIGINT that ended only what was in hand: whether there was one.
pub fn clear_sigint() -> bool {
    let forgiven = REQUESTED.compare_exchange(SIGINT as usize, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok();
    if forgiven {
        SECOND.store(false, Ordering::Relaxed);
    }
    forgiven
}

/// Ends the work with [`Error::Interrupted`] once a signal asked to stop.
///
/// # Errors
/// [`Error::Interrupted`].
pub fn check() -> Result<()> {
    requested().map_or(Ok(()), |signal| Err(Error::Interrupted(signal)))
}
