//! The device that a plan is for: one of this machine, or one that a user names.

use cllm_core::cuda::libtorch;
use cllm_core::distributed::ProcessEnv;
use cllm_core::gpus::GpuModel;
use cllm_core::model::ModelConfig;
use cllm_core::{Error, Result, device, environment, train};
use tch::{Device, Kind};

use crate::byte_size::parse_bytes;
use crate::settings::Settings;

/// What CUDA keeps for itself in every process: its context, the kernels of libtorch and those that
/// are compiled.
const CUDA_CONTEXT_BYTES: u64 = 600_000_000;

/// The compute capability of Hopper, for GPUs that nothing but the memory is known of.
const PLANNED_CAPABILITY: (u32, u32) = (9, 0);

/// The devices of a run, one for each process.
pub struct PlannedDevice {
    /// `cpu`, `cuda:N`, `h100-80gb`, `GPU`.
    pub name: String,
    /// Type of weights and activations there.
    pub kind: Kind,
    /// The device itself, if this machine has it.
    pub present: Option<Device>,
    /// What is known about the GPU.
    pub gpu: Option<&'static GpuModel>,
    /// Bytes that tensors of one process can have there; `None` on the CPU, whose tensors are in the
    /// memory of the host, and where CUDA does not say.
    pub available_bytes: Option<u64>,
    pub world_size: usize,
    /// Number of processes on one host.
    pub local_world_size: usize,
}

impl PlannedDevice {
    /// The device that the settings and the environment name.
    ///
    /// # Errors
    /// [`Error::Usage`] for an unknown name, [`Error::Environment`] for a GPU that this machine lacks.
    pub fn new(settings: &Settings) -> Result<Self> {
        let env = ProcessEnv::from_env(|name| std::env::var(name).ok())?;
        let (count, name) = split_count(&settings.device);
        let of_env = env.as_ref().map_or((1, 1), |env| (env.world_size, env.local_world_size));
        let (world_size, local_world_size) = count.map_or(of_env, |count| (count, count));
        let is_local = ["auto", "cpu", "cuda"].contains(&name) || name.starts_with("cuda:");
        let gpu = if is_local { None } else { Some(GpuModel::named(name)?) };
        let memory = settings.memory.as_deref().and_then(parse_bytes);
        if name == "cpu" || (is_local && memory.is_none()) {
            let device = device::for_process(name, env.as_ref())?;
            return Ok(PlannedDevice { world_size, local_world_size, ..Self::present(device) });
        }
        let memory = memory.or(gpu.map(|gpu| gpu.memory_bytes));
        Ok(PlannedDevice {
            name: gpu.map_or("GPU", |gpu| gpu.name).to_owned(),
            kind: Kind::BFloat16,
            present: None,
            gpu,
            available_bytes: memory.map(|bytes| bytes.saturating_sub(CUDA_CONTEXT_BYTES)),
            world_size,
            local_world_size,
        })
    }

    /// A device of this machine, for a single process.
    pub fn present(device: Device) -> Self {
        PlannedDevice {
            name: match device {
                Device::Cuda(index) => format!("cuda:{index}"),
                _ => "cpu".to_owned(),
            },
            kind: device::default_kind(device),
            present: Some(device),
            gpu: environment::Hardware::detect(device).gpu_model(),
            available_bytes: libtorch::gpu_capacity(device).map(|(free, _)| free),
            world_size: 1,
            local_world_size: 1,
        }
    }

    /// Why libtorch's operations will train a model there, and not our own kernels. `None` on the CPU.
    ///
    /// # Errors
    /// [`Error::Torch`] if the device does not answer.
    pub fn slow_path_reason(&self, config: &ModelConfig) -> Result<Option<String>> {
        match self.present {
            Some(device) => train::slow_path_reason_on(config, self.kind, device),
            None => {
                let capability = self.gpu.map_or(PLANNED_CAPABILITY, |gpu| gpu.capability);
                Ok(train::slow_path_reason(config, self.kind, capability))
            }
        }
    }

    pub fn is_cpu(&self) -> bool {
        self.name == "cpu"
    }
}

/// Refuses settings that only `plan` takes.
///
/// # Errors
/// [`Error::Usage`] for the name of a GPU, and for an amount of memory.
pub fn refuse_hypothetical(settings: &Settings) -> Result<()> {
    let (_, name) = split_count(&settings.device);
    if GpuModel::find(name).is_some() {
        return Err(Error::usage(format!(
            "device={} names a GPU to plan for, which only `plan` accepts: use auto, cpu, cuda or cuda:N here",
            settings.device
        )));
    }
    if let Some(memory) = &settings.memory {
        let message =
            format!("memory={memory} is for `plan` alone: a run has the memory of its device; leave it out here");
        return Err(Error::usage(message));
    }
    Ok(())
}

/// `2xh100-80gb` is two devices, one for each process.
fn split_count(device: &str) -> (Option<usize>, &str) {
    let split = || {
        let (count, name) = device.split_once('x')?;
        Some((count.parse().ok().filter(|count| *count > 0)?, name))
    };
    split().map_or((None, device), |(count, name)| (Some(count), name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn planned(device: &str, memory: Option<&str>) -> Result<PlannedDevice> {
        let memory = memory.map(str::to_owned);
        PlannedDevice::new(&Settings { device: device.to_owned(), memory, ..Settings::plain() })
    }

    #[test]
    fn a_named_gpu_or_an_amount_of_memory_needs_no_gpu() {
        let named = planned("h100-80gb", None).unwrap();
        assert_eq!((named.kind, named.world_size, named.present), (Kind::BFloat16, 1, None));
        let available = named.available_bytes.unwrap();
        assert!((83_000_000_000..85_000_000_000).contains(&available), "{available}");
        let two = planned("2xRTX-4090", None).unwrap();
        assert_eq!((two.name.as_str(), two.world_size), ("rtx-4090", 2));
        for (device, name) in [("auto", "GPU"), ("h200", "h200")] {
            let limited = planned(device, Some("80GB")).unwrap();
            assert_eq!((limited.name.as_str(), limited.available_bytes), (name, Some(79_400_000_000)));
        }
    }

    #[test]
    fn the_cpu_is_here_and_unknown_names_list_the_known_ones() {
        let cpu = planned("cpu", None).unwrap();
        assert!(cpu.is_cpu() && cpu.kind == Kind::Float && cpu.available_bytes.is_none());
        let message = planned("h100-80g", None).err().unwrap().to_string();
        assert!(message.contains("did you mean `h100-80gb`") && message.contains("rtx-3090"), "{message}");
    }

    #[test]
    fn only_plan_takes_gpus_by_name_and_amounts_of_memory() {
        let refusal = |device: &str, memory: Option<&str>| {
            let memory = memory.map(str::to_owned);
            refuse_hypothetical(&Settings { device: device.to_owned(), memory, ..Settings::plain() })
        };
        for device in ["h100-80gb", "2xh200"] {
            let message = refusal(device, None).unwrap_err().to_string();
            assert!(message.contains(&format!("device={device}")) && message.contains("cuda:N"), "{message}");
        }
        assert!(refusal("auto", Some("80GB")).unwrap_err().to_string().contains("memory=80GB is for `plan` alone"));
        assert!(refusal("cuda:1", None).is_ok() && refusal("nonsense", None).is_ok());
    }
}
