//! Refuses a run, before it loads anything, that certainly cannot end.

use std::path::Path;

use cllm_core::capacity::HostMemory;
use cllm_core::cuda::libtorch;
use cllm_core::distributed::ProcessGroup;
use cllm_core::model::ModelConfig;
use cllm_core::{Error, Result};
use tch::Device;

use crate::data::dataset::Example;
use crate::plan::device::PlannedDevice;
use crate::plan::needs::{Comparisons, Outset, Room};
use crate::plan::proposal::Proposals;
use crate::plan::text;
use crate::settings::Settings;
use crate::validation::ProbeSize;

/// Estimates of memory may be too high by this share.
const ESTIMATE_ERROR: f64 = 0.05;

/// Refuses a run whose checkpoints do not fit on the disk, or whose tensors are certainly more than
/// its device has. Every process must call it; the main one looks.
///
/// # Errors
/// [`Error::Environment`] with the numbers and settings that fit.
pub fn refuse_what_cannot_fit(
    settings: &Settings,
    (device, group): (Device, &ProcessGroup),
    config: &ModelConfig,
    examples: &[Example],
    probe: Option<ProbeSize>,
    tokenizer_folder: &Path,
) -> Result<()> {
    let refusal = if group.is_main() {
        let planned = PlannedDevice { world_size: group.world_size(), ..PlannedDevice::present(device) };
        let outset = Outset::new(settings, planned, config, examples, probe, tokenizer_folder)?;
        let room = Room { device: None, ..Room::detect(settings, &outset.device)? };
        let capacity = libtorch::gpu_capacity(device).map(|(_, total)| total);
        refusal(&outset, settings, &certain(room, capacity))?
    } else {
        None
    };
    match group.broadcast(refusal, device)? {
        None => Ok(()),
        Some(message) => Err(Error::environment(message)),
    }
}

/// The most that there can be of memory, whatever else runs now.
fn certain(room: Room, gpu_capacity: Option<u64>) -> Room {
    let most = |bytes: u64| (bytes as f64 / (1.0 - ESTIMATE_ERROR)) as u64;
    let host = room.host.map(|host| HostMemory { total: most(host.total), available: most(host.total) });
    Room { device: gpu_capacity.map(most), host, ..room }
}

/// Why the run cannot fit, and settings that fit.
fn refusal(outset: &Outset<'_>, settings: &Settings, room: &Room) -> Result<Option<String>> {
    let comparisons = Comparisons::new(&outset.needs(settings)?, room);
    if comparisons.fit() {
        return Ok(None);
    }
    let proposals = Proposals::find(outset, settings, &comparisons, room)?;
    let parts = text::advices(&comparisons, &proposals);
    Ok(Some(format!("{}: {}", settings.output.display(), parts.join("\n"))))
}
