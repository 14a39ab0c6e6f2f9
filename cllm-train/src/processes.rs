//! The processes of a run, and the device of this one.

use std::rc::Rc;

use cllm_core::distributed::{self, ProcessEnv, ProcessGroup};
use cllm_core::program::catch_panics;
use cllm_core::{Error, Result, device, progress};
use tch::Device;

use crate::plan::refuse_hypothetical;
use crate::run_fingerprint::RunFingerprint;
use crate::settings::Settings;

/// Runs a verb that trains, in each process that a launcher started. If it fails in one of them, all
/// end with the message of that one.
///
/// # Errors
/// Those of `body`; [`Error::Usage`] if the environment describes no process.
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
/// [`Error::Usage`] if the environment does not fit the settings, the other processes have other
/// settings, or they do not answer.
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
    let mut fingerprint = RunFingerprint::default();
    // Each process may name a GPU of its own.
    fingerprint.add_settings(settings, &["device"])?;
    refuse_differences(&fingerprint, (device, &group))?;
    Ok((device, Rc::new(group)))
}

/// Refuses processes that do not all have the fingerprint of the main one: they would train a wrong
/// model, or wait for each other. Every process must call it.
///
/// # Errors
/// [`Error::Usage`] with the first difference, in the process that differs.
pub fn refuse_differences(own: &RunFingerprint, (device, group): (Device, &ProcessGroup)) -> Result<()> {
    let main = group.broadcast(own.clone(), device)?;
    if let Some(difference) = main.difference_of_process(group.rank(), own) {
        return Err(Error::usage(difference));
    }
    // The main process writes nothing before all have compared.
    group.barrier(device)
}
