//! Signals: the first SIGINT, SIGTERM or SIGHUP (of a terminal that closes) asks the program to save
//! the work in hand and stop; the second ends it at once.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};

pub use signal_hook::consts::SIGTERM;
use signal_hook::consts::{SIGHUP, SIGINT, SIGXFSZ};

use crate::{Error, Result};

/// The signal that asked to stop, 0 for none.
static REQUESTED: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Default::default);
/// Whether a SIGINT has already arrived, so that the next one ends the process.
static SIGINT_RECEIVED: LazyLock<Arc<AtomicBool>> = LazyLock::new(Default::default);

/// Installs the handlers; call once, first thing in `main`. SIGXFSZ is caught too, so that a write
/// past the process's file-size limit returns an error instead of silently killing the process.
///
/// # Errors
/// When the system refuses a handler.
pub fn install() -> Result<()> {
    let refused = |signal| move |error| Error::environment(format!("cannot handle signal {signal}: {error}"));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // `nohup` starts programs that are to outlive their terminal.
        if signal == SIGHUP && is_ignored(SIGHUP) {
            continue;
        }
        let received = if signal == SIGINT { Arc::clone(&SIGINT_RECEIVED) } else { Arc::default() };
        let exit_code = 128 + signal;
        signal_hook::flag::register_conditional_shutdown(signal, exit_code, Arc::clone(&received))
            .and_then(|_| signal_hook::flag::register(signal, received))
            .and_then(|_| signal_hook::flag::register_usize(signal, Arc::clone(&REQUESTED), signal as usize))
            .map_err(refused(signal))?;
    }
    signal_hook::flag::register(SIGXFSZ, Arc::default()).map(drop).map_err(refused(SIGXFSZ))
}

/// Whether whoever started this program made it ignore a signal.
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// The signal that asked to stop, if one did.
pub fn requested() -> Option<i32> {
    match REQUESTED.load(Ordering::Relaxed) {
        0 => None,
        signal => i32::try_from(signal).ok(),
    }
}

/// Forgets a SIGINT, for programs in which Ctrl-C ends only part of the work. Returns whether there
/// was one.
pub fn clear_sigint() -> bool {
    let cleared = REQUESTED.compare_exchange(SIGINT as usize, 0, Ordering::Relaxed, Ordering::Relaxed).is_ok();
    if cleared {
        SIGINT_RECEIVED.store(false, Ordering::Relaxed);
    }
    cleared
}

/// Returns an error once a signal has asked to stop. Call it wherever the work can be abandoned.
///
/// # Errors
/// [`Error::Interrupted`].
pub fn check() -> Result<()> {
    requested().map_or(Ok(()), |signal| Err(Error::Interrupted(signal)))
}
