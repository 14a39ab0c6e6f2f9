//! What a model costs the host: memory, and the time and disk of its files.

use std::path::Path;
use std::time::Instant;

use cllm_core::model::Transformer;
use cllm_core::process_memory::{PeakGrowth, peak_bytes};
use cllm_core::{Error, Result, checkpoint, device};
use serde::{Deserialize, Serialize};
use tch::Device;

use crate::byte_size::{folder_bytes, format_bytes};
use crate::plan::final_model_bytes;
use crate::settings::Settings;

/// Host memory and, if the settings ask for `files`, what writing and reading the model takes.
/// `None` is what was not measured, or what the system does not say.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct HostUsage {
    /// The most that the process had in memory at a time.
    pub(super) host_peak_bytes: Option<u64>,
    /// Of the files of a final model, but those of its tokenizer.
    pub(super) disk_bytes: Option<u64>,
    /// The same, as `plan` estimates it.
    pub(super) planned_disk_bytes: Option<u64>,
    /// Seconds of writing the model.
    pub(super) save_seconds: Option<f64>,
    /// By how much the process grew meanwhile.
    pub(super) save_host_bytes: Option<u64>,
    /// Seconds of reading it to the device.
    pub(super) load_seconds: Option<f64>,
    pub(super) load_host_bytes: Option<u64>,
}

impl HostUsage {
    /// Host memory alone.
    pub(super) fn without_files() -> Self {
        HostUsage {
            host_peak_bytes: peak_bytes(),
            disk_bytes: None,
            planned_disk_bytes: None,
            save_seconds: None,
            save_host_bytes: None,
            load_seconds: None,
            load_host_bytes: None,
        }
    }

    /// Writes the final model as a run with these settings does, into a folder beside `output` that is
    /// removed at the end, and reads it again. The device holds one of the two at a time.
    ///
    /// # Errors
    /// File-system errors, such as a full disk.
    pub(super) fn with_files(model: Transformer, training: &Settings, output: &Path) -> Result<Self> {
        let (device, kind) = (model.device(), model.kind());
        let planned_disk_bytes = final_model_bytes(training, model.config(), kind, 0);
        let parent = output.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
        let work = tempfile::Builder::new().prefix(".bench-model-").tempdir_in(parent).map_err(Error::write(parent))?;
        let before = HostUsage::without_files();
        let save = Timed::run(device, || {
            checkpoint::save(&model, work.path(), kind)?;
            if training.lora.is_none() {
                return Ok(());
            }
            let adapter = work.path().join("adapter");
            std::fs::create_dir(&adapter).map_err(Error::write(&adapter))?;
            checkpoint::save_adapter(&model, &adapter, training.model.as_deref().unwrap_or_default())
        })?;
        drop(model);
        let disk_bytes = folder_bytes(work.path())?;
        let load = Timed::run(device, || checkpoint::load(work.path(), device, kind).map(drop))?;
        Ok(HostUsage {
            host_peak_bytes: before.host_peak_bytes.max(save.peak_bytes).max(load.peak_bytes),
            disk_bytes: Some(disk_bytes),
            planned_disk_bytes: Some(planned_disk_bytes),
            save_seconds: Some(save.seconds),
            save_host_bytes: save.growth_bytes,
            load_seconds: Some(load.seconds),
            load_host_bytes: load.growth_bytes,
        })
    }

    /// In words, behind the memory of the device.
    pub(super) fn text(&self) -> String {
        let size = |bytes: Option<u64>| bytes.map_or_else(|| "unknown".to_owned(), format_bytes);
        let text = format!("; host memory {}", size(self.host_peak_bytes));
        match (self.save_seconds, self.load_seconds) {
            (Some(save), Some(load)) => format!(
                "{text}\nmodel of {} written in {save:.1} s (host memory +{}), read in {load:.1} s (+{})",
                size(self.disk_bytes),
                size(self.save_host_bytes),
                size(self.load_host_bytes)
            ),
            _ => text,
        }
    }
}

/// Some work that was done.
struct Timed {
    seconds: f64,
    /// By how much the process grew meanwhile, and the most that it had.
    growth_bytes: Option<u64>,
    peak_bytes: Option<u64>,
}

impl Timed {
    fn run(device: Device, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let (growth, started) = (PeakGrowth::start(), Instant::now());
        work()?;
        device::synchronize(device);
        let growth_bytes = growth.and_then(|growth| growth.bytes());
        Ok(Timed { seconds: started.elapsed().as_secs_f64(), growth_bytes, peak_bytes: peak_bytes() })
    }
}
