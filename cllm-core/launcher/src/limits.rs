//! Limits of this process's resources.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::protocol::Problem;

/// Sets the soft and the hard limit.
pub(super) fn set_limit(resource: Resource, max: u64) -> Result<(), Problem> {
    set_limits(resource, max, max)
}

/// A hard limit that is lower already stays: it may not be raised.
pub(super) fn set_limits(resource: Resource, soft: u64, hard: u64) -> Result<(), Problem> {
    getrlimit(resource)
        .and_then(|(_, current)| setrlimit(resource, soft.min(current), hard.min(current)))
        .map_err(|error| format!("the launcher cannot set {resource:?} to {soft}: {error}"))
}
