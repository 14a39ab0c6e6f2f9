//! What a run needs, what is there, and whether the one fits the other.

use std::path::Path;

use cllm_core::capacity::{HostMemory, free_disk_bytes};
use cllm_core::model::ModelConfig;
use cllm_core::{Error, Result, tokenizer};
use serde::Serialize;

use crate::byte_size::parse_bytes;
use crate::data::dataset::Example;
use crate::data::schedule::Schedule;
use crate::memory::{MemoryEstimate, Workload};
use crate::plan::device::PlannedDevice;
use crate::plan::disk::DiskEstimate;
use crate::plan::host::HostEstimate;
use crate::plan::time::StepWork;
use crate::run_folder::StoredBytes;
use crate::settings::Settings;
use crate::validation::ProbeSize;

/// A need that is this close to what is there may fail: estimates have an error, and allocators keep
/// some memory in reserve.
const TIGHT: f64 = 0.95;

/// What the needs of a run depend on besides its settings.
pub struct RunInputs<'o> {
    pub device: PlannedDevice,
    pub config: &'o ModelConfig,
    pub examples: &'o [Example],
    /// The prompts that validation answers.
    pub probe: Option<ProbeSize>,
    /// Of the files that are saved with every model.
    pub tokenizer_bytes: u64,
    /// What the folder of the run has already.
    pub stored: StoredBytes,
}

/// What a run with some settings needs.
pub struct Needs {
    pub schedule: Schedule,
    /// Those of the first epoch, as indices of examples.
    pub batches: Vec<Vec<usize>>,
    pub memory: MemoryEstimate,
    pub host: HostEstimate,
    pub disk: DiskEstimate,
}

/// What is available, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Available {
    /// For the tensors of one process; `None` on the CPU.
    pub device: Option<u64>,
    pub host: Option<HostMemory>,
    pub disk: u64,
    /// Whether the run would be on this machine, whose host memory and disk these are.
    pub is_here: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Fits,
    /// It fits by less than the error of the estimate.
    Tight,
    DoesNotFit,
    /// How much is available is not known.
    Unknown,
}

/// A need beside what is there, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Comparison {
    pub needed: u64,
    pub available: Option<u64>,
    pub verdict: Verdict,
}

/// All comparisons of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Comparisons {
    /// Of each process; `None` on the CPU.
    pub device_memory: Option<Comparison>,
    pub host_memory: Comparison,
    pub disk: Comparison,
    /// Whether the last two are of the machine that the run would be on.
    #[serde(skip)]
    pub are_here: bool,
}

impl<'o> RunInputs<'o> {
    /// # Errors
    /// An output that is no folder, folders that cannot be read.
    pub fn new(
        settings: &Settings,
        device: PlannedDevice,
        config: &'o ModelConfig,
        examples: &'o [Example],
        probe: Option<ProbeSize>,
        tokenizer_folder: &Path,
    ) -> Result<Self> {
        if settings.output.is_file() {
            return Err(Error::file(&settings.output, "is a file: choose another `output`, the folder of a run"));
        }
        let stored = StoredBytes::of_run(&settings.output)?;
        let tokenizer_bytes = tokenizer::num_bytes(tokenizer_folder)?;
        Ok(RunInputs { device, config, examples, probe, tokenizer_bytes, stored })
    }

    /// Those of a new run, without a probe, on devices of one host: on the CPU in float32, else on GPUs
    /// that nothing else is known of.
    #[cfg(test)]
    pub fn of_unknown_device(
        kind: tch::Kind,
        world_size: usize,
        config: &'o ModelConfig,
        examples: &'o [Example],
    ) -> Self {
        let name = if kind == tch::Kind::Float { "cpu" } else { "GPU" };
        let device = PlannedDevice {
            name: name.to_owned(),
            kind,
            present: None,
            gpu: None,
            available_bytes: None,
            world_size,
            local_world_size: world_size,
        };
        RunInputs { device, config, examples, probe: None, tokenizer_bytes: 0, stored: StoredBytes::default() }
    }

    /// What a run with these settings needs.
    ///
    /// # Errors
    /// Settings that leave no example.
    pub fn needs(&self, settings: &Settings) -> Result<Needs> {
        let schedule = Schedule::new(self.examples, settings)?;
        let batches = schedule.batches(0);
        let memory = MemoryEstimate::new(&Workload {
            config: self.config,
            kind: self.device.kind,
            is_eager: self.device.is_cpu() || self.device.slow_path_reason(self.config)?.is_some(),
            settings,
            examples: self.examples,
            batches: &batches,
            probe: self.probe.map(|probe| probe.of_at_most(settings.validation.num_examples)),
            world_size: self.device.world_size,
        });
        let disk = DiskEstimate::new(
            settings,
            self.config,
            self.device.kind,
            schedule.num_steps(),
            self.tokenizer_bytes,
            &self.stored,
        );
        let has_checkpoints = (1..schedule.num_steps()).any(|step| settings.saves_after(step));
        let host = HostEstimate::new(self.examples, &memory, &disk, &self.device, has_checkpoints);
        Ok(Needs { host, schedule, batches, memory, disk })
    }

    /// The mean work of a step on each process.
    pub fn step_work(&self, settings: &Settings, needs: &Needs) -> StepWork {
        StepWork::new(settings, self.config, self.examples, &needs.batches, self.device.world_size)
    }
}

impl Available {
    /// What this machine has, and the device that a plan is for.
    ///
    /// # Errors
    /// A file system that does not say.
    pub fn detect(settings: &Settings, device: &PlannedDevice) -> Result<Self> {
        let host = match settings.memory.as_deref().and_then(parse_bytes).filter(|_| device.is_cpu()) {
            Some(bytes) => Some(HostMemory { total: bytes, available: bytes }),
            None => HostMemory::detect(),
        };
        let disk = free_disk_bytes(&settings.output)?;
        Ok(Available { device: device.available_bytes, host, disk, is_here: device.present.is_some() })
    }
}

impl Comparison {
    fn new(needed: u64, available: Option<u64>, tight: f64) -> Self {
        let verdict = match available {
            None => Verdict::Unknown,
            Some(available) if needed > available => Verdict::DoesNotFit,
            Some(available) if needed as f64 > tight * available as f64 => Verdict::Tight,
            Some(_) => Verdict::Fits,
        };
        Comparison { needed, available, verdict }
    }

    pub fn fits(&self) -> bool {
        self.verdict != Verdict::DoesNotFit
    }
}

impl Comparisons {
    pub fn new(needs: &Needs, available: &Available) -> Self {
        Comparisons {
            device_memory: available.device.map(|available| Comparison::new(needs.memory.peak, Some(available), TIGHT)),
            host_memory: Comparison::new(needs.host.peak, available.host.map(|host| host.available), TIGHT),
            // The sizes of files are exact.
            disk: Comparison::new(needs.disk.needed, Some(available.disk), 1.0),
            are_here: available.is_here,
        }
    }

    /// What does not fit. Host memory and disk of this machine matter only to a run on it.
    pub fn misfits(&self) -> impl Iterator<Item = (&'static str, Comparison)> {
        let device = self.device_memory.map(|device| ("device memory", device));
        let host = [("host memory", self.host_memory), ("disk", self.disk)].into_iter().filter(|_| self.are_here);
        device.into_iter().chain(host).filter(|(_, comparison)| !comparison.fits())
    }

    pub fn fit(&self) -> bool {
        self.misfits().next().is_none()
    }
}
