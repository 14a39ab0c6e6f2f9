//! The processes of a run, and the device of this one.

use std::rc::Rc;

use cllm_core::distributed::{self, ProcessEnv, ProcessGroup};
use cllm_core::program::catch_panics;
use cllm_core::{Result, device, progress};
use tch::Device;

use crate::plan::refuse_hypothetical;
use crate::settings::Settings;

/// Runs a verb that trains, in each process that a launcher started. If it fails in one of them, all
/// end with the message of that one.
///
/// # Errors
/// Those of `body`; [`cllm_core::Error::Usage`] if the environment describes no process.
pub fn run_together<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    match ProcessEnv::from_env(|name| std::env::var(name).ok())? {
        Some(env) => distributed::run_together(&env, || catch_panics(body)),
        None => body(),
    }
}

/// Joins the other processes that a launcher started, if any, within [`run_together`]. All but the
/// main process become quiet.
///
/// # Errors
/// [`cllm_core::Error::Usage`] if the environment does not fit the settings, or the other processes do not
/// answer.
pub fn join(settings: &Settings) -> Result<(Device, Rc<ProcessGroup>)> {
    refuse_hypothetical(settings)?;
    let env = ProcessEnv::from_env(|name| std::env::var(name).ok())?;
    let device = device::for_process(&settings.device, env.as_ref())?;
    let group = match &env {
        Some(env) => {
            settings.check_processes(env.world_size)?;
            ProcessGroup::join(env, device)?
        }
        None => ProcessGroup::single(),
    };
    if !group.is_main() {
        progress::set_quiet(true);
    }
    Ok((device, Rc::new(group)))
}
